"""What an existing project needs to be served by us: planned, applied, checked. Undone in detach.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from backend.coarse_answers import SKIPS
from backend.connection import credentials, note_of, our_backend, ours_among, recorded
from backend.detach import detach
from backend.download import shown_host
from backend.errors import AttachRefused, ConfigError
from backend.label_config import OURS, ProjectConfig, check_own_coarse, parse, shares_names, without_coarse
from backend.labelstudio import LabelStudio
from backend.settings import Settings
from backend.steps import Found, Step, keep_note, steps

__all__ = ["Plan", "apply", "check", "credentials", "detach", "our_backend", "plan", "recorded"]

#: Fine labels of each coarse label.
Groups = Mapping[str, Sequence[str]]
#: The order is tested on 1.23; what is older than this was never tried and is refused.
OLDEST = (1, 20)
#: Tasks whose image hosts are looked at.
SCANNED = 5000


@dataclass(frozen=True)
class Plan:
    """What `attach` found, and what it would change.

    Attributes:
        project: Label Studio's project id.
        notes: what to know about the project.
        steps: changes, in the order in which they are safe; none when all is in place.
        found: the project as it was then.
    """

    project: int
    notes: tuple[str, ...]
    steps: tuple[Step, ...]
    found: Found

    @property
    def sentences(self) -> list[str]:
        """The plan for people."""
        changes = [f"{number}. {step.text}" for number, step in enumerate(self.steps, 1)]
        return [*self.notes, *(changes or ["Everything is in place; nothing to change."])]


def plan(studio: LabelStudio, project: int, settings: Settings, groups: Groups | None = None) -> Plan:
    """Find out what a project still needs; changes nothing.

    Label Studio's community edition makes no `ProjectMember` rows (two of them would make its order random) and no
    API shows them, so they are not looked for.

    Args:
        studio: with the key of somebody who may change the project.
        project: Label Studio's project id.
        settings: our address and secret.
        groups: fine classes per coarse label; without them what was recorded, else a guess.

    Raises:
        AttachRefused: it cannot work; says why and what to do.
        ConfigError: the label config cannot be used.
        LabelStudioError: wrong key, no such project, or no connection.
    """
    found = look(studio, project, settings, groups)
    return Plan(project, (*notes(found), *host_notes(found)), tuple(steps(found)), found)


def apply(plan: Plan) -> None:
    """Carry out a plan, the connection first: whatever fails before it has changed nothing.

    Raises:
        AttachRefused: Label Studio cannot reach us, or refuses to; nothing half-made is left.
        LabelStudioError: any other trouble; safe to run again.
    """
    for step in plan.steps:
        step.run()
    keep_note(plan.found)


def check(studio: LabelStudio, project: int, settings: Settings) -> list[str]:
    """What is missing, in sentences; also where somebody connected us by Label Studio's own settings page.

    Raises:
        LabelStudioError: wrong key, no such project, or no connection.
    """
    try:
        found = look(studio, project, settings, None)
        return [step.text for step in steps(found)]
    except (AttachRefused, ConfigError) as error:
        return [str(error)]


def look(studio: LabelStudio, project: int, settings: Settings, groups: Groups | None) -> Found:
    """Read a project, and refuse it where our order cannot hold.

    Raises:
        AttachRefused, ConfigError, LabelStudioError: as in `plan`.
    """
    check_version(studio.version())
    row = studio.project(project)
    if int(row["maximum_annotations"]) > 1:
        raise AttachRefused(
            f"project {project} wants {row['maximum_annotations']} annotations per task: Label Studio then serves "
            "tasks that others have begun before any order of ours; set it to 1. Its pages have no field for that: "
            f'send PATCH {studio.url}/api/projects/{project}/ with {{"maximum_annotations": 1}}'
        )
    backends = studio.ml_backends(project)
    ours = ours_among(backends, settings)
    note = note_of(ours)
    others = tuple(b for b in backends if ours is None or b["id"] != ours["id"])
    config = understand(row["label_config"], groups, note)
    return Found(studio, settings, row, config, ours, others)


def understand(xml: str, groups: Groups | None, recorded: Mapping[str, Any]) -> ProjectConfig:
    """Parse a label config; as if our control were not there where it was made for other `groups` or shares a name.

    Raises:
        ConfigError: it cannot be used, or the groups do not fit.
    """
    try:
        config = parse(without_coarse(xml) if shares_names(xml) else xml, groups, recorded)
        check_own_coarse(xml, config.classes)
        return config
    except ConfigError:
        if groups and OURS in xml:
            return parse(without_coarse(xml), groups)
        raise


def check_version(version: str) -> None:
    """Refuse a Label Studio that is too old.

    Raises:
        AttachRefused: naming both versions.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise AttachRefused(f"Label Studio {version} is too old: upgrade it to {oldest} or later")


def notes(found: Found) -> Iterator[str]:
    """What to know about the project before changing it."""
    config, row = found.config, found.project
    yield (
        f"Project {found.id} ({row['title']}): images in {config.image_key!r}, fine labels by {config.fine.tag} "
        f"{config.fine.name!r}."
    )
    groups = "; ".join(f"{name} = {', '.join(fine)}" for name, fine in config.groups.items())
    yield f"Coarse labels: {groups}."
    if row["skip_queue"] not in SKIPS:
        yield (
            f"Tasks that somebody skips count as done here (skip_queue = {row['skip_queue']}): coarse labels could "
            "then never be set aside for a full segmentation, so none are asked for."
        )
    if config.background == "":
        yield f"No label means background: pixels without a region count as {config.classes.fine[0]!r}."
    first = min(found.others, key=lambda b: int(b["id"]), default=None)
    if first and (found.ours is None or int(first["id"]) < int(found.ours["id"])):
        yield (
            f"Label Studio asks only the ML backend that was connected first, here {first['title']!r}: prelabels for "
            "the head of the queue will travel with the ranking instead of being fetched."
        )


def image_hosts(found: Found) -> set[str]:
    """Hosts, with their ports if any, of the project's http(s) images that are not Label Studio's own."""
    hosts = set()
    for task in islice(found.studio.tasks(found.id), SCANNED):
        value = str(task["data"].get(found.config.image_key, ""))
        try:
            if urlsplit(value).scheme in ("http", "https") and not found.studio.http.owns(value):
                hosts.add(shown_host(value))
        except ValueError:  # no address at all
            continue
    return hosts


def host_notes(found: Found) -> Iterator[str]:
    """Where images come from besides Label Studio, and the setting that allows what is not allowed yet.

    Hosts are the operator's to allow, in the environment: what a project says, any of its members can change.
    """
    hosts, allowed = image_hosts(found), {host.lower() for host in found.settings.allowed_hosts}
    refused = sorted(host for host in hosts if host not in allowed and urlsplit(f"//{host}").hostname not in allowed)
    fetched = sorted(hosts - set(refused))
    if fetched:
        yield f"Images will be fetched from {', '.join(fetched)}."
    if refused:
        setting = ",".join([*found.settings.allowed_hosts, *refused])
        yield (
            f"Images on {', '.join(refused)} will not be fetched: nobody allowed it. If you trust it, start the worker "
            f"with FIRSTROW_ALLOWED_HOSTS={setting}"
        )
