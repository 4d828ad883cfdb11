"""The order of the pool by the project's head: from stored features, without opening an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.context import Context
from backend.features import Held
from backend.head import Model
from backend.label_config import ProjectConfig
from backend.prepare import clusters_name, target_of
from backend.project import Index, Project, TaskRecord, labelled
from backend.rank import Place, reasoned
from model.heads import Head
from model.instant import READS, no_opinion, pool_of
from model.kinds import Tables, design_variance
from model.pixel_pool import PIXELS, FirstRow, at_pool_pixels, opinions
from model.pixel_scores import score_pool
from model.pseudo import fine_target
from model.strategies import DEFAULT, STRATEGIES

#: Images of the pool among which the first one is found.
FIRST_AMONG = 2000


def ordered(
    ctx: Context,
    project: Project,
    index: Index,
    config: ProjectConfig,
    features: Held,
    model: Model,
    records: Sequence[TaskRecord],
) -> list[Place]:
    """The strategy's order of these tasks, those whose features the store lacks left out.

    Args:
        ctx: the doors.
        project: which project.
        index: its tasks.
        config: its label config.
        features: of its pool.
        model: what predicts now.
        records: tasks to order.
    """
    tasks = [r.id for r in records if r.id in features.places and not r.error]
    known = [r.id for r in labelled(index) if r.id in features.places]
    if not tasks:
        return []
    rng = np.random.default_rng([project.id, len(known)])
    if ctx.settings.strategy == DEFAULT:
        return first_row(project, config, features, model, tasks, known, rng)
    head = model.head or no_opinion(config.classes, features.fit.scaling.dimensions)
    mine = scores(ctx, project, index, config, features, head, tasks)
    theirs = scores(ctx, project, index, config, features, head, known)
    pool = pool_of(mine.values, theirs.values, len(mine.tasks), len(theirs.tasks))
    ranking = STRATEGIES[ctx.settings.strategy](pool, rng)
    return [reasoned(mine.tasks, ranking, int(i)) for i in ranking.order]


def first_row(
    project: Project,
    config: ProjectConfig,
    features: Held,
    model: Model,
    tasks: Sequence[int],
    known: Sequence[int],
    rng: np.random.Generator,
) -> list[Place]:
    """The order of the default rule."""
    fit, found, tables = features.fit, list[int](), list[Tables]()
    for ids, part, kinds in features.parts(project.store, [*known, *tasks]):
        found += ids
        tables.append(opinions(part, kinds, fit.kinds, model.learnt, model.coarse, config.classes)[1])
    if not found:
        return []
    whole = Tables(*(np.concatenate(column) for column in zip(*tables, strict=True)))
    place = {task: number for number, task in enumerate(found)}
    first = None if known else place.get(first_by_design(project, config, features, model, tasks))
    rule = FirstRow(whole, fit.kinds, len(config.classes.fine), [place[t] for t in known if t in place], rng, first)
    images = rule.order.tolist()
    return [
        Place(found[i], "full", rule.gain(i), {"gain": round(rule.gain(i), 6)}, rule.why(i), rule.kind(i))
        for i in images
    ]


def first_by_design(project: Project, config: ProjectConfig, features: Held, model: Model, tasks: Sequence[int]) -> int:
    """The task from which a linear head would predict the pool with the least variance; -1 where none has features."""
    chosen = tasks[:: max(1, len(tasks) // FIRST_AMONG)][:FIRST_AMONG]
    found, reduced, inside = list[int](), [], []
    for ids, part, kinds in features.parts(project.store, chosen):
        found += ids
        reduced.append(features.fit.kinds.reduced(part.numpy()))
        inside.append(opinions(part, kinds, features.fit.kinds, model.learnt, model.coarse, config.classes)[0])
    if not found:
        return -1
    return found[int(design_variance(np.concatenate(reduced), np.concatenate(inside)).argmin())]


@dataclass(frozen=True)
class Scored:
    """Scores of some tasks.

    Attributes:
        tasks: ids, N of them.
        values: (N,) or (N, ...) by the names of `model.pixel_scores`.
    """

    tasks: list[int]
    values: dict[str, NDArray[Any]]


def scores(
    ctx: Context,
    project: Project,
    index: Index,
    config: ProjectConfig,
    features: Held,
    head: Head,
    tasks: Sequence[int],
) -> Scored:
    """What the strategy in force reads of these tasks."""
    names, found, parts = READS.get(ctx.settings.strategy, ()), list[int](), list[dict[str, NDArray[Any]]]()
    for ids, part, _ in features.parts(project.store, tasks):
        found += ids
        rows = np.stack([known_of(ctx, project, index[task], config) for task in ids])
        parts.append(score_pool(part, head, config.classes, names, rows))
    values = {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in names if parts}
    return Scored(found, values)


def known_of(ctx: Context, project: Project, record: TaskRecord, config: ProjectConfig) -> NDArray[np.uint8]:
    """(P,) what is known of a task's sampled pixels, rows of `Classes.sets()`."""
    mask = project.labels(record.id, config) if record.labelled else None
    if mask is None:
        target = target_of(project, record, clusters_name(ctx, project), project.decided(config), config)
    else:
        target = fine_target(mask, config.classes)
    if target is None:
        return np.full(PIXELS, config.classes.any_row, np.uint8)
    return np.asarray(at_pool_pixels(target), np.uint8)
