"""What the instant learner needs of a task: features of its image, and the pixels that its label teaches with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.comparison import compare
from backend.context import Context
from backend.enqueue import progress
from backend.errors import ImageFetchError, MaskError
from backend.faults import concerns_all, noted
from backend.features import Fit, extractor, finite, held, load_fit, write_pack
from backend.fine_tuning import unseen_mask
from backend.head import Model, keep_pixels, lacks_pixels, load_model, test_before_learning
from backend.label_config import ProjectConfig
from backend.learn import curve_row
from backend.masks import maps_of
from backend.prepare import check_shape
from backend.project import Project, TaskRecord
from model.pixel_pool import pool_pixels

log = logging.getLogger(__name__)
Row = dict[str, Any]
#: A task and its image.
Picture = tuple[TaskRecord, NDArray[np.uint8]]


def measure(
    ctx: Context,
    project: Project,
    config: ProjectConfig,
    records: Sequence[TaskRecord | None],
    number: int,
    shard: int,
) -> list[TaskRecord | None]:
    """Compute what these tasks lack, and test the model in force on labels that it has not seen.

    Args:
        ctx: the doors.
        project: which project.
        config: its label config.
        records: tasks; None for one that is gone.
        number: of the round.
        shard: of the round; rows of the learning curve wait under its name for `test_then_train`.

    Returns:
        The records, with the error of a task whose image cannot be had.

    Raises:
        Exception: what is no single task's fault, as when the network fails at every image.
    """
    fit, index = load_fit(project), {record.id: record for record in records if record and not record.error}
    there = held(ctx, project, fit, index).places if fit else {}
    wanted = [r for r in index.values() if r.id not in there and (r.in_pool or r.labelled)]
    faulty = add_features(ctx, project, fit, wanted)
    if fit is None:  # of no image: the faults say why
        return [record and faulty.get(record.id, record) for record in records]
    unlearnt = lacks_pixels(project, fit, index)
    rows, model = list[Row](), load_model(project) if unlearnt else None
    for task in sorted(unlearnt - faulty.keys()):
        try:
            rows += add_label(ctx, project, config, fit, model, index[task])
        except Exception as error:
            if not isinstance(error, ImageFetchError | MaskError) and not sees(ctx, fit):
                raise
            faulty[task] = noted(ctx.studio, project.id, index[task], error)
    if rows:
        project.store.write_json(project.key("prepared", number, f"curve-{shard}.json"), rows)
    return [record and faulty.get(record.id, record) for record in records]


def add_features(
    ctx: Context, project: Project, fit: Fit | None, records: Sequence[TaskRecord]
) -> dict[int, TaskRecord]:
    """Compute features of images and keep them as a pack, where it is known how they are scaled.

    Returns:
        The records of those that cannot be had, with the error of each.

    Raises:
        Exception: what is no single image's fault, as when the network fails at every image.
    """
    pictures, faulty = list[Picture](), dict[int, TaskRecord]()
    for record in records:
        try:
            pictures.append((record, ctx.images(project.id).get(project.id, record.id, record.image)[0]))
        except Exception as error:
            faulty[record.id] = noted(ctx.studio, project.id, record, error)
    found = features_of(ctx, project, fit, pictures, faulty)
    if found and fit:
        ctx.board.go_on(project.id)
        write_pack(ctx, project, fit, [record for record, _ in found], torch.stack([seen for _, seen in found]))
    return faulty


def features_of(
    ctx: Context, project: Project, fit: Fit | None, pictures: Sequence[Picture], faulty: dict[int, TaskRecord]
) -> list[tuple[TaskRecord, Tensor]]:
    """Features of these pictures: of all together or, where that fails, of one after the other.

    The records of those that fail are added to `faulty`, with the error of each.
    """
    records, found = [record for record, _ in pictures], list[tuple[TaskRecord, Tensor]]()
    try:
        return list(zip(records, features(ctx, fit, [image for _, image in pictures]), strict=True))
    except Exception as error:
        if concerns_all(error, ctx.studio):
            raise
        log.warning("project %d: one of %d pictures fails, each is seen alone: %s", project.id, len(pictures), error)
    for record, image in pictures:
        try:
            found += zip([record], features(ctx, fit, [image]), strict=True)
        except Exception as error:
            if not sees(ctx, fit):
                raise
            faulty[record.id] = noted(ctx.studio, project.id, record, error)
    return found


def features(ctx: Context, fit: Fit | None, images: Sequence[NDArray[np.uint8]]) -> Iterator[Tensor]:
    """(P, D) features of each image in half precision, scaled where it is known how.

    Raises:
        FeatureError: they are not finite.
    """
    pixels = [pool_pixels(image) for image in images]
    for done, raw in enumerate(extractor(ctx.settings.network)[0].sample(images, pixels), 1):
        yield finite((fit.scaling(raw) if fit else raw).half())
        progress(done, len(images))


def sees(ctx: Context, fit: Fit | None) -> bool:
    """Whether features can be computed of a plain image as large as any; if not, a failure is no picture's own."""
    side = ctx.settings.image_size
    try:
        return len(list(features(ctx, fit, [np.zeros((side, side, 3), np.uint8)]))) == 1
    except Exception as error:
        log.warning("the network fails at a plain image, too: %s", error)
        return False


def add_label(
    ctx: Context, project: Project, config: ProjectConfig, fit: Fit, model: Model | None, record: TaskRecord
) -> list[Row]:
    """Keep the pixels that a label teaches with; gives the row of the learning curve, if there is one.

    Raises:
        MaskError: the label is of an image of another shape.
    """
    mask = project.labels(record.id, config)
    if mask is None:
        return []  # lost: it is read again
    maps = maps_of(ctx, project, record.id, record.image, fit)
    check_shape(record, mask, maps.size)
    row = None
    if model is not None and model.learnt is not None:
        row = test_before_learning(model, record, maps, fit, mask, config.classes)
        if row and (seen := unseen_mask(project, record.id, config.classes)):
            row["network"] = curve_row(record.id, *seen, mask, config.classes)
    keep_pixels(project, config, fit, record, maps, mask)
    return [row] if row else []


def test_then_train(project: Project, number: int) -> None:
    """Take the rows of the learning curve in that this round has measured."""
    keys = [key for key in project.store.list(project.key("prepared", number)) if "/curve-" in key]
    rows = [row for key in keys for row in project.store.read_json(key) or []]
    if rows:
        curve = project.store.read_json(project.key("curve.json")) or []
        have = {(row["task"], row["model"]) for row in curve}
        curve += [row for row in rows if (row["task"], row["model"]) not in have]
        project.store.write_json(project.key("curve.json"), curve)
        compare(project, curve)
