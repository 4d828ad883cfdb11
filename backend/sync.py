"""Label Studio -> index: which tasks there are, and what people said about each."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.connection import OURS, note_of, our_backend
from backend.context import Context
from backend.errors import ImageFetchError, LabelStudioError, MaskError
from backend.label_config import Control, ProjectConfig
from backend.project import (
    COARSE_COPY,
    Index,
    Project,
    TaskRecord,
    deleted_tasks,
    with_error,
)
from backend.regions import UNLABELLED, to_mask
from model.classes import IGNORE, MIXED, UNKNOWN

log = logging.getLogger(__name__)

#: With more changed tasks than this, one listing of the project is cheaper than asking task by task.
FEW = 50

Source = dict[str, Any] | None


def refresh_config(ctx: Context, project: Project) -> ProjectConfig:
    """Read the label config, and what `attach` recorded, from Label Studio into the store."""
    seen = ctx.studio.project(project.id)
    ours = our_backend(ctx.studio, project.id, ctx.settings)
    names = [(ours or {}).get("title", ""), *ctx.studio.versions(project.id)]
    rounds = [int(name.rpartition("-")[2]) for name in names if OURS.fullmatch(name)]
    project.save_config(seen["label_config"], {**note_of(ours), "round": max(rounds, default=0)})
    return project.config()


def sync(ctx: Context, project: Project, config: ProjectConfig) -> tuple[Index, set[int]]:
    """Bring the index up to date with what the events told.

    Returns:
        The index (tasks known so far), and the ids whose labels must be read anew.
    """
    changed, deleted = ctx.board.take(project.id)
    index = project.index()
    changed |= deleted_tasks(index, deleted)
    if index and len(changed) <= FEW:
        return index, changed
    return listing(ctx, project, config, index)


def listing(ctx: Context, project: Project, config: ProjectConfig, index: Index) -> tuple[Index, set[int]]:
    """Compare the index with a listing of the project.

    Returns:
        The index without tasks that are gone and with those that are new, and the ids whose labels must be read.
    """
    copies = ctx.studio.tasks_with_version(project.id, COARSE_COPY) if not index else set()
    fresh: Index = {}
    read: set[int] = set()
    for row in ctx.studio.tasks(project.id):
        old = index.get(row["id"])
        fresh[row["id"]] = old or TaskRecord(row["id"], image_value(row, config), row.get("updated_at", ""))
        if differs(row, old) or row["id"] in copies:
            read.add(row["id"])
    return fresh, read


def differs(row: Mapping[str, Any], old: TaskRecord | None) -> bool:
    """Whether a light row of the listing shows that a person's work on the task has changed."""
    annotations = int(row.get("total_annotations") or 0)
    if old is None:
        return annotations > 0
    if annotations != int(old.stage in ("coarse", "full")):
        return True
    return bool(annotations > 0 or old.error) and row.get("updated_at", "") != old.updated_at


def image_value(row: Mapping[str, Any], config: ProjectConfig) -> str:
    """The task's image: the value of the config's key, or of the only key of an uploaded file."""
    data = row.get("data") or {}
    value = data.get(config.image_key, data.get("$undefined$", ""))
    return value if isinstance(value, str) else ""


def read_task(ctx: Context, project: Project, config: ProjectConfig, record: TaskRecord) -> TaskRecord | None:
    """Read a task and a person's labels of it from Label Studio; masks go to the store.

    Returns:
        The new record, or None when the task is gone. A fault of this task alone is left in `record.error`.
    """
    try:
        task = ctx.studio.task(record.id, project.id)
    except LabelStudioError as error:
        if error.status == 404:
            return None
        raise
    record = replace(
        record, image=image_value(task, config), updated_at=task.get("updated_at", ""), error="", coarse=False
    )
    record = replace(record, **vars_of_labels(task, config))
    try:
        return read_masks(ctx, project, config, record, task)
    except (ImageFetchError, MaskError) as error:
        log.warning("project %d, task %d: %s", project.id, record.id, error)
        return with_error(record, error)


def vars_of_labels(task: Mapping[str, Any], config: ProjectConfig) -> dict[str, Any]:
    """Stage, annotation id and version of a task, from its annotations and predictions."""
    stage, annotation, copy = stage_of(task, config)
    said = [f"{s['id']}:{s.get('updated_at') or s.get('created_at')}" for s in (annotation, copy) if s]
    version = hashlib.sha1(",".join(said).encode()).hexdigest()[:12] if said else ""
    return {"stage": stage, "annotation": annotation["id"] if annotation else 0, "version": version}


def stage_of(task: Mapping[str, Any], config: ProjectConfig) -> tuple[str, Source, Source]:
    """The stage of a task, its annotation in force, and the kept copy of its coarse labels.

    The newest annotation that uses the fine control wins; an empty one counts as full only where pixels without
    a region have a meaning. Skipped (cancelled) annotations say nothing about the image.
    """
    copies = [p for p in task.get("predictions") or [] if p.get("model_version") == COARSE_COPY]
    copy = max(copies, key=lambda p: int(p["id"])) if copies else None
    done = [a for a in task.get("annotations") or [] if not a.get("was_cancelled")]
    done.sort(key=lambda a: str(a.get("updated_at", "")), reverse=True)
    for annotation in done:
        if uses(annotation, config.fine) or (not annotation.get("result") and config.background == ""):
            return "full", annotation, copy
    if done:
        return "coarse", done[0], copy
    return ("returned" if copy else "new"), None, copy


def uses(annotation: Mapping[str, Any], control: Control | None) -> bool:
    """Whether an annotation has a region of this control."""
    return control is not None and any(r.get("from_name") == control.name for r in annotation.get("result") or [])


def read_masks(
    ctx: Context, project: Project, config: ProjectConfig, record: TaskRecord, task: Mapping[str, Any]
) -> TaskRecord:
    """Write the task's coarse mask and annotation mask to the store, at work resolution."""
    stage, annotation, copy = stage_of(task, config)
    if annotation is None and copy is None:
        return record
    image, size = ctx.images(project.id).get(project.id, record.id, record.image)
    record, work = replace(record, size=size), (image.shape[1], image.shape[0])
    if annotation is not None and stage == "full":
        project.store.write_map(project.label_key(record.id), fine_mask(checked(annotation, size), config, work))
    for source in filter(None, (annotation, copy)):
        coarse = coarse_mask(checked(source, size), config, work)
        if coarse is not None:
            project.store.write_map(project.coarse_key(record.id), coarse)
            return replace(record, coarse=True)
    return record


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
    """(H, W) fine class of every pixel; pixels without a region are the implicit background, or IGNORE."""
    mask = to_mask(result, config.fine, work, config.fine.labels)
    order = np.full(256, IGNORE, np.uint8)
    for position, label in enumerate(config.fine.labels):
        order[position] = config.classes.fine.index(label)
    order[UNLABELLED] = 0 if config.background == "" else IGNORE
    return order[mask]


def coarse_mask(result: list[dict[str, Any]], config: ProjectConfig, work: tuple[int, int]) -> NDArray[np.uint8] | None:
    """(H, W) coarse class, MIXED or UNKNOWN; None when no region of the coarse control is there."""
    control = config.coarse
    if control is None or not any(r.get("from_name") == control.name for r in result):
        return None
    order = np.full(256, UNKNOWN, np.uint8)
    for position, label in enumerate(control.labels):
        known = label in config.classes.coarse
        order[position] = config.classes.coarse.index(label) if known else MIXED
    return order[to_mask(result, control, work, control.labels)]
