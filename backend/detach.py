"""Puts back what was there before `attach`; what people did stays, or is saved to a file where that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson

from backend.coarse_answers import (
    COARSE_COPY,
    active,
    author,
    copies_of,
    digest,
    give_back,
    held,
    is_cluster,
    is_vote,
    original_of,
)
from backend.connection import (
    FLAGS,
    OURS,
    keeper_account,
    keeper_address,
    note_of,
    our_backend,
    our_tabs,
    our_webhooks,
)
from backend.connection import digest as config_digest
from backend.errors import AttachRefused, ConfigError, LabelStudioError
from backend.label_config import ProjectConfig, parse, without_coarse
from backend.labelstudio import LabelStudio, Row
from backend.settings import Settings

#: What becomes of coarse labels: they stay annotations (and the control that they need), or go to a file.
Choice = Literal["keep", "file"]
#: A version of at most this many predictions is deleted at once; of others a page of tasks at a time: Label Studio on
#: SQLite refuses people's submits while it deletes thousands.
AT_ONCE, PAGE = 200, 20
#: How long Label Studio holds a served task for a person, who may submit what they began from a prelabel of ours.
OPEN = timedelta(hours=24)

Run = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Undo:
    """One thing to undo: a sentence for people, and what does it, telling how far it is."""

    text: str
    run: Run


@dataclass(frozen=True)
class Attached:
    """A project of ours as it is now.

    Attributes:
        studio: Label Studio.
        settings: our address.
        id: Label Studio's project id.
        ours: our ML backend, None if somebody has deleted it.
        note: what `attach` wrote down.
        keeper: id of the account that has annotations which are set aside; 0 without one.
        config: what the label config means; None if it cannot be used.
        answers: coarse answers: each task with its annotations and predictions.
    """

    studio: LabelStudio
    settings: Settings
    id: int
    ours: Row | None
    note: Mapping[str, Any]
    keeper: int
    config: ProjectConfig | None
    answers: list[Row] = field(default_factory=list)

    @property
    def before(self) -> dict[str, Any]:
        """What the project was like before us."""
        return dict(self.note.get("before") or {})


def detach(
    studio: LabelStudio,
    project: int,
    settings: Settings,
    coarse: Choice | None = "keep",
    file: Path | None = None,
    note: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Undo `attach`; safe to repeat, also after it died half-way.

    Our note of what was there before lies in our ML backend, which is therefore removed last.

    Args:
        studio: with the key of somebody who may change the project.
        project: Label Studio's project id.
        settings: our address.
        coarse: what becomes of coarse labels; None where there must be none.
        file: where they go, with `file`.
        note: what the store remembers of our note, for where Label Studio has it no longer.

    Yields:
        Each step in a sentence, as it begins, and how far it is.

    Raises:
        AttachRefused: nobody has said what becomes of coarse labels, or the file cannot be written; nothing was
            changed but for webhooks.
        LabelStudioError: wrong key, no such project, or no connection.
    """
    for step in plan_detach(studio, project, settings, coarse, file, note):
        yield step.text
        yield from step.run()


def plan_detach(
    studio: LabelStudio,
    project: int,
    settings: Settings,
    coarse: Choice | None = "keep",
    file: Path | None = None,
    note: Mapping[str, Any] | None = None,
) -> list[Undo]:
    """What `detach` would do; changes nothing. Arguments and errors as there."""
    here = look(studio, project, settings, note)
    steps = [*undo_webhooks(here)]
    if here.ours is None and not here.before:
        return [*steps, Undo(f"Project {project} has no ML backend of ours.", list)]
    steps += [*undo_answers(here, coarse, file), *undo_predictions(here), *undo_config(here), *undo_settings(here)]
    for tab in our_tabs(studio, project, here.before.get("views", [])):
        name = tab["data"]["title"]
        steps.append(Undo(f"Delete the Data Manager tab {name!r}.", does(studio.delete_view, int(tab["id"]))))
    steps += undo_keeper(here)
    if here.ours is not None:
        text = f"Disconnect the ML backend at {here.ours['url']}."
        steps.append(Undo(text, does(studio.delete_ml, int(here.ours["id"]))))
    return steps


def look(studio: LabelStudio, project: int, settings: Settings, note: Mapping[str, Any] | None = None) -> Attached:
    """Read what there is of us in a project."""
    ours = our_backend(studio, project, settings)
    written = note_of(ours) or dict(note or {})
    keeper = int(written.get("keeper") or 0) or keeper_account(studio, project)
    here = Attached(studio, settings, project, ours, written, keeper, config_of(studio, project, written))
    return replace(here, answers=list(answered_tasks(here)))


def does(change: Callable[..., object], *args: object) -> Run:
    """A step that is one call and has nothing to tell."""

    def run() -> list[str]:
        change(*args)
        return []

    return run


def undo_webhooks(here: Attached) -> Iterator[Undo]:
    """Have no more events sent to us."""
    urls = {here.settings.url, *([here.ours["url"]] if here.ours else [])}
    for hook in our_webhooks(here.studio, here.id, urls):
        text = f"Delete the webhook to {hook['url']}."
        yield Undo(text, does(here.studio.delete_webhook, int(hook["id"])))


# Coarse labels


def answered_tasks(here: Attached) -> Iterator[Row]:
    """Tasks with a coarse answer: one that is set aside, or one that stands as an annotation of nothing else."""
    config, studio = here.config, here.studio
    wanted = studio.tasks_with_version(here.id, COARSE_COPY)
    if config is not None and config.coarse is not None:
        wanted |= {int(row["id"]) for row in studio.tasks(here.id) if row.get("total_annotations")}
    for task in studio.full_tasks(here.id, sorted(wanted)):
        if copies_of(task) or any(is_answer(row, config) for row in active(task)):
            yield task


def config_of(studio: LabelStudio, project: int, note: Mapping[str, Any]) -> ProjectConfig | None:
    """What the label config means now; None if it cannot be used."""
    try:
        return parse(studio.label_config(project), recorded=note)
    except ConfigError:
        return None


def is_answer(annotation: Row, config: ProjectConfig | None) -> bool:
    """Whether an annotation holds coarse labels that we asked for, and nothing else."""
    regions = annotation.get("result") or []
    ours = any(is_cluster(region) for region in regions) and not annotation.get("ground_truth")
    return config is not None and ours and all(is_vote(region, config) for region in regions)


def answers_of(here: Attached, task: Row, config: ProjectConfig | None) -> list[Row]:
    """All coarse answers of a task as people gave them, each once."""
    given = {int(row["id"]): row for row in active(task) if is_answer(row, config)}
    copied = [original_of(copy) for copy in copies_of(task)]
    return [*given.values(), *(row for row in copied if row.get("id") not in given)]


def undo_answers(here: Attached, coarse: Choice | None, file: Path | None) -> Iterator[Undo]:
    """Coarse labels become annotations again, or go to a file.

    Raises:
        AttachRefused: nobody has said which, or no file was named.
    """
    config = here.config
    count = sum(len(answers_of(here, task, config)) for task in here.answers)
    if not count:
        return
    if coarse is None or (coarse == "file" and file is None):
        raise AttachRefused(
            f"people gave {count} coarse labels: say what becomes of them. `--coarse keep` leaves them as annotations "
            "of their authors, and the control that they need in the label config; `--coarse file --file PATH` saves "
            "them to a file and deletes them, so that nothing of First Row is left"
        )
    if coarse == "file" and file is not None:
        saved_before(here, file)  # refused before anything is changed
        text = f"Save {count} coarse labels to {file}, then delete them; the {len(here.answers)} tasks are free again."
        yield Undo(text, lambda: answers_to_file(here, file))
        return
    aside = sum(bool(copies_of(task)) for task in here.answers)
    if not aside:
        yield Undo(f"Leave {count} coarse labels where they are, as annotations.", list)
        return
    yield Undo(
        f"Give the coarse labels of {aside} tasks back to their authors, as annotations with their ids and times (what "
        "earlier releases had deleted gets new ones). That they began from a prelabel of ours is forgotten.",
        lambda: one_by_one(here.answers, partial(answers_back, here)),
    )


def answers_back(here: Attached, task: Row) -> None:
    """Give back the coarse answers of a task that were set aside, then delete their copies."""
    for copy in copies_of(task):
        original, annotation = original_of(copy), held(task, copy, here.keeper)
        if annotation is not None:
            give_back(here.studio, int(annotation["id"]), original)
        elif not any(same_answer(row, original) for row in task["annotations"]):
            by = author(original)
            here.studio.create_annotation(task["id"], original["result"], **({"completed_by": by} if by else {}))
        here.studio.delete_prediction(int(copy["id"]))


def same_answer(annotation: Row, original: Row) -> bool:
    """Whether an annotation is the one that was copied, or was made again from the copy."""
    return annotation["id"] == original.get("id") or names_of(annotation) == names_of(original)


def names_of(annotation: Row) -> list[tuple[Any, Any]]:
    """Names the regions of an annotation."""
    return sorted((str(r.get("id")), str(r.get("from_name"))) for r in annotation.get("result") or [])


def answers_to_file(here: Attached, file: Path) -> Iterator[str]:
    """Save all coarse answers, look whether they are there, then delete them one by one unless they have changed."""
    write_answers([*answer_rows(here), *saved_before(here, file)], file)
    yield from one_by_one(here.answers, partial(delete_answers, here))


def delete_answers(here: Attached, task: Row) -> str | None:
    """Delete the coarse answers of a task, which are in a file; a sentence where one was changed since."""
    saved = {row["id"]: digest(row) for row in answers_of(here, task, here.config) if "id" in row}
    gone = [delete_if_same(here.studio, number, content) for number, content in saved.items()]
    if not all(gone):
        return f"Task {task['id']}: its coarse labels were changed meanwhile and stay; detach once more."
    for copy in copies_of(task):
        here.studio.delete_prediction(int(copy["id"]))
    return None


def saved_before(here: Attached, file: Path) -> list[dict[str, Any]]:
    """What a detach that died half-way has saved in the file and already deleted: it must not be written over.

    Raises:
        AttachRefused: the file is somebody else's.
    """
    if not file.exists():
        return []
    present = {answer.get("id") for row in answer_rows(here) for answer in row["annotations"]}
    try:
        rows = [
            {**row, "annotations": [answer for answer in row["annotations"] if answer["id"] not in present]}
            for row in orjson.loads(file.read_bytes())
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AttachRefused(f"{file} is there and holds no coarse labels of ours: name another file") from error
    return [row for row in rows if row["annotations"]]


def delete_if_same(studio: LabelStudio, annotation: int, content: str) -> bool:
    """Delete an annotation, unless it is not what was saved any more."""
    try:
        if digest(studio.annotation(annotation)) != content:
            return False
        studio.delete_annotation(annotation)
    except LabelStudioError as error:
        if error.status != 404:
            raise
    return True


def export_answers(
    studio: LabelStudio,
    project: int,
    settings: Settings,
    note: Mapping[str, Any],
    kept: Iterable[Mapping[str, Any]],
    file: Path,
) -> int:
    """Write all coarse answers of a project to a file; changes nothing in Label Studio.

    Args:
        studio: Label Studio.
        project: Label Studio's project id.
        settings: our address.
        note: what the store remembers of our note.
        kept: what the store has of answers that were set aside: `task` and `annotation`. Written where Label Studio has
            them no longer.
        file: is replaced.

    Returns:
        How many there are.

    Raises:
        AttachRefused: the file cannot be written.
    """
    rows = answer_rows(look(studio, project, settings, note))
    known = {answer.get("id") for row in rows for answer in row["annotations"]}
    for old in kept:
        if old["annotation"]["id"] not in known:
            rows.append({"id": old["task"], "annotations": [old["annotation"]]})
    write_answers(rows, file)
    return sum(len(row["annotations"]) for row in rows)


def answer_rows(here: Attached) -> list[dict[str, Any]]:
    """All coarse answers as Label Studio's own JSON export would have them."""
    config = here.config
    tasks = here.answers
    return [{"id": task["id"], "data": task["data"], "annotations": answers_of(here, task, config)} for task in tasks]


def write_answers(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write answers to a file, and read them back.

    Raises:
        AttachRefused: the file cannot be written.
    """
    data = orjson.dumps(rows, option=orjson.OPT_INDENT_2)
    try:
        with file.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        if file.read_bytes() != data:
            raise OSError("it holds something else than was written")
    except OSError as error:
        raise AttachRefused(f"the coarse labels cannot be saved to {file}: {error}") from error


# Predictions


def undo_predictions(here: Attached) -> Iterator[Undo]:
    """Delete our rank predictions and prelabels, not versions that were there before us.

    A prelabel that somebody may have open is moved to a project of its own first: Label Studio refuses what was begun
    from a prediction that is gone.
    """
    studio, foreign = here.studio, here.before.get("versions", [])
    for bin_project in old_bins(here):
        text = f"Delete the project {bin_project['title']!r}: nobody has its prelabels open any more."
        yield Undo(text, does(studio.delete_project, int(bin_project["id"])))
    sizes = {v: n for v, n in studio.versions(here.id).items() if OURS.fullmatch(v) and v not in foreign}
    opened = list(open_predictions(here, sizes))
    if opened:
        yield Undo(
            f"Move {len(opened)} prelabels that people may have open to a project {bin_title(here)!r}, so that they "
            "can submit their work; delete that project tomorrow, or detach again then.",
            lambda: park(here, opened),
        )
    for version, count in sorted({**sizes, COARSE_COPY: studio.versions(here.id).get(COARSE_COPY, 0)}.items()):
        if count and version not in foreign:
            yield Undo(f"Delete {count} predictions of {version!r}.", partial(remove, here, version))


def remove(here: Attached, version: str) -> Iterator[str]:
    """Delete what is left of a version; of a large one a page of tasks at a time, so that people can go on."""
    studio, size = here.studio, here.studio.versions(here.id).get(version, 0)
    if size > AT_ONCE:
        ids = sorted(studio.tasks_with_version(here.id, version))
        for start in range(0, len(ids), PAGE):
            for task in studio.full_tasks(here.id, ids[start : start + PAGE]):
                for row in task.get("predictions") or []:
                    if row.get("model_version") == version:
                        studio.delete_prediction(int(row["id"]))
            yield f"  {min(start + PAGE, len(ids))} of {len(ids)} tasks"
    if size:
        studio.delete_version(here.id, version)


def open_predictions(here: Attached, sizes: Mapping[str, int]) -> Iterator[int]:
    """Ids of our prelabels on unlabelled tasks that were served in the last day, or that somebody has a draft of."""
    studio, since = here.studio, datetime.now(UTC) - OPEN
    served: set[int] = set()
    for version in sizes:
        if not version.startswith("first-row"):
            served |= studio.tasks_with_version(here.id, version)
    served |= studio.tasks_with_draft(here.id)
    if here.ours is not None and any(int(b["id"]) < int(here.ours["id"]) for b in studio.ml_backends(here.id)):
        served |= studio.head(here.id)  # served without asking us
    for task in studio.full_tasks(here.id, sorted(served)):
        if not task.get("is_labeled"):
            rows = [row for row in task.get("predictions") or [] if row.get("model_version") in sizes]
            if any(str(row.get("created_at", "")) >= since.strftime("%Y-%m-%dT%H:%M:%S") for row in rows):
                yield from (int(row["id"]) for row in rows if may_be_open(row))


def may_be_open(prediction: Row) -> bool:
    """Whether an editor may have begun from it: an old prelabel of ours is emptied, but its id still counts."""
    return bool(prediction.get("result")) or not str(prediction.get("model_version")).startswith("first-row")


def park(here: Attached, predictions: Sequence[int]) -> list[str]:
    """Move predictions to a project of their own; their ids stay, and with them what people have begun."""
    config = str(here.studio.project(here.id)["label_config"])
    made = int(here.studio.create_project(bin_title(here), config)["id"])
    [task] = here.studio.import_tasks(made, [dict.fromkeys(image_keys(here), "")])
    for prediction in predictions:
        here.studio.patch_prediction(prediction, task=task, project=made)
    return []


def image_keys(here: Attached) -> list[str]:
    """The keys that a task's data must have."""
    config = here.config
    return [config.image_key] if config else ["image"]


def bin_title(here: Attached) -> str:
    """Name of the project for prelabels that people may have open."""
    return f"First Row: open prelabels of project {here.id}"


def old_bins(here: Attached) -> list[Row]:
    """Such projects of former detaches that nobody needs any more."""
    limit = (datetime.now(UTC) - OPEN).strftime("%Y-%m-%dT%H:%M:%S")
    rows = here.studio.projects(bin_title(here))
    return [row for row in rows if row["title"] == bin_title(here) and str(row["created_at"]) < limit]


# Label config, settings, account


def undo_config(here: Attached) -> Iterator[Undo]:
    """Put the label config back: as it was, or, if somebody changed it since, without our control."""
    if not here.before:
        yield Undo("It was connected without `attach`: sampling and label config stay as they are.", list)
        return
    now, before = str(here.studio.project(here.id)["label_config"]), str(here.before["label_config"])
    wanted = before if config_digest(now) == here.note.get("config", "") else cleaned(now, before)
    if wanted != now:
        text = "Take the control for coarse labels out of the label config."
        yield Undo(text, lambda: restore_config(here, wanted))


def restore_config(here: Attached, wanted: str) -> Iterator[str]:
    """Set the label config, unless annotations need our control."""
    try:
        here.studio.patch_project(here.id, label_config=wanted)
    except LabelStudioError as error:
        if error.status != 400:
            raise
        yield "Kept the control for coarse labels: annotations use it (`--coarse file` saves and removes those)."


def cleaned(now: str, before: str) -> str:
    """A label config without our control; unchanged if the control was the team's own or the config is unreadable."""
    try:
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


def undo_keeper(here: Attached) -> Iterator[Undo]:
    """Delete the account that kept coarse labels, once it keeps none."""
    keeper = keeper_account(here.studio, here.id)
    if keeper:
        yield Undo(f"Delete the account {keeper_address(here.id)}.", lambda: delete_keeper(here, keeper))


def delete_keeper(here: Attached, keeper: int) -> Iterator[str]:
    """Delete the account, unless it still has annotations or we may not."""
    tasks = here.studio.full_tasks(here.id, [int(task["id"]) for task in here.answers])
    if any(author(row) == keeper for task in tasks for row in task.get("annotations") or []):
        yield "Kept the account: annotations are still handed to it; detach once more."
        return
    try:
        here.studio.delete_user(keeper)
    except LabelStudioError as error:
        if error.status != 403:
            raise
        yield "Kept the account: only the organisation's owner may delete it."


def one_by_one(tasks: Sequence[Row], change: Callable[[Row], str | None]) -> Iterator[str]:
    """Change one task after another; gives what there is to say of one, and how far it is."""
    for number, task in enumerate(tasks, 1):
        if said := change(task):
            yield said
        if number % PAGE == 0:
            yield f"  {number} of {len(tasks)} tasks"
