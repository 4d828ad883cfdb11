"""Masks by the project's head of the tasks that people get next, in the store, for prelabels."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import torch

from backend.context import Context
from backend.faults import concerns_all
from backend.features import Fit, extractor, image_digest
from backend.head import Model
from backend.project import HEAD_MASKS, Index, Project
from model.features import Maps
from model.masks import predict

log = logging.getLogger(__name__)

#: Images after the backbone that this process keeps, of the tasks that people get next; 4 MB each at 640 x 480.
KEPT = 16
_maps: OrderedDict[tuple[str, int, int, str], Maps] = OrderedDict()


def show_masks(ctx: Context, project: Project, index: Index, fit: Fit, model: Model, tasks: Iterable[int]) -> bool:
    """Have the store hold a mask by the model in force of each of these tasks; one that fails costs only itself.

    Returns:
        Whether one had to be made.
    """
    if model.head is None:
        return False
    made = False
    known = dict(project.store.read_json(project.key("masks.json")) or {})
    shown = {task: said for task, said in known.items() if int(task) in index}
    name = f"{model.version} {fit.version}"
    for task in tasks:
        record = index[task]
        said = f"{name} {image_digest(record, ctx.settings.image_size)}"
        there = project.store.exists(project.prediction_key(HEAD_MASKS, task))
        if record.error or (shown.get(str(task)) == said and there):
            continue
        try:
            mask, sure = predict(maps_of(ctx, project, record.id, record.image, fit), fit.scaling, model.head)
        except Exception as error:
            if concerns_all(error, ctx.studio):
                raise
            log.warning("project %d, task %d gets no prelabel: %s", project.id, task, error)
            continue
        ctx.board.go_on(project.id)
        project.save_prediction(HEAD_MASKS, task, mask, sure, model.head.classes)
        shown[str(task)] = said
        project.store.write_json(project.key("masks.json"), shown)
        made = True
    return made


def maps_of(ctx: Context, project: Project, task: int, image: str, fit: Fit) -> Maps:
    """A task's image after the backbone, from this process's memory if it has it."""
    place = (project.store.url, project.id, task, f"{ctx.settings.image_size} {fit.network} {image}")
    if place not in _maps:
        pixels, _ = ctx.images(project.id).get(project.id, task, image)
        remember(place, extractor(ctx.settings.network)[0].maps([np.ascontiguousarray(pixels)]))
    _maps.move_to_end(place)
    kept = _maps[place]
    return Maps(tuple(stage.float() for stage in kept.stages), kept.images)


def remember(place: tuple[str, int, int, str], maps: Maps) -> None:
    """Keep an image after the backbone in half precision; the longest unused one makes room."""
    with torch.inference_mode():
        _maps[place] = Maps(tuple(stage.half() for stage in maps.stages), maps.images)
    while len(_maps) > KEPT:
        _maps.popitem(last=False)
