"""Puts back what was there before `attach`; what people did stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backend.connection import FLAGS, OURS, digest, note_of, our_backend, our_tabs, our_webhooks, unsigned
from backend.errors import ConfigError, LabelStudioError
from backend.label_config import parse, without_coarse
from backend.labelstudio import LabelStudio, Row
from backend.project import COARSE_COPY
from backend.settings import Settings


def detach(studio: LabelStudio, project: int, settings: Settings) -> Iterator[str]:
    """Undo `attach`; safe to repeat, also after it died half-way.

    Our note of what was there before lies in our ML backend, which is therefore removed last.

    Yields:
        Each step in a sentence, as it begins or when it is done.

    Raises:
        LabelStudioError: wrong key, no such project, or no connection.
    """
    ours = our_backend(studio, project, settings)
    before = dict(note_of(ours).get("before") or {})
    yield from remove_webhooks(studio, project, {settings.url, *([ours["url"]] if ours else [])})
    if ours is None:
        yield f"Project {project} has no ML backend of ours."
        return
    yield from restore_copies(studio, project)
    yield from delete_predictions(studio, project, before.get("versions", []))
    if before:
        yield from restore_config(studio, project, before["label_config"], note_of(ours).get("config", ""))
    else:
        yield "It was connected without `attach`: sampling and label config stay as they are."
    yield from restore_settings(studio, project, before, ours)
    for tab in our_tabs(studio, project, before.get("views", [])):
        studio.delete_view(tab["id"])
        yield f"Deleted the Data Manager tab {tab['data']['title']!r}."
    studio.delete_ml(ours["id"])
    yield f"Disconnected the ML backend at {ours['url']}."


def remove_webhooks(studio: LabelStudio, project: int, urls: set[str]) -> Iterator[str]:
    """Have no more events sent to us."""
    for hook in our_webhooks(studio, project, urls):
        studio.delete_webhook(hook["id"])
        yield f"Deleted the webhook to {hook['url']}."


def restore_copies(studio: LabelStudio, project: int) -> Iterator[str]:
    """Make coarse labels that wait as predictions for their full segmentation annotations again."""
    restored = kept = 0
    for task in studio.full_tasks(project, sorted(studio.tasks_with_version(project, COARSE_COPY))):
        copies = sorted(
            (p for p in task["predictions"] if p["model_version"] == COARSE_COPY), key=lambda p: int(p["id"])
        )
        done = [a for a in task["annotations"] if not a["was_cancelled"]]
        if done and not restored_before(done, copies[-1]):
            kept += 1
            continue
        if not done:
            result, author = unsigned(copies[-1]["result"])
            studio.create_annotation(task["id"], result, **({"completed_by": author} if author else {}))
            restored += 1
        for copy in copies:
            studio.delete_prediction(copy["id"])
    if restored:
        yield f"Made the coarse labels of {restored} tasks annotations again."
    if kept:
        yield f"Left the coarse labels of {kept} annotated tasks where they are, as predictions {COARSE_COPY!r}."


def restored_before(annotations: Sequence[Row], copy: Row) -> bool:
    """Whether an annotation was made from this copy already, by a detach that died before it deleted the copy."""
    result, _ = unsigned(copy["result"])
    return any(ids(annotation["result"]) == ids(result) for annotation in annotations)


def ids(result: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    """Names the regions of a result."""
    return sorted((str(region.get("id")), str(region.get("from_name"))) for region in result)


def delete_predictions(studio: LabelStudio, project: int, foreign: Sequence[str]) -> Iterator[str]:
    """Delete our rank predictions and prelabels, not versions that were there before us."""
    for version, count in sorted(studio.versions(project).items()):
        if OURS.fullmatch(version) and version not in foreign:
            yield f"Deleting {count} predictions of {version!r} ..."
            studio.delete_version(project, version)


def restore_config(studio: LabelStudio, project: int, before: str, stamp: str) -> Iterator[str]:
    """Put the label config back: as it was, or, if somebody changed it since, without our control."""
    now = str(studio.project(project)["label_config"])
    wanted = before if digest(now) == stamp else cleaned(now, before)
    if wanted == now:
        return
    try:
        studio.patch_project(project, label_config=wanted)
        yield "Removed the control for coarse labels from the label config."
    except LabelStudioError as error:
        if error.status != 400:
            raise
        yield "Kept the control for coarse labels: annotations use it."


def cleaned(now: str, before: str) -> str:
    """A label config without our control; unchanged if the control was the team's own or the config is unreadable."""
    try:
        return now if parse(before).coarse else without_coarse(now)
    except ConfigError:
        return now


def restore_settings(studio: LabelStudio, project: int, before: Mapping[str, Any], ours: Row) -> Iterator[str]:
    """Put back project settings that nobody has changed since."""
    now = studio.project(project)
    wanted = {flag: before[flag] for flag, value in FLAGS.items() if now[flag] == value != before.get(flag, value)}
    if not now["model_version"] or now["model_version"] == ours["title"] or OURS.fullmatch(now["model_version"]):
        titles = {row["title"] for row in studio.ml_backends(project) if row["id"] != ours["id"]}
        version = before.get("model_version", "")
        wanted["model_version"] = version if version in {*titles, *studio.versions(project)} else ""
    if wanted:
        studio.patch_project(project, **wanted)
        yield "Put back " + ", ".join(f"{name} = {value!r}" for name, value in wanted.items()) + "."
