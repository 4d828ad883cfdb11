"""Stored maps -> the regions a person sees in a served task. Reads what workers stored; waits for nobody."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.errors import FirstRowError
from backend.label_config import ProjectConfig
from backend.project import HEAD_MASKS, Index, Project, TaskRecord, known
from backend.regions import coarse_regions, fine_regions
from backend.store import Store
from model.classes import IGNORE, UNKNOWN
from model.clusters import without_small
from model.effort import SMALLEST_PIECE

log = logging.getLogger(__name__)


def predictions(
    store: Store, state: Mapping[str, Any], project_id: int, tasks: Sequence[Mapping[str, Any]]
) -> list[list[dict[str, Any]]]:
    """What `/predict` answers: a list per task, empty when nothing is ready. One bad task does not harm the rest.

    Args:
        store: where workers left their maps.
        state: the project's small state.
        project_id: Label Studio's project id.
        tasks: as Label Studio sends them.

    Returns:
        One list per task; with at most one prediction (`result`, `score`).
    """
    project = Project(store, project_id)
    answers: list[list[dict[str, Any]]] = []
    try:
        config = project.config()
    except FirstRowError as error:
        log.warning("project %d gets no prelabels: %s", project_id, error)
        return [[] for _ in tasks]
    for task in tasks:
        try:
            result = regions(project, config, int(task["id"]), dict(state))
        except (FirstRowError, KeyError, ValueError) as error:
            log.warning("project %d, task %s gets no prelabel: %s", project_id, task.get("id"), error)
            result = []
        answers.append([{"result": result, "score": mean_score(result)}] if result else [])
    return answers


def warm_up() -> None:
    """Load the compiled functions that answers need: a second, and 90 MB that processes forked afterwards share."""
    without_small(np.zeros((2, 2), np.uint8), SMALLEST_PIECE)


def known_tasks(project: Project, state: Mapping[str, Any]) -> Index:
    """The tasks that the order in force was made of, by id; none before the first order."""
    published = str(state.get("version", ""))
    return records(project, published) if published else {}


def regions(project: Project, config: ProjectConfig, task: int, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The regions of one task in its stage: clusters to correct, or a mask to correct."""
    if str(task) in state.get("coarse", {}):
        return cluster_regions(project, config, task, state)
    return full_regions(project, config, task, state)


def mean_score(result: Sequence[Mapping[str, Any]]) -> float:
    """Mean confidence of the regions, 0..1."""
    scores = [float(region.get("score", 0)) for region in result]
    return sum(scores) / len(scores) if scores else 0.0


def cluster_regions(
    project: Project, config: ProjectConfig, task: int, state: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One region per cluster in the coarse control, each with a guess."""
    record, labels = stored(project, task, state)
    guesses = state["coarse"][str(task)]
    if labels is None or not guesses or config.coarse is None:
        return []
    names = [name for name, _ in guesses]
    if not set(names) <= set(config.coarse.labels):
        return []  # made for another label config: the next order has guesses for this one
    return coarse_regions(labels, names, config, record.size, [score for _, score in guesses])


def full_regions(project: Project, config: ProjectConfig, task: int, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The network's mask, or before there is one the clusters' coarse classes, as pieces in the fine control.

    Specks of the network's mask are joined to their surroundings. Where a person gave the task coarse labels the mask
    keeps to them.
    """
    record, labels = stored(project, task, state)
    own = project.own_coarse(record, config)
    clusters = None if labels is None else coarse_map(labels, project.decided(config), own)
    masks = str(state.get("masks", state.get("model", "")))
    seen = project.prediction(masks, task, config.classes.fine)
    if seen is None and masks != HEAD_MASKS:  # the trained network has yet to see it
        seen = project.prediction(HEAD_MASKS, task, config.classes.fine)
    if seen is None:
        if clusters is None or not known(clusters).any():
            return []
        seen = from_clusters(clusters, config)
    else:
        seen = without_small(seen[0], SMALLEST_PIECE), seen[1]
    prediction, sure = (seen[0], seen[1]) if own is None else keep_to(own, seen[0], seen[1], config)
    return fine_regions(prediction, sure, config, record.size)


def stored(project: Project, task: int, state: Mapping[str, Any]) -> tuple[TaskRecord, NDArray[np.uint8] | None]:
    """The task's record and cluster map."""
    record = records(project, str(state.get("version", "")))[task]
    labels = project.store.read_map(project.cluster_key(str(state.get("clusters", "")), task))
    return record, labels


@lru_cache(maxsize=8)
def records(project: Project, version: str) -> Index:
    """The index as it was published under `version`."""
    return project.index()


def coarse_map(
    labels: NDArray[np.uint8], decided: NDArray[np.uint8], own: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """(H, W) coarse class of every pixel; an image's own coarse label wins over the votes."""
    voted = decided[labels]
    return voted if own is None else np.where(own == UNKNOWN, voted, own).astype(np.uint8)


def from_clusters(clusters: NDArray[np.uint8], config: ProjectConfig) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Fine classes from coarse ones: the first class of the group, as sure as a guess within the group can be."""
    first = np.full(256, IGNORE, np.uint8)
    sure = np.zeros(256, np.uint8)
    for coarse, members in enumerate(config.classes.groups):
        first[coarse], sure[coarse] = members[0], 255 // len(members)
    return first[clusters], sure[clusters]


def keep_to(
    own: NDArray[np.uint8], prediction: NDArray[np.uint8], sure: NDArray[np.uint8], config: ProjectConfig
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Replace classes that a person's coarse label excludes by the nearest class that it allows.

    Returns:
        The mask (H, W), and the confidence, 0 where it was replaced.
    """
    coarse_of = config.classes.coarse_table()
    mask, sure = prediction.copy(), sure.copy()
    for coarse, members in enumerate(config.classes.groups):
        wrong = (own == coarse) & (coarse_of[prediction] != coarse)
        right = (own == coarse) & ~wrong
        mask[wrong] = nearest(prediction, right)[wrong] if right.any() else members[0]
        sure[wrong] = 0
    return mask, sure


def nearest(values: NDArray[np.uint8], allowed: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """(H, W) the value of the nearest allowed pixel."""
    _, label = cv2.distanceTransformWithLabels(
        (~allowed).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    table = np.zeros(int(label.max()) + 1, np.uint8)
    table[label[allowed]] = values[allowed]
    return np.asarray(table[label], np.uint8)
