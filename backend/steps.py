"""The changes that attach makes to a project, each planned only where it is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backend.connection import (
    BY_SCORE,
    FIRST_TITLE,
    FLAGS,
    NOTE,
    OURS,
    SECRET_HEADER,
    TAB,
    USER,
    credentials,
    digest,
    keeper_account,
    keeper_address,
    note_of,
    our_backend,
    our_tabs,
    our_webhooks,
    same_url,
    webhook_url,
    write_note,
)
from backend.errors import AttachRefused, LabelStudioError
from backend.label_config import ProjectConfig, parse, with_coarse, without_coarse
from backend.labelstudio import LabelStudio, Row
from backend.settings import Settings


@dataclass(frozen=True)
class Step:
    """One change: a sentence for people, and what makes it."""

    text: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Found:
    """A project as it is now, and what is said about it."""

    studio: LabelStudio
    settings: Settings
    project: Row
    config: ProjectConfig
    ours: Row | None
    others: tuple[Row, ...]

    @property
    def id(self) -> int:
        """Label Studio's project id."""
        return int(self.project["id"])

    @property
    def new_config(self) -> str:
        """The label config with our coarse control."""
        old = str(self.project["label_config"])
        return old if self.config.coarse else with_coarse(without_coarse(old), self.config.classes)


def steps(found: Found) -> Iterator[Step]:
    """The changes that are still to be made."""
    yield from connection_steps(found)
    yield from keeper_steps(found)
    yield from webhook_steps(found)
    yield from config_steps(found)
    yield from flag_steps(found)
    yield from tab_steps(found)


def connection_steps(found: Found) -> Iterator[Step]:
    """Connect our ML backend, with our note of what was there before."""
    url, ours = found.settings.url, found.ours
    if ours is None:
        yield Step(f"Connect the ML backend {FIRST_TITLE!r} at {url}.", lambda: connect(found))
        return
    faults = [text for text, fault in connection_faults(found, ours) if fault]
    if faults:
        yield Step(f"Renew the connection to the ML backend at {url}: {', '.join(faults)}.", lambda: reconnect(found))


def connection_faults(found: Found, ours: Row) -> Iterator[tuple[str, bool]]:
    """What can be wrong with our ML backend, and whether it is."""
    yield f"its address is {ours['url']}", not same_url(ours["url"], found.settings.url)
    yield "its title is not that of a ranking", not OURS.fullmatch(ours["title"] or "")
    yield "it lacks our secret", ours["auth_method"] != "BASIC_AUTH" or ours["basic_auth_user"] != USER
    yield "it is set to interactive", bool(ours["is_interactive"])
    trouble = ours["error_message"] or "no answer"
    former = "its secret is a former or a wrong one" if trouble.startswith("401 ") else ""
    yield former or f"Label Studio cannot reach it ({trouble})", ours["state"] != "CO"
    yield "groups and the former settings are not recorded", note_of(ours) != new_note(found)


def keeper_steps(found: Found) -> Iterator[Step]:
    """Make the account that keeps coarse labels which are set aside, and write its id down; anew if it is gone."""
    if note_of(found.ours).get("keeper") not in {row["id"] for row in found.studio.users()}:
        address = keeper_address(found.id)
        yield Step(
            f"Make the account {address} without a password: coarse labels are handed to it while their task is "
            "segmented in full; `firstrow detach` gives them back and deletes it.",
            lambda: make_keeper(found),
        )


def make_keeper(found: Found) -> None:
    """Make the keeper account, or take the key's own user where accounts may not be made."""
    studio, ours = found.studio, our_backend(found.studio, found.id, found.settings)
    keeper = keeper_account(studio, found.id) or new_keeper(studio, found.id)
    write_note(studio, found.id, found.settings, {**new_note(found), **note_of(ours), "keeper": keeper})


def keep_note(found: Found) -> None:
    """Write our note once more where Label Studio has lost it by now: see `write_note`."""
    note = note_of(our_backend(found.studio, found.id, found.settings))
    if not ("before" in note and "keeper" in note):
        make_keeper(found)


def new_keeper(studio: LabelStudio, project: int) -> int:
    """Id of a new keeper account; of the key's own user where Label Studio lets us make none."""
    names = {"first_name": "First Row", "last_name": f"(keeps coarse labels of project {project})"}
    try:
        address = keeper_address(project)
        return int(studio.create_user(email=address, username=address.partition("@")[0], **names)["id"])
    except LabelStudioError as error:
        if error.status not in (400, 403, 404, 405):
            raise
        return int(studio.whoami()["id"])


def new_note(found: Found) -> dict[str, Any]:
    """Our note as it should be; what was there before us is written down once."""
    old, row = note_of(found.ours), found.project
    before = dict(old.get("before") or former(found))
    stamp, now = old.get("config"), row["label_config"]
    if stamp != digest(now) and found.new_config != now:
        before["label_config"] = without_coarse(now)  # somebody changed the rest: detach goes back to their version
    if stamp is None or found.new_config != now:
        stamp = digest(found.new_config)
    keeper = {"keeper": old["keeper"]} if "keeper" in old else {}
    return {"before": before, "config": stamp} | found.config.note(old) | keeper


def former(found: Found) -> dict[str, Any]:
    """What `detach` will put back."""
    row = found.project
    version = row["model_version"] or ""
    return {
        "label_config": row["label_config"],
        **{flag: row[flag] for flag in FLAGS},
        "model_version": "" if found.ours and version == found.ours["title"] else version,
        "views": [view["id"] for view in found.studio.views(found.id)],
        "versions": sorted(found.studio.versions(found.id)),
    }


def connect(found: Found) -> None:
    """Connect our ML backend; a connection that Label Studio leaves half-made is removed.

    Raises:
        AttachRefused: Label Studio cannot or will not reach us.
    """
    known = {row["id"] for row in found.others}
    more: dict[str, Any] = {"title": FIRST_TITLE, "is_interactive": False, "extra_params": {NOTE: new_note(found)}}
    with explained(found.settings.url):
        try:
            found.studio.connect_ml(**credentials(found.settings, found.id), **more)
        except LabelStudioError:
            for row in found.studio.ml_backends(found.id):
                if row["id"] not in known:
                    found.studio.delete_ml(row["id"])
            raise


def reconnect(found: Found) -> None:
    """Bring our ML backend up to date.

    Raises:
        AttachRefused: Label Studio cannot or will not reach us.
    """
    ours = found.ours or {}
    title = ours["title"] if OURS.fullmatch(ours["title"] or "") else FIRST_TITLE
    with explained(found.settings.url):
        write_note(found.studio, found.id, found.settings, new_note(found), title=title, is_interactive=False)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Say what to do where Label Studio cannot or will not reach us at `url`.

    Raises:
        AttachRefused: the explanation.
        LabelStudioError: it was something else.
    """
    try:
        yield
    except LabelStudioError as error:
        reason = unreachable(url, error)
        if reason:
            raise reason from error
        raise


def unreachable(url: str, error: LabelStudioError) -> AttachRefused | None:
    """Why Label Studio did not connect us, and what to do; None where it was something else."""
    said = re.sub(r"<[^>]*>", "", str(error))
    if error.status == 403 and ("reserved" in said or "block" in said):
        return AttachRefused(
            f"Label Studio does not talk to private addresses like {url} as it is set up: start it with "
            "ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false in its environment, then attach again"
        )
    if error.status == 400 and ("authentication parameters" in said or "401 Client Error" in said):
        return AttachRefused(
            f"what answers at {url} has another secret: give `firstrow serve` and `firstrow attach` the same "
            "FIRSTROW_SECRET or FIRSTROW_STORE, and start `firstrow serve` anew if that has changed"
        )
    if error.status == 400 and "health check failed" in said:
        return AttachRefused(
            f"Label Studio cannot reach us at {url}: start `firstrow serve`, or set FIRSTROW_URL to an address that "
            f"Label Studio can reach ({said.partition('Additional info: ')[2][:200] or 'no details'})"
        )
    return None


def config_steps(found: Found) -> Iterator[Step]:
    """Add the coarse control."""
    if found.new_config != found.project["label_config"]:
        added = parse(found.new_config).coarse
        labels = ", ".join(added.labels) if added else ""
        text = f"Put a control for coarse labels ({labels}) into the label config; the rest of it stays."
        yield Step(text, lambda: found.studio.patch_project(found.id, label_config=found.new_config))


def flag_steps(found: Found) -> Iterator[Step]:
    """Set sampling and its companions; the version in force once there is a ranking."""
    wanted: dict[str, Any] = {flag: value for flag, value in FLAGS.items() if found.project[flag] != value}
    title = found.ours["title"] if found.ours else ""
    served, versions = found.project["model_version"] or "", found.studio.versions(found.id) if title else {}
    if served != title and title in versions and not (served in versions and is_newer(served, title)):
        wanted["model_version"] = title
    if wanted:
        text = ", ".join(f"{flag} = {value} (now {found.project[flag]})" for flag, value in wanted.items())
        yield Step(f"Set {text}.", lambda: found.studio.patch_project(found.id, **wanted))


def is_newer(version: str, title: str) -> bool:
    """Whether a version is an order of ours after the one that our ML backend is named for: it gets its name later."""
    numbers = [int(name.rpartition("-")[2]) for name in (version, title) if OURS.fullmatch(name)]
    return len(numbers) == 2 and numbers[0] > numbers[1]


def webhook_steps(found: Found) -> Iterator[Step]:
    """Have events sent to us, with our secret; no longer to an address that we left."""
    studio, url = found.studio, webhook_url(found.settings.url)
    left = found.ours["url"] if found.ours else found.settings.url
    if not same_url(left, found.settings.url):
        yield Step(f"Delete the webhook to {webhook_url(left)}.", lambda: drop_webhooks(studio, found.id, left))
    hooks = our_webhooks(studio, found.id, [found.settings.url])
    if not (hooks and all(_hook_is_fine(found, hook) for hook in hooks)):
        yield Step(f"Set our secret on the webhook to {url}.", lambda: set_webhook(found))


def set_webhook(found: Found) -> None:
    """Put our secret on the webhook that Label Studio made on connecting; make one if it is gone."""
    studio, headers = found.studio, {SECRET_HEADER: found.settings.project_secret(found.id)}
    hooks = our_webhooks(studio, found.id, [found.settings.url])
    with explained(found.settings.url):
        for hook in hooks:
            fields = {"url": hook["url"], "is_active": True, "send_payload": True, "send_for_all_actions": True}
            studio.patch_webhook(hook["id"], headers={**(hook["headers"] or {}), **headers}, **fields)
        if not hooks:
            studio.create_webhook(found.id, webhook_url(found.settings.url), headers)


def drop_webhooks(studio: LabelStudio, project: int, url: str) -> None:
    """Delete the webhooks of a backend at `url`."""
    for hook in our_webhooks(studio, project, [url]):
        studio.delete_webhook(hook["id"])


def _hook_is_fine(found: Found, hook: Row) -> bool:
    secret = (hook["headers"] or {}).get(SECRET_HEADER)
    on = hook["is_active"] and hook["send_payload"] and hook["send_for_all_actions"]
    return bool(on and secret == found.settings.project_secret(found.id))


def tab_steps(found: Found) -> Iterator[Step]:
    """Make the first Data Manager tab one in our order, for people who come by its address."""
    views = found.studio.views(found.id)
    if not any(v["data"].get("title") == TAB and v["data"].get("ordering", [])[:1] == [BY_SCORE] for v in views):
        yield Step(f"Add the Data Manager tab {TAB!r}, ordered by our score, as the first.", lambda: add_tab(found))


def add_tab(found: Found) -> None:
    """Add our tab, with the columns that Label Studio shows by default and the score, and put it first.

    A tab of ours that lost its order makes room.
    """
    studio, before = found.studio, note_of(our_backend(found.studio, found.id, found.settings))["before"]["views"]
    for tab in our_tabs(studio, found.id, before):
        studio.delete_view(tab["id"])
    others = [view["id"] for view in studio.views(found.id)]
    data = {"title": TAB, "ordering": [BY_SCORE], "hiddenColumns": hidden_columns(studio.columns(found.id))}
    made = studio.create_view(found.id, data)
    studio.order_views(found.id, [made["id"], *others])


def hidden_columns(columns: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What Label Studio hides by default, but for the score."""
    shown: dict[str, list[str]] = {"explore": [], "labeling": []}
    for column in columns:
        path = f"{column['target']}:" + (f"{column['parent']}." if column.get("parent") else "") + column["id"]
        for mode, hidden in shown.items():
            if not column.get("visibility_defaults", {}).get(mode, True) and (mode, path) != ("explore", BY_SCORE):
                hidden.append(path)
    return shown
