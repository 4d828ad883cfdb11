"""Label Studio -> index: which tasks there are, and what people said about each."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.coarse_answers import (
    COARSE_COPY,
    LABELS,
    OWN_SKIPS,
    SKIPS,
    active,
    aside_since,
    copies_of,
    copy_of,
    digest,
    fine_classes,
    give_back,
    held,
    is_cluster,
    is_served,
    kind_of,
    labels_of,
    left_as,
    may_be_set_aside,
    original_of,
    record_of,
    said_since,
    uncopied,
    votes_of,
    was_asked,
)
from backend.connection import HIGHEST, OURS, keeper_account, need_backend, note_of, write_note
from backend.connection import digest as config_digest
from backend.context import Context
from backend.errors import LabelStudioError, MaskError, StartAnew
from backend.faults import noted
from backend.label_config import LABELS_NOTED, MIXED_LABEL, ProjectConfig, is_mixed, parse
from backend.labelstudio import Row
from backend.own_updates import change, put_back, refuse_drafted
from backend.project import Index, Project, Stage, TaskRecord, deleted_tasks
from backend.regions import UNLABELLED, to_mask
from model.classes import IGNORE, MIXED, UNKNOWN

log = logging.getLogger(__name__)

#: With more changed tasks than this, one listing of the project is cheaper than asking task by task.
FEW = 50

Source = dict[str, Any] | None


def refresh_config(ctx: Context, project: Project, save: bool = True) -> ProjectConfig:
    """Read the label config, and what `attach` recorded, from Label Studio into the store.

    What `attach` has not written down of the labels the first round does, and the label for background once there is
    one: only so can be told later which labels were renamed or are gone.

    Args:
        ctx: the doors.
        project: whose config it is.
        save: False while a round runs: it goes on with the config that it began with, or starts anew.

    Raises:
        ConfigError: it cannot be used.
        NotAttached: there is no ML backend of ours; what the store has of its note stays, for a detach.
    """
    seen = ctx.studio.some_settings(project.id, "label_config", "skip_queue")
    ours = need_backend(ctx.studio, project.id, ctx.settings)
    names = [str(ours["title"]), *ctx.studio.versions(project.id)]
    rounds = [int(name.rpartition("-")[2]) for name in names if OURS.fullmatch(name)]
    highest = max((number for number in rounds if number <= HIGHEST), default=0)
    extra = {"round": highest, "since": ours["created_at"], "skips": seen["skip_queue"]}
    note = {**note_of(ours), **extra}
    note["keeper"] = note.get("keeper") or keeper_account(ctx.studio, project.id)
    config = parse(seen["label_config"], recorded=note)
    if save and (not note.keys() >= LABELS_NOTED or (config.background and not note["background"])):
        said = config.note(note)
        write_note(ctx.studio, project.id, ctx.settings, {**note_of(ours), **said})
        note |= said
        config = parse(seen["label_config"], recorded=note)
    if save:
        before = project.extra()
        project.save_config(seen["label_config"], note)
        if any(before.get(name) != note.get(name) for name in ("keeper", "skips")):  # others can be, or stay, set aside
            rows = project.index().values()
            ctx.board.remember(project.id, [r.id for r in rows if r.stage in ("coarse", "returned")])
    return config


def check_config(ctx: Context, project: Project) -> Row:
    """Look whether the label config, and what becomes of skipped tasks, still is what this round began with.

    Returns:
        Both as they are, and `model_version`, the version of predictions in force.

    Raises:
        StartAnew: it is not.
    """
    now = ctx.studio.some_settings(project.id, "label_config", "skip_queue", "model_version")
    if config_digest(str(now["label_config"])) != config_digest(project.label_config()):
        raise StartAnew("the label config was changed during the round: it starts anew")
    if now["skip_queue"] != project.extra().get("skips"):
        raise StartAnew("what becomes of skipped tasks was changed during the round: it starts anew")
    return now


def sync(ctx: Context, project: Project, config: ProjectConfig) -> tuple[Index, set[int]]:
    """Bring the index up to date with what the events told.

    Returns:
        The index (tasks known so far), and the ids whose labels must be read anew.
    """
    changed, deleted = ctx.board.take(project.id)
    index = project.index()
    changed |= deleted_tasks(index, deleted)
    stale = project.index_meaning() != config.meaning
    if stale:
        changed |= {record.id for record in index.values() if record.stage != "new"}  # their labels mean something else
    if index and not stale and len(changed) <= FEW:
        return index, changed
    index, read = listing(ctx, project, config, index)
    return index, read | (changed & index.keys())


def listing(ctx: Context, project: Project, config: ProjectConfig, index: Index) -> tuple[Index, set[int]]:
    """Compare the index with a listing of the project.

    Returns:
        The index without tasks that are gone and with those that are new, and the ids whose labels must be read.
    """
    aside: set[int] = set()
    if not index:  # tasks without an annotation that counts, which are read all the same
        keeper = int(project.extra().get("keeper", 0))
        aside = ctx.studio.tasks_with_version(project.id, COARSE_COPY)
        aside |= ctx.studio.tasks_annotated_by(project.id, keeper) if keeper else set()
    fresh: Index = {}
    read: set[int] = set()
    for row in ctx.studio.tasks(project.id):
        old, image = index.get(row["id"]), image_value(row, config)
        another = old is not None and old.image != image
        if old is not None and another:
            old = replace(old, image=image, size=(0, 0), error="", clusters="", counts=())
        anew = differs(row, old) or row["id"] in aside
        known = bool(index) or not anew
        fresh[row["id"]] = old or TaskRecord(row["id"], image, row.get("updated_at", ""), known=known)
        if another or anew:
            read.add(row["id"])
    return fresh, read


def differs(row: Mapping[str, Any], old: TaskRecord | None) -> bool:
    """Whether a light row of the listing shows that a person's work on the task has changed."""
    annotations = int(row.get("total_annotations") or 0)
    if old is None:
        return annotations > 0
    later = str(row.get("updated_at", "")) != old.updated_at
    if old.error:  # what Label Studio cannot show has annotations that we know nothing of
        return later
    return bool(annotations) != old.annotated or (later and (annotations > 0 or old.stage == "returned"))


def image_value(row: Mapping[str, Any], config: ProjectConfig) -> str:
    """The task's image: the value of the config's key, or of the only key of an uploaded file."""
    data = row.get("data") or {}
    value = data.get(config.image_key, data.get("$undefined$", ""))
    return value if isinstance(value, str) else ""


def read_task(ctx: Context, project: Project, config: ProjectConfig, record: TaskRecord) -> TaskRecord | None:
    """Read a task and a person's labels of it from Label Studio; masks go to the store.

    Returns:
        The new record, or None when the task is gone. A fault of this task alone is left in `record.error`.

    Raises:
        LabelStudioError: what Label Studio answered about the task itself.
    """
    try:
        task = ctx.studio.task(record.id, project.id)
    except LabelStudioError as error:
        if error.status == 404:
            return None
        raise
    check_results(task)
    task = return_what_changed(ctx, project, task)
    since = "" if record.known else str(project.extra().get("since", ""))
    asked = record.asked or was_asked(task, config, OURS, since)
    changed, image = task.get("updated_at", ""), image_value(task, config)
    fresh: dict[str, Any] = {"image": image, "updated_at": changed, "error": "", "lost": ()}
    tries = record.tries if changed == record.updated_at else 0
    if image != record.image:
        fresh |= {"size": (0, 0), "clusters": "", "counts": ()}
    record = replace(record, **fresh, coarse=False, asked=asked, known=True, tries=tries)
    record = replace(record, **vars_of_labels(project, task, config, asked))
    try:
        return read_masks(ctx, project, config, record, task)
    except Exception as error:
        return noted(ctx.studio, project.id, record, error)


def check_results(task: Mapping[str, Any]) -> None:
    """Refuse annotations that are not lists of regions, as a program may have written them.

    Raises:
        MaskError: naming the annotation.
    """
    for source in task.get("annotations") or []:
        result = source.get("result") or []
        if not isinstance(result, list) or not all(isinstance(region, dict) for region in result):
            raise MaskError(
                f"task {task['id']}, annotation {source.get('id')} is not a list of regions: delete it in Label Studio"
            )


def return_what_changed(ctx: Context, project: Project, task: dict[str, Any]) -> dict[str, Any]:
    """Give a coarse answer back that its author has changed after it was set aside, for example in an open editor.

    A copy that somebody has deleted is made again from what the store keeps, and that from the copy; where there is
    neither, the answer counts again as it is. So does one whose task Label Studio would not serve: what becomes of
    skipped tasks can be changed.

    Returns:
        The task as it is then.

    Raises:
        InUseError: somebody has a draft of what would be changed.
    """
    extra = project.extra()
    keeper, skips, changed = int(extra.get("keeper", 0)), str(extra.get("skips")), put_back(ctx, project.id, task)
    if changed:
        task = ctx.studio.task(task["id"], project.id)
    for row in uncopied(task, keeper):
        record = project.coarse_answer(row["id"])
        given = record.get("annotation")
        if given is None and keeper != keeper_account(ctx.studio, project.id):
            continue  # the keeper is a person, whose own skips these may be
        if given is not None and digest(given) == digest(row):
            aside = str(record.get("aside") or given["updated_at"])
            ctx.studio.create_prediction(task["id"], copy_of(given, aside), COARSE_COPY)
        else:
            restore(ctx, project, row, given or {})
        changed = True
    latest = {original_of(copy).get("id"): copy for copy in copies_of(task)}  # of each annotation, the last copy
    ours = [(mine, original_of(copy)) for copy in latest.values() if (mine := held(task, copy, keeper)) is not None]
    for row, original in ours:
        keep_record(project, row, original, aside_since(latest[row["id"]]))
    stay = [row for row, original in ours if row["was_cancelled"] and digest(row) == digest(original)]
    if not active(task) and not is_served(task, stay, skips):
        stay = []
    for row, original in ours:
        if row in stay:
            changed |= serve_again(ctx, project, row, skips)
        else:
            restore(ctx, project, row, original)
            delete_copies(ctx, task, row["id"])
            changed = True
    return ctx.studio.task(task["id"], project.id) if changed else task


def serve_again(ctx: Context, project: Project, annotation: dict[str, Any], skips: str) -> bool:
    """Mark an answer that is set aside as ground truth, where Label Studio serves its task again only then.

    Returns:
        Whether it was not marked before.
    """
    if annotation["ground_truth"] or skips != OWN_SKIPS:
        return False
    what = f"task {annotation['task']} is to be served again without annotation {annotation['id']}"
    refuse_drafted(ctx, annotation["task"], [annotation], what)
    now = left_as(change(ctx, project.id, annotation, **SKIPS[skips]))
    record = project.coarse_answer(annotation["id"])
    if annotation["updated_at"] != record["left"]["updated_at"]:  # a person has touched it: that must still show
        now["updated_at"] = record["left"]["updated_at"]
    project.store.write_json(project.coarse_answer_key(annotation["id"]), {**record, "left": now})
    return True


def keep_record(project: Project, annotation: Row, original: Row, aside: str) -> None:
    """Have the store keep an answer that is set aside, where what it keeps is gone, damaged, or less than it could be.

    Args:
        project: the store's.
        annotation: the answer as it is now.
        original: as it was given.
        aside: when it was set aside, in Label Studio's time.
    """
    if "left" not in project.coarse_answer(annotation["id"]):
        record = record_of(annotation["task"], original, aside, annotation)
        project.store.write_json(project.coarse_answer_key(annotation["id"]), record)


def delete_copies(ctx: Context, task: dict[str, Any], annotation: int) -> None:
    """Delete the copies of an annotation that is its author's again."""
    for copy in copies_of(task):
        if original_of(copy).get("id") == annotation:
            ctx.studio.delete_prediction(copy["id"])


def restore(ctx: Context, project: Project, annotation: dict[str, Any], original: dict[str, Any]) -> None:
    """Give an annotation back to its author.

    Raises:
        InUseError: somebody has a draft of it.
    """
    number = annotation["id"]
    what = f"annotation {number} was changed after it was set aside and is to be given back"
    refuse_drafted(ctx, annotation["task"], [annotation], what)
    log.info("project %d, task %s, annotation %d was changed: given back", project.id, annotation.get("task"), number)
    said = said_since(annotation, original, project.coarse_answer(number).get("left") or {})
    if not give_back(ctx.studio, number, original, partial(change, ctx, project.id, annotation), **said):
        log.warning("project %d, annotation %d: the account of its author is gone", project.id, number)


def vars_of_labels(project: Project, task: Mapping[str, Any], config: ProjectConfig, asked: bool) -> dict[str, Any]:
    """Stage, annotation id, version, and whether it may be set aside, of a task by its annotations and predictions."""
    stage, annotation, copy = stage_of(task, config, asked)
    sources = [f"{s['id']}:{s.get('updated_at') or s.get('created_at')}" for s in (annotation, copy) if s]
    named = ",".join([*sources, config.meaning, image_value(task, config)])
    version = hashlib.sha1(named.encode("utf-8", "surrogatepass")).hexdigest()[:12] if sources else ""
    extra = project.extra()
    since, keeper = str(extra.get("since", "")), int(extra.get("keeper", 0))
    rows = active(dict(task))
    free = all(may_be_set_aside(dict(task), row, config, since, keeper) for row in rows)
    callable_ = asked and bool(rows) and free and is_served(dict(task), rows, str(extra.get("skips")))
    return {
        "stage": stage,
        "annotation": annotation["id"] if annotation else 0,
        "version": version,
        "callable": callable_,
    }


def stage_of(task: Mapping[str, Any], config: ProjectConfig, asked: bool) -> tuple[Stage, Source, Source]:
    """The stage of a task, its annotation in force, and the kept copy of its coarse labels.

    The newest full segmentation wins, then the newest coarse answer. Skipped (cancelled) annotations say nothing about
    the image. What was made after a coarse answer was set aside is no answer to clusters.
    """
    copies = copies_of(dict(task))
    copy = copies[-1] if copies else None
    later = aside_since(copy) if copy else "never"
    kinds = [(kind_of(a, config, asked and str(a.get("created_at")) < later), a) for a in active(dict(task))]
    for stage in ("full", "coarse", "other"):
        for kind, annotation in kinds:
            if kind == stage:
                return stage, annotation, copy
    return ("returned" if copy else "new"), None, copy


def read_masks(
    ctx: Context, project: Project, config: ProjectConfig, record: TaskRecord, task: Mapping[str, Any]
) -> TaskRecord:
    """Write the task's coarse mask and annotation mask to the store, at work resolution."""
    stage, annotation, copy = stage_of(task, config, record.asked)
    if annotation is None and copy is None:
        return record
    image, size = ctx.images(project.id).get(project.id, record.id, record.image)
    record, work = replace(record, size=size), (image.shape[1], image.shape[0])
    if annotation is not None and stage == "full":
        result = checked(annotation, size)
        project.save_labels(record.id, fine_mask(result, config, work), config)
        record = replace(record, lost=lost_labels(result, config))
    for source in filter(None, (annotation, copy)):
        result = checked(source, size)
        coarse = coarse_mask(result, config, work)
        if coarse is not None:
            project.save_own_coarse(record.id, coarse, config)
            return replace(record, coarse=True, lost=tuple(sorted({*record.lost, *lost_classes(result, config)})))
    return record


def lost_labels(result: Sequence[Mapping[str, Any]], config: ProjectConfig) -> tuple[str, ...]:
    """Labels of drawn regions that are not in the label config any more, by name."""
    drawn = [r for r in result if r.get("from_name") == config.fine.name and not is_cluster(r)]
    return tuple(sorted(labels_of(drawn) - set(config.fine.labels)))


def lost_classes(result: Sequence[Mapping[str, Any]], config: ProjectConfig) -> set[str]:
    """Fine classes that coarse answers allow and that are not in the label config any more."""
    allowed = [fine_classes(region, config) for region in votes_of(result, config)]
    return set[str]().union(*allowed) - set(config.classes.fine)


def checked(source: Mapping[str, Any], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The regions of an annotation or copy, all drawn on an image of this size.

    Raises:
        MaskError: naming the region and both sizes.
    """
    result: list[dict[str, Any]] = source.get("result") or []
    for region in result:
        drawn = (region.get("original_width"), region.get("original_height"))
        if None not in drawn and drawn != size:
            raise MaskError(
                f"region {region.get('id')} was drawn on an image of {drawn[0]}x{drawn[1]} pixels, but the task's "
                f"image has {size[0]}x{size[1]}: restore the image it was drawn on, or delete the annotation"
            )
    return result


def fine_mask(result: list[dict[str, Any]], config: ProjectConfig, work: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) fine class of every pixel; pixels without a region are the implicit background, or IGNORE.

    Clusters are coarse answers even with a fine label: their pixels are IGNORE where nothing was drawn. So are pixels
    of a region whose label is gone.
    """
    drawn = [region for region in result if not is_cluster(region)]
    mask = to_mask(drawn, config.fine, work, config.fine.labels)
    slips = [region for region in result if is_cluster(region)]
    of_clusters = to_mask(slips, config.fine, work, config.fine.labels) != UNLABELLED
    order = np.full(256, IGNORE, np.uint8)
    for position, label in enumerate(config.fine.labels):
        order[position] = config.classes.fine.index(label)
    order[UNLABELLED] = 0 if config.background == "" else IGNORE
    return np.where(of_clusters & (mask == UNLABELLED), IGNORE, order[mask]).astype(np.uint8)


def coarse_mask(result: list[dict[str, Any]], config: ProjectConfig, work: tuple[int, int]) -> NDArray[np.uint8] | None:
    """(H, W) coarse class, MIXED or UNKNOWN; None without a coarse answer.

    A cluster is an answer whatever label it carries: a fine one stands for its coarse class. A coarse label means the
    fine classes that it meant when it was given: UNKNOWN where one of them is gone, or they are in several coarse
    classes by now.
    """
    votes = [in_todays_words(region, config) for region in votes_of(result, config)]
    if not votes:
        return None
    found: NDArray[np.uint8] = np.full((work[1], work[0]), UNKNOWN, np.uint8)
    names = [*config.classes.coarse, MIXED_LABEL]
    order = np.full(256, UNKNOWN, np.uint8)
    order[: len(names)] = [*range(len(config.classes.coarse)), MIXED]
    for control in filter(None, (config.coarse, config.fine)):
        mask = to_mask(votes, control, work, names)
        found = np.where(mask == UNLABELLED, found, order[mask]).astype(np.uint8)
    return found


def in_todays_words(region: Mapping[str, Any], config: ProjectConfig) -> Mapping[str, Any]:
    """A coarse answer whose label is the coarse class of today that it stands for, Mixed, or none of them."""
    labels = labels_of([region])
    if len(labels) != 1:
        return region  # `to_mask` says what is wrong with it
    [label] = labels
    coarse = config.coarse_of(fine_classes(region, config))
    mixed = region.get("from_name") != config.fine.name and is_mixed(label)
    name = config.classes.coarse[coarse] if coarse is not None else MIXED_LABEL if mixed else ""
    return {**region, "value": {kind: [name] if kind in LABELS else it for kind, it in region["value"].items()}}
