"""What the instant learner needs of a task: features of its image, and the pixels that its label teaches with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend.context import Context
from backend.enqueue import progress
from backend.faults import noted
from backend.features import Fit, extractor, held, load_fit, write_pack
from backend.head import Model, keep_pixels, lacks_pixels, load_model, test_before_learning
from backend.label_config import ProjectConfig
from backend.masks import maps_of
from backend.prepare import check_shape
from backend.project import Project, TaskRecord
from model.pixel_pool import pool_pixels

Row = dict[str, Any]


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
    """
    if (fit := load_fit(project)) is None:
        return list(records)
    index = {record.id: record for record in records if record and not record.error}
    there, unlearnt = held(ctx, project, fit, index).places, lacks_pixels(project, fit, index)
    wanted = [r for r in index.values() if r.id not in there and (r.in_pool or r.labelled)]
    faulty = add_features(ctx, project, fit, wanted)
    rows, model = list[Row](), load_model(project) if unlearnt else None
    for task in sorted(unlearnt - faulty.keys()):
        try:
            rows += add_label(ctx, project, config, fit, model, index[task])
        except Exception as error:
            faulty[task] = noted(ctx.studio, project.id, index[task], error)
    if rows:
        project.store.write_json(project.key("prepared", number, f"curve-{shard}.json"), rows)
    return [record and faulty.get(record.id, record) for record in records]


def add_features(ctx: Context, project: Project, fit: Fit, records: Sequence[TaskRecord]) -> dict[int, TaskRecord]:
    """Compute features of images and keep them as a pack; gives the records of those that cannot be had."""
    images, usable, faulty = list[NDArray[np.uint8]](), list[TaskRecord](), dict[int, TaskRecord]()
    for record in records:
        try:
            images.append(ctx.images(project.id).get(project.id, record.id, record.image)[0])
            usable.append(record)
        except Exception as error:
            faulty[record.id] = noted(ctx.studio, project.id, record, error)
    found = []
    for features in extractor(ctx.settings.network)[0].sample(images, [pool_pixels(image) for image in images]):
        found.append(fit.scaling(features).half())
        progress(len(found), len(images))
    if found:
        ctx.board.go_on(project.id)
        write_pack(ctx, project, fit, usable, torch.stack(found))
    return faulty


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
