"""Puts back what was there before `attach`; what people did stays, or is saved to a file where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.attached import Attached, Kept, Undo, does, look, tasks_of_keeper
from backend.coarse_answers import COARSE_COPY
from backend.connection import FLAGS, OURS, keeper_address, our_tabs, our_webhooks
from backend.connection import digest as config_digest
from backend.detach_answers import Choice, give_the_rest, still_aside, undo_answers
from backend.detach_predictions import old_bins, undo_predictions
from backend.errors import ConfigError, DetachUnfinished, LabelStudioError
from backend.generations import QUEUE
from backend.label_config import OURS as CLASS
from backend.label_config import parse, without_coarse
from backend.labelstudio import UNSHOWN, LabelStudio
from backend.settings import Settings


def detach(
    studio: LabelStudio,
    project: int,
    settings: Settings,
    coarse: Choice | None = "keep",
    file: Path | None = None,
    note: Mapping[str, Any] | None = None,
    kept: Kept | None = None,
) -> Iterator[str]:
    """Undo `attach`; safe to repeat, also after it died half-way.

    Our note of what was there before lies in our ML backend, which is therefore removed last.

    Args:
        studio: with the key of somebody who may change the project.
        project: Label Studio's project id.
        settings: our address.
        coarse: what becomes of coarse labels; None where there must be none.
        file: where they go, with `file`.
        note: what the store remembers of our note, for what Label Studio has no longer.
        kept: what the store has of coarse labels that were set aside, for those whose copies somebody has deleted.

    Yields:
        Each step in a sentence, as it begins, and how far it is.

    Raises:
        AttachRefused: nobody has said what becomes of coarse labels, or the file cannot be written; nothing was
            changed but for webhooks, and labels that were given back to their authors.
        DetachUnfinished: Label Studio cannot show some task; all else is undone but our account and our ML backend.
        LabelStudioError: wrong key, no such project, or no connection.
    """
    for step in plan_detach(studio, project, settings, coarse, file, note, kept):
        yield step.text
        yield from step.run()


def plan_detach(
    studio: LabelStudio,
    project: int,
    settings: Settings,
    coarse: Choice | None = "keep",
    file: Path | None = None,
    note: Mapping[str, Any] | None = None,
    kept: Kept | None = None,
    ask: bool = False,
) -> list[Undo]:
    """What `detach` would do; changes nothing. Arguments and errors as there.

    With `ask`, a missing choice is a sentence of the plan, not an error.
    """
    here = look(studio, project, settings, note, kept)
    steps = [*undo_webhooks(here)]
    if here.ours is None and not here.before and not is_left(here):
        return [*steps, Undo(f"Project {project} has no ML backend of ours.", list)]
    steps += [*undo_answers(here, coarse, file, ask), *undo_copies(here)]
    steps += [*undo_predictions(here), *undo_config(here, coarse), *undo_settings(here)]
    for tab in our_tabs(studio, project, here.before.get("views", [])):
        name = tab["data"]["title"]
        steps.append(Undo(f"Delete the Data Manager tab {name!r}.", does(studio.delete_view, int(tab["id"]))))
    steps += undo_keeper(here)
    text = f"Disconnect the ML backend at {here.ours['url']}." if here.ours else "Look whether all is undone."
    steps.append(Undo(unfinished(here) or text, lambda: disconnect(here)))
    return steps


def unfinished(here: Attached) -> str:
    """What has to be done before all can be undone; nothing if it can."""
    if not here.unreadable:
        return ""
    tasks = ", ".join(map(str, sorted(here.unreadable)))
    return (
        f"Label Studio cannot show task {tasks} (it answers 500: {UNSHOWN}): its coarse labels, our account and our "
        "ML backend stay. Delete that annotation, or the task, then detach once more."
    )


def is_left(here: Attached) -> bool:
    """Whether anything of us is left where our ML backend is gone, and nobody has the note of what was before."""
    versions = here.studio.versions(here.id)
    orders = any(OURS.fullmatch(version) and version.startswith(QUEUE) for version in versions)
    there = here.account or orders or COARSE_COPY in versions or our_tabs(here.studio, here.id, [])
    return bool(there or old_bins(here))


def disconnect(here: Attached) -> list[str]:
    """Remove our ML backend, the last thing that is left.

    Raises:
        DetachUnfinished: not all is undone.
    """
    if text := unfinished(here):
        raise DetachUnfinished(text)
    if left := still_aside(here):
        tasks = ", ".join(map(str, sorted(left)))
        raise DetachUnfinished(f"Coarse labels of task {tasks} are still set aside: detach once more.")
    if here.ours is not None:
        here.studio.delete_ml(int(here.ours["id"]))
    return []


def undo_webhooks(here: Attached) -> Iterator[Undo]:
    """Have no more events sent to us."""
    urls = {here.settings.url, *([here.ours["url"]] if here.ours else [])}
    for hook in our_webhooks(here.studio, here.id, urls):
        text = f"Delete the webhook to {hook['url']}."
        yield Undo(text, does(here.studio.delete_webhook, int(hook["id"])))


# Label config, settings, account


def undo_config(here: Attached, coarse: Choice | None) -> Iterator[Undo]:
    """Put the label config back: as it was, or, if somebody changed it since, without our control.

    Args:
        here: the project.
        coarse: what becomes of coarse labels: those that are kept need the control.
    """
    now, before = str(here.studio.project(here.id)["label_config"]), str(here.before.get("label_config", ""))
    if not before:
        why = "It was connected without `attach`" if here.ours else "Nobody knows what they were"
        yield Undo(f"{why}: sampling and label config stay as they are, but for a control of ours.", list)
    wanted = before if config_digest(now) == here.note.get("config", "") else cleaned(now, before)
    if wanted == now:
        return
    needed = is_needed(here)
    if needed and coarse == "keep":
        yield Undo("The control for coarse labels stays in the label config: annotations that are kept need it.", list)
        return
    unless = needed or COARSE_COPY in here.studio.versions(here.id)  # from copies annotations may be made anew
    more = ", unless annotations that are left need it" if unless else ""
    text = f"Take the control for coarse labels out of the label config{more}."
    yield Undo(text, lambda: restore_config(here, wanted))


def is_needed(here: Attached) -> bool:
    """Whether annotations use the control for coarse labels: Label Studio then refuses a label config without it."""
    coarse = here.config.coarse if here.config else None
    return coarse is not None and coarse.name in here.studio.used_controls(here.id)


def restore_config(here: Attached, wanted: str) -> Iterator[str]:
    """Set the label config, unless annotations need our control."""
    try:
        here.studio.patch_project(here.id, label_config=wanted)
    except LabelStudioError as error:
        if error.status != 400:
            raise
        yield "Kept the control for coarse labels: annotations use it (`--coarse file` removes most)."


def cleaned(now: str, before: str) -> str:
    """A label config without our control; unchanged if the control was the team's own or the config is unreadable.

    Where nobody knows what was `before`, the class that our control has tells.
    """
    try:
        if not before:
            return without_coarse(now) if CLASS in now else now
        return now if parse(before).coarse else without_coarse(now)
    except ConfigError:
        return now


def undo_settings(here: Attached) -> Iterator[Undo]:
    """Put back project settings that nobody has changed since."""
    now, before = here.studio.project(here.id), here.before
    wanted = {flag: before[flag] for flag, value in FLAGS.items() if now[flag] == value != before.get(flag, value)}
    title = here.ours["title"] if here.ours else ""
    if not now["model_version"] or now["model_version"] == title or OURS.fullmatch(now["model_version"]):
        titles = {
            row["title"] for row in here.studio.ml_backends(here.id) if not here.ours or row["id"] != here.ours["id"]
        }
        version = before.get("model_version", "")
        wanted["model_version"] = version if version in {*titles, *here.studio.versions(here.id)} else ""
    if wanted:
        text = "Put back " + ", ".join(f"{name} = {value!r}" for name, value in wanted.items()) + "."
        yield Undo(text, lambda: restore_settings(here, wanted))


def restore_settings(here: Attached, wanted: Mapping[str, Any]) -> list[str]:
    """Set project settings; Label Studio must know a version by then."""
    here.studio.patch_project(here.id, **wanted)
    return []


def undo_copies(here: Attached) -> Iterator[Undo]:
    """Give back what was set aside meanwhile, and delete the copies of coarse labels."""
    count = here.studio.versions(here.id).get(COARSE_COPY, 0)
    if count or tasks_of_keeper(here):
        text = f"Delete the {count} copies of coarse labels, {COARSE_COPY!r}, once nothing is set aside any more."
        yield Undo(text, lambda: give_the_rest(here))


def undo_keeper(here: Attached) -> Iterator[Undo]:
    """Delete the account that kept coarse labels, once it keeps none."""
    if here.account:
        yield Undo(f"Delete the account {keeper_address(here.id)}.", lambda: delete_keeper(here))


def delete_keeper(here: Attached) -> Iterator[str]:
    """Delete the account, unless it still has annotations or we may not."""
    left = tasks_of_keeper(here)
    if left or here.unreadable:
        tasks = ", ".join(map(str, sorted(left | here.unreadable)))
        yield f"Kept the account: task {tasks} may have annotations that are still handed to it."
        return
    try:
        here.studio.delete_user(here.account)
    except LabelStudioError as error:
        if error.status != 403:
            raise
        yield "Kept the account: only the organisation's owner may delete it."
