"""Scores -> the order in which Label Studio shall serve the pool, with the reasons."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.coarse_answers import SKIPS
from backend.context import Context
from backend.faults import concerns_all
from backend.label_config import ProjectConfig
from backend.model_in_force import model_in_force
from backend.prepare import clusters_name, histograms
from backend.project import HEAD, Index, Project, TaskRecord, labelled, pool
from backend.score import COLUMNS, Scores, read_scores
from model.classes import MIXED, UNKNOWN
from model.clusters import cover, vegetation_guess
from model.strategies import STRATEGIES, Pool, Ranking

log = logging.getLogger(__name__)

#: Coarse labels stop being asked for when clusters nobody named cover less than this share of the pool's pixels.
UNDECIDED = 0.02
#: ... and at the latest after this many times the tasks that were asked for.
MOST = 3


@dataclass(frozen=True)
class Place:
    """One place of the queue.

    Attributes:
        task: Label Studio's task id.
        ask: what a person is asked there: `coarse` or `full`.
        utility: the strategy's value; higher is wanted more. NaN where the strategy had nothing to go by.
        parts: what the utility is made of, by name.
        why: in words; empty where there are none.
        kind: of pixels that it has its place for, see `model.kinds`; None where that is not why.
    """

    task: int
    ask: str
    utility: float
    parts: dict[str, float]
    why: str = ""
    kind: int | None = None


Order = Callable[[Sequence[TaskRecord]], list[Place]]


def rank(
    ctx: Context, project: Project, index: Index, config: ProjectConfig, order: Order | None = None
) -> list[Place]:
    """Every task that Label Studio may serve, best first.

    First come the tasks whose coarse labels cover the pool best, while coarse labels are wanted; then the strategy's
    order; then tasks without a score. A coarse-labelled task is not in the order while coarse labels are wanted, nor
    further back than `HEAD`: it is not called back before it is wanted. One that may not be set aside is in no order.
    """
    asked = coarse_asks(ctx, project, index, config)
    places = [Place(task, "coarse", float("nan"), {"coverage": share}) for task, share in asked]
    first = {place.task for place in places}
    rest = [r for r in pool(index) if r.id not in first and (r.stage != "coarse" or r.callable)]
    places += order(rest) if order else by_scores(ctx, project, index, config, rest)
    left = {record.id for record in rest} - {place.task for place in places}
    places += [Place(task, "full", float("nan"), {}) for task in sorted(left)]
    head = 0 if asked else HEAD
    return [p for n, p in enumerate(places) if index[p.task].stage != "coarse" or n < head]


def by_scores(
    ctx: Context, project: Project, index: Index, config: ProjectConfig, records: Sequence[TaskRecord]
) -> list[Place]:
    """The strategy's order of those of these pool tasks that have a score."""
    scores = read_scores(ctx, project, config, index)
    scored = [r.id for r in records if r.id in scores.rows and not r.error]
    known = [r.id for r in labelled(index) if r.id in scores.rows]
    rng = np.random.default_rng([project.id, len(known)])
    ranking = STRATEGIES[ctx.settings.strategy](as_pool(scores, scored, known), rng)
    return [reasoned(scored, ranking, int(i)) for i in ranking.order]


def as_pool(scores: Scores, scored: Sequence[int], known: Sequence[int]) -> Pool:
    """The arrays a strategy sees."""
    rows, seen = [scores.rows[t] for t in scored], [scores.rows[t] for t in known]
    numbers = {name: scores.columns[:, i] for i, name in enumerate(COLUMNS)}
    numbers |= {name: values for name, values in scores.extras.items() if values.ndim == 1}
    vectors = {name: values for name, values in scores.extras.items() if values.ndim > 1}
    return Pool(
        scores={name: values[rows] for name, values in numbers.items()},
        embedding=scores.embedding[rows],
        features=scores.features[rows],
        labelled_embedding=scores.embedding[seen],
        labelled_features=scores.features[seen],
        vectors={name: values[rows] for name, values in vectors.items()},
        labelled_vectors={name: values[seen] for name, values in vectors.items()},
        labelled_scores={name: values[seen] for name, values in numbers.items()},
    )


def reasoned(tasks: Sequence[int], ranking: Ranking, i: int) -> Place:
    """The place of the i-th pool task, with the parts of its utility."""
    parts = {name: round(float(values[i]), 6) for name, values in ranking.parts.items()}
    return Place(tasks[i], "full", float(ranking.utility[i]), parts)


def coarse_asks(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> list[tuple[int, float]]:
    """Tasks to be labelled coarsely next, best cover of the pool first, with the share each one adds."""
    clusters, extra = clusters_name(ctx, project), project.extra()
    if config.coarse is None or not clusters or not extra.get("keeper") or extra.get("skips") not in SKIPS:
        return []  # what cannot be set aside is not asked for: it would keep its task from being segmented
    everyone = [index[i] for i in sorted(index) if not index[i].error]
    counts = histograms(everyone, clusters)
    wanted = coarse_wanted(ctx, everyone, counts, project.decided(config))
    if not wanted:
        return []
    chosen = [i for i, r in enumerate(everyone) if r.coarse or r.labelled]
    rows = chosen + [i for i, r in enumerate(everyone) if r.stage == "new" and not r.coarse and counts[i].any()]
    picked = [rows[i] for i in cover(counts[rows], range(len(chosen)), wanted)]
    pixels = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [(everyone[i].id, round(float((pixels[i] > 0.01).mean()), 4)) for i in picked]


def coarse_wanted(
    ctx: Context, records: Sequence[TaskRecord], counts: NDArray[np.int64], decided: NDArray[np.uint8]
) -> int:
    """How many more coarse labels are wanted: the set number, then one at a time while clusters stay undecided."""
    enough = ctx.settings.coarse_tasks
    done = sum(r.coarse or r.labelled for r in records)
    if done < enough:
        return enough - done
    undecided = counts[:, decided == UNKNOWN].sum() / max(counts.sum(), 1)
    return int(enough > 0 and ctx.settings.clusters == "codebook" and undecided > UNDECIDED and done < MOST * enough)


def guesses(ctx: Context, project: Project, record: TaskRecord, config: ProjectConfig) -> list[tuple[str, float]]:
    """A guess for each cluster of one task: (name of the coarse class, how sure, 0..1).

    By what is known, the best first: the votes so far, the network's mask, a vegetation index, else the background.
    """
    clusters, decided = clusters_name(ctx, project), project.decided(config)
    labels = project.store.read_map(project.cluster_key(clusters, record.id))
    if labels is None:
        return []
    masks = model_in_force(ctx, project, config).masks
    seen = project.prediction(masks, record.id, config.classes.fine)
    green = None
    if seen is None and len(config.classes.coarse) == 2:
        green = greenness(ctx, project, record, labels, len(decided))
    fine = None if seen is None else seen[0]
    each = [guess(k, decided, labels, fine, green, config) for k in range(len(decided))]
    return [(config.classes.coarse[coarse], sure) for coarse, sure in each]


def greenness(
    ctx: Context, project: Project, record: TaskRecord, labels: NDArray[np.uint8], k: int
) -> NDArray[np.floating[Any]] | None:
    """(k,) how green each cluster of a task is; None where its image cannot be had any more."""
    try:
        image, _ = ctx.images(project.id).get(project.id, record.id, record.image)
        return vegetation_guess(image, labels, k)
    except Exception as error:
        if concerns_all(error, ctx.studio):
            raise
        log.warning("project %d, task %d: nothing is guessed of its clusters: %s", project.id, record.id, error)
        return None


def guess(
    k: int,
    decided: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    seen: NDArray[np.uint8] | None,
    green: NDArray[np.floating[Any]] | None,
    config: ProjectConfig,
) -> tuple[int, float]:
    """The guess for one cluster."""
    if decided[k] not in (MIXED, UNKNOWN):
        return int(decided[k]), 1.0
    here = labels == k
    if seen is not None and here.any():
        coarse = config.classes.coarse_table()[seen[here]]
        groups = np.bincount(coarse[coarse != UNKNOWN], minlength=len(config.classes.coarse))
        return int(groups.argmax()), float(groups.max() / max(groups.sum(), 1))
    if green is not None and np.isfinite(green[k]):
        return int(green[k] > 0.5), float(max(green[k], 1 - green[k]))
    return 0, 1.0 / len(config.classes.coarse)
