"""The order of the pool by the project's head: from stored features, without opening an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.context import Context
from backend.features import Held, held, load_fit
from backend.head import Model, load_model
from backend.label_config import ProjectConfig
from backend.prepare import clusters_name, target_of
from backend.project import Index, Project, TaskRecord, labelled
from backend.rank import Place, reasoned
from model.instant import READS, no_opinion, pool_of
from model.kinds import Tables, design_variance
from model.pixel_pool import PIXELS, FirstRow, at_pool_pixels, opinions
from model.pixel_scores import score_pool
from model.pseudo import fine_target
from model.strategies import DEFAULT, STRATEGIES

#: Images of the pool among which the first one is found.
FIRST_AMONG = 2000


@dataclass(frozen=True)
class Scored:
    """What the strategy in force reads of some tasks.

    Attributes:
        tasks: ids, N of them.
        values: (N,) or (N, ...) by the names of `model.pixel_scores`; for the default rule those of `Tables`.
    """

    tasks: Sequence[int]
    values: Mapping[str, NDArray[Any]]

    def of(self, tasks: Sequence[int]) -> Scored:
        """Those of these tasks, in this order, as far as they are here."""
        place = {task: row for row, task in enumerate(self.tasks)}
        there = [task for task in tasks if task in place]
        rows = [place[task] for task in there]
        return Scored(there, {name: values[rows] for name, values in self.values.items()})


#: No scores yet.
NOTHING = Scored([], {})


def join(parts: Sequence[Scored]) -> Scored:
    """All of them; no task twice."""
    names = parts[0].values if parts else ()
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in names}
    return Scored([task for part in parts for task in part.tasks], values)


def score(
    ctx: Context,
    project: Project,
    index: Index,
    config: ProjectConfig,
    features: Held,
    model: Model,
    tasks: Sequence[int],
) -> Scored:
    """What the strategy in force reads of these tasks, those whose features the store lacks left out.

    Args:
        ctx: the doors.
        project: which project.
        index: its tasks, these at least.
        config: its label config.
        features: of its pool.
        model: what predicts now.
        tasks: ids.
    """
    strategy, fit, classes, parts = ctx.settings.strategy, features.fit, config.classes, list[Scored]()
    head = model.head or no_opinion(classes, fit.scaling.dimensions)
    for ids, part, kinds in features.parts(project.store, tasks):
        if strategy == DEFAULT:
            _, tables = opinions(part, kinds, fit.kinds, model.learnt, model.coarse, classes)
            parts.append(Scored(ids, tables._asdict()))
        else:
            rows = np.stack([known_of(ctx, project, index[task], config) for task in ids])
            values = score_pool(part, head, classes, READS.get(strategy, ()), rows)
            parts.append(Scored(ids, {name: found.astype(np.float64) for name, found in values.items()}))
    return join(parts)


def score_shard(ctx: Context, project: Project, number: int, shard: int) -> None:
    """Score one shard of a large pool for the job that ranks it, which scores by itself what is lost."""
    records, _ = project.shard("score", number, shard)
    fit, model, index = load_fit(project), load_model(project), {record.id: record for record in records}
    config = project.config()
    if fit is None or model is None or model.fit != fit.version:
        return
    if model.head is not None and model.head.classes != config.classes.fine:
        return
    found = score(ctx, project, index, config, held(ctx, project, fit, index), model, list(index))
    ctx.board.go_on(project.id)
    key = project.key("prepared", number, f"scores-{shard}.npz")
    project.store.write_arrays(key, {"tasks": np.array(found.tasks, np.int64), **found.values})


def kept_scores(project: Project, number: int) -> Scored:
    """What the shards of a round have found; nothing of one that is lost."""
    keys = [key for key in project.store.list(project.key("prepared", number)) if "/scores-" in key]
    found = [arrays for key in keys if (arrays := project.store.read_arrays(key)) is not None]
    return join([Scored(arrays.pop("tasks").tolist(), arrays) for arrays in found if len(arrays["tasks"])])


def ordered(
    ctx: Context,
    project: Project,
    index: Index,
    config: ProjectConfig,
    features: Held,
    model: Model,
    kept: Scored,
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
        kept: scores that are there already, of any tasks; the others are computed.
        records: tasks to order.
    """
    tasks = [r.id for r in records if r.id in features.places and not r.error]
    known = [r.id for r in labelled(index) if r.id in features.places]
    if not tasks:
        return []
    rng, there = np.random.default_rng([project.id, len(known)]), set(kept.tasks)
    fresh = [task for task in [*known, *tasks] if task not in there]
    seen = join([part for part in (kept, score(ctx, project, index, config, features, model, fresh)) if part.tasks])
    mine, theirs = seen.of(tasks), seen.of(known)
    if not mine.tasks:
        return []
    if ctx.settings.strategy == DEFAULT:
        return first_row(project, config, features, model, mine, theirs, rng)
    pool = pool_of(mine.values, theirs.values, len(mine.tasks), len(theirs.tasks))
    ranking = STRATEGIES[ctx.settings.strategy](pool, rng)
    return [reasoned(mine.tasks, ranking, int(i)) for i in ranking.order]


def first_row(
    project: Project,
    config: ProjectConfig,
    features: Held,
    model: Model,
    mine: Scored,
    theirs: Scored,
    rng: np.random.Generator,
) -> list[Place]:
    """The order of the default rule: of `mine`, beside `theirs`, which are labelled."""
    whole, kinds, known = join([mine, theirs]), features.fit.kinds, len(theirs.tasks)
    first = None
    if not known:
        chosen = first_by_design(project, config, features, model, mine.tasks)
        first = next((number for number, task in enumerate(mine.tasks) if task == chosen), None)
    seen = range(len(mine.tasks), len(mine.tasks) + known)
    rule = FirstRow(Tables(**whole.values), kinds, len(config.classes.fine), seen, rng, first)
    return [
        Place(mine.tasks[i], "full", rule.gain(i), {"gain": round(rule.gain(i), 6)}, rule.why(i), rule.kind(i))
        for i in rule.order.tolist()
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
