"""Scores of the project's images under the network in force, in the store."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.ahead import ahead
from backend.context import Context
from backend.enqueue import progress
from backend.faults import noted
from backend.label_config import ProjectConfig
from backend.learn import load_network, network_key
from backend.prepare import check_shape, clusters_name, target_of
from backend.project import Index, Project, TaskRecord
from model.classes import Classes
from model.network import device
from model.pseudo import fine_target
from model.scoring import NUMBERS, ImageScore, Scorer
from model.strategies import NEEDS

log = logging.getLogger(__name__)

#: The float columns of a score file, in order.
COLUMNS = NUMBERS


@lru_cache(maxsize=2)
def scorer(ctx: Context, project: Project, key: str, classes: Classes) -> Scorer:
    """The network of that name, ready to score: loaded once per worker and version."""
    log.info("project %d: network loaded: %s", project.id, key)
    return Scorer(load_network(ctx, project, classes)[0], classes, device(), extras(ctx))


def extras(ctx: Context) -> tuple[str, ...]:
    """What the strategy in force wants to know besides the plain numbers."""
    return NEEDS.get(ctx.settings.strategy, ())


def scores_key(ctx: Context, project: Project, config: ProjectConfig) -> str:
    """Names scores that may be compared: same network, same meaning of the clusters, same classes."""
    clusters, decided = clusters_name(ctx, project), project.decided(config).tobytes()
    said = f"{clusters}:{decided!r}:{config.classes}:{ctx.settings.image_size}:{','.join(extras(ctx))}"
    return f"{network_key(ctx, project, config.classes)}-{hashlib.sha1(said.encode()).hexdigest()[:12]}"


def score_tasks(
    ctx: Context, project: Project, records: Sequence[TaskRecord], config: ProjectConfig
) -> list[TaskRecord]:
    """Score images and keep scores, embeddings and the network's masks in the store.

    Returns:
        The records of tasks that could not be scored, with the error of each.

    Raises:
        Exception: the network fails at every image, so the fault is not the images'.
    """
    key, folder = network_key(ctx, project, config.classes), scores_key(ctx, project, config)
    network, rows, kept = scorer(ctx, project, key, config.classes), [], []
    faulty: list[TaskRecord] = []
    for done, (record, image, target) in enumerate(ahead(inputs(ctx, project, records, config, faulty))):
        progress(done + 1, len(records))
        try:
            score = network.score(image, target)
        except Exception as error:
            if not scores_at_all(ctx, network, config.classes):
                raise
            faulty.append(noted(ctx.studio, project.id, record, error))
            continue
        project.save_prediction(key, record.id, score.prediction, score.confidence, config.classes.fine)
        rows.append(score)
        kept.append(record)
    if kept:
        name = hashlib.sha1(repr([(r.id, r.version) for r in kept]).encode()).hexdigest()[:16]
        project.store.write_arrays(project.key("scores", folder, f"{name}.npz"), as_arrays(kept, rows))
    return faulty


def scores_at_all(ctx: Context, network: Scorer, classes: Classes) -> bool:
    """Whether a plain image as large as any can be scored; if not, a failure is no image's own."""
    side = ctx.settings.image_size
    try:
        network.score(np.zeros((side, side, 3), np.uint8), np.full((side, side), classes.any_row, np.uint8))
    except Exception as error:
        log.warning("the network fails at a plain image, too: %s", error)
        return False
    return True


def note_unscored(project: Project, number: int, shard: int, records: Sequence[TaskRecord]) -> None:
    """Leave what `score_tasks` could not score for `unscored`."""
    if records:
        rows = [record.to_json() for record in records]
        project.store.write_json(project.key("prepared", number, f"unscored-{shard}.json"), rows)


def unscored(project: Project, number: int, index: Index) -> Index:
    """The index with the errors of the tasks that this round could not score."""
    noted = dict(index)
    for key in project.store.list(project.key("prepared", number)):
        if "/unscored-" not in key:
            continue
        for row in project.store.read_json(key) or []:
            failed, now = TaskRecord.from_json(row), index.get(row["id"])
            if now is not None and not now.error and (now.version, now.image) == (failed.version, failed.image):
                noted[now.id] = replace(now, error=failed.error, tries=failed.tries, next_try=failed.next_try)
    return noted


def inputs(
    ctx: Context,
    project: Project,
    records: Sequence[TaskRecord],
    config: ProjectConfig,
    faulty: list[TaskRecord],
) -> Iterator[tuple[TaskRecord, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Each usable image with its target: the annotation mask where there is one, else the pseudo ground truth.

    The records of the others are added to `faulty`, with the error of each.
    """
    clusters, decided = clusters_name(ctx, project), project.decided(config)
    for record in records:
        try:
            image, _ = ctx.images(project.id).get(project.id, record.id, record.image)
            mask = project.labels(record.id, config) if record.labelled else None
            target = (
                target_of(project, record, clusters, decided, config)
                if mask is None
                else np.asarray(fine_target(mask, config.classes), np.uint8)
            )
            if target is None:
                target = np.full(image.shape[:2], config.classes.any_row, np.uint8)
            check_shape(record, target, image.shape[:2])
        except Exception as error:
            faulty.append(noted(ctx.studio, project.id, record, error))
            continue
        yield record, image, target


def as_arrays(records: Sequence[TaskRecord], scores: Sequence[ImageScore]) -> dict[str, NDArray[Any]]:
    """A score file: ids, label versions, the float columns, embeddings and features; extras under `extra:NAME`."""
    return {
        "task": np.array([r.id for r in records], np.int64),
        "version": np.array([r.version for r in records], "U12"),
        "columns": np.array([[getattr(s, name) for name in COLUMNS] for s in scores], np.float64),
        "embedding": np.stack([s.embedding for s in scores]).astype(np.float32),
        "features": np.stack([s.features for s in scores]).astype(np.float32),
        **{f"extra:{name}": np.stack([s.extras[name] for s in scores]) for name in scores[0].extras},
    }


@dataclass(frozen=True)
class Scores:
    """Scores of many tasks under one network and one meaning of the clusters, by task id."""

    rows: dict[int, int]
    columns: NDArray[np.float64]
    embedding: NDArray[np.float32]
    features: NDArray[np.float32]
    extras: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def column(self, name: str, tasks: Sequence[int]) -> NDArray[np.float64]:
        """(N,) one score of each task."""
        return self.columns[[self.rows[t] for t in tasks], COLUMNS.index(name)]


def scored(ctx: Context, project: Project, config: ProjectConfig, index: Index) -> set[int]:
    """Tasks that have a score that may be compared now; reads no embedding."""
    parts = score_files(ctx, project, config, ("task", "version"))
    return {task for part in parts for task in up_to_date(part, index)}


def read_scores(ctx: Context, project: Project, config: ProjectConfig, index: Index) -> Scores:
    """All scores that may be compared now, of tasks whose labels are still as they were when scored."""
    parts = list(score_files(ctx, project, config))
    if not parts:
        return Scores({}, np.zeros((0, len(COLUMNS))), np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = up_to_date(joined, index)
    found = {name.removeprefix("extra:"): array for name, array in joined.items() if name.startswith("extra:")}
    return Scores(rows, joined["columns"], joined["embedding"], joined["features"], found)


def score_files(
    ctx: Context, project: Project, config: ProjectConfig, names: Collection[str] | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays of these names, or all, of each score file under the network and the clusters in force."""
    for key in project.store.list(project.key("scores", scores_key(ctx, project, config))):
        part = project.store.read_arrays(key, names)
        if part is not None:
            yield part


def up_to_date(part: Mapping[str, NDArray[Any]], index: Index) -> dict[int, int]:
    """Row by task id, of tasks whose labels are still as they were when scored."""
    return {
        int(task): row
        for row, (task, version) in enumerate(zip(part["task"], part["version"], strict=True))
        if int(task) in index and index[int(task)].version == str(version)
    }
