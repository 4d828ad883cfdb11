"""What the loop saw of each image, on one page: image, clusters, pseudo ground truth, gradient, prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.context import Context
from backend.label_config import ProjectConfig
from backend.learn import network_key
from backend.prepare import clusters_name, target_of
from backend.project import Project, TaskRecord
from backend.score import scorer
from model.network import device
from model.pictures import Picture, heat, paint, palette, sheet
from model.scoring import gradient_map

TITLES = ("image", "clusters", "pseudo ground truth", "gradient", "prediction")


def contact_sheet(ctx: Context, project: Project, places: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG with one row per place of the queue.

    Args:
        ctx: doors to the outside.
        project: whose tasks they are.
        places: rows of the ranking (`task`, `parts`).
        path: of the PNG.
    """
    index, config = project.index(), project.config()
    rows = []
    for number, place in enumerate(places, 1):
        parts = ", ".join(f"{name} {value:.3g}" for name, value in place["parts"].items())
        rows.append((f"{number}. task {place['task']}: {parts}", pictures(ctx, project, index[place["task"]], config)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(TITLES, rows).save(path)


def pictures(ctx: Context, project: Project, record: TaskRecord, config: ProjectConfig) -> list[Picture]:
    """The row of one image."""
    image, _ = ctx.images(project.id).get(project.id, record.id, record.image)
    clusters, decided = clusters_name(ctx, project), project.decided(config)
    labels = project.store.read_map(project.cluster_key(clusters, record.id))
    target = target_of(project, record, clusters, decided, config)
    if labels is None or target is None:
        return [image]
    key = network_key(ctx, project, config.classes)
    network = scorer(ctx, project, key, config.classes).network
    seen = project.prediction(key, record.id, config.classes.fine)
    fine = palette(len(config.classes.fine))
    coarse = np.array([fine[list(members)].mean(0) for members in config.classes.groups], np.uint8)
    return [
        image,
        paint(labels, palette(len(decided))),
        paint(shown_rows(target, config), np.vstack([fine, coarse]), image),
        heat(gradient_map(network, image, target, config.classes, device()), image),
        image if seen is None else paint(seen[0], fine, image),
    ]


def shown_rows(target: NDArray[np.uint8], config: ProjectConfig) -> NDArray[np.uint8]:
    """Rows of the pseudo ground truth; "any class" is left unpainted."""
    return np.where(target == config.classes.any_row, 255, target).astype(np.uint8)
