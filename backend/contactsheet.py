"""What the loop saw of each image, on one page: image, clusters, pseudo ground truth, why it is here, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.context import Context
from backend.features import load_fit
from backend.label_config import ProjectConfig
from backend.learn import network_key
from backend.masks import maps_of
from backend.model_in_force import model_in_force
from backend.prepare import clusters_name, target_of
from backend.project import Project, TaskRecord
from backend.score import scorer
from model.network import device
from model.pictures import Picture, heat, paint, palette, sheet
from model.pixel_pool import kind_map
from model.scoring import gradient_map

#: The fourth says why an image is where it is: pixels of the kind that it shows, or where its gradient is large.
TITLES = ("image", "clusters", "pseudo ground truth", "why it is here", "prediction")


def contact_sheet(ctx: Context, project: Project, places: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with one row per place of the queue.

    Args:
        ctx: doors to the outside.
        project: whose tasks they are.
        places: rows of the ranking (`task`, `parts`, `why`, `kind`).
        path: of the PNG.
    """
    index, config = project.index(), project.config()
    rows = []
    for number, place in enumerate(places, 1):
        seen = pictures(ctx, project, index[place["task"]], config, place["kind"])
        rows.append((f"{number}. task {place['task']}: {because(place)}", seen))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(TITLES, rows).save(path)


def because(place: Mapping[str, Any]) -> str:
    """Why a row of the ranking has its place: in words, or what its utility is made of."""
    return place["why"] or ", ".join(f"{name} {value:.3g}" for name, value in place["parts"].items())


def pictures(
    ctx: Context, project: Project, record: TaskRecord, config: ProjectConfig, kind: int | None
) -> list[Picture]:
    """The row of one image, which has its place for this kind of pixels."""
    image, _ = ctx.images(project.id).get(project.id, record.id, record.image)
    clusters, decided = clusters_name(ctx, project), project.decided(config)
    labels = project.store.read_map(project.cluster_key(clusters, record.id))
    target = target_of(project, record, clusters, decided, config)
    if labels is None or target is None:
        return [image]
    seen = project.prediction(model_in_force(ctx, project, config).masks, record.id, config.classes.fine)
    fine = palette(len(config.classes.fine))
    coarse = np.array([fine[list(members)].mean(0) for members in config.classes.groups], np.uint8)
    return [
        image,
        paint(labels, palette(len(decided))),
        paint(shown_rows(target, config), np.vstack([fine, coarse]), image),
        reason(ctx, project, record, config, kind, image, target),
        image if seen is None else paint(seen[0], fine, image),
    ]


def reason(
    ctx: Context,
    project: Project,
    record: TaskRecord,
    config: ProjectConfig,
    kind: int | None,
    image: Picture,
    target: NDArray[np.uint8],
) -> Picture:
    """Why an image has its place: its pixels of a kind in red; where gradients decide, where they are large."""
    if ctx.settings.learner == "deep":
        network = scorer(ctx, project, network_key(ctx, project, config.classes), config.classes).network
        return heat(gradient_map(network, image, target, config.classes, device()), image)
    fit = load_fit(project)
    if fit is None or kind is None:
        return image
    here = kind_map(maps_of(ctx, project, record.id, record.image, fit), fit.scaling, fit.kinds) == kind
    return paint(np.where(here, 0, 255).astype(np.uint8), np.array([[255, 0, 0]], np.uint8), image)


def shown_rows(target: NDArray[np.uint8], config: ProjectConfig) -> NDArray[np.uint8]:
    """Rows of the pseudo ground truth; "any class" is left unpainted."""
    return np.where(target == config.classes.any_row, 255, target).astype(np.uint8)
