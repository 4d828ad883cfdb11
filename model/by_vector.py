"""Strategies that choose by how images differ from each other and from those that are labelled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.pool import Floats, Pool, Ranking, by_utility, followed, from_order
from model.spread import (
    GREEDY,
    NEAR,
    best_of_uncovered,
    cover,
    distances,
    farthest_first,
    highest,
    joint_rank,
    projected,
    standardised,
    typicality,
    unit,
)

#: Images chosen for coverage before a network's opinion counts.
COVER = 3
#: Images among which coverage measures distances; more are sampled.
COVERED = 2000
#: Places that TypiClust and BAIT give one by one; the rest follows by typicality or gain.
PLACES = 10
#: Images whose matrices BAIT inverts together.
SOLVED = 16
#: Prior precision of BAIT's last layer, as a share of the pool's mean Fisher diagonal.
PRIOR = 1.0


def direction_range(pool: Pool, rng: np.random.Generator) -> Ranking:
    """A wide range of gradient directions: farthest-first on 1 - cos, from the labelled images on.

    Images without a gradient have no direction and come last.
    """
    vectors = unit(pool.embedding)
    far = farthest_first(vectors, unit(pool.labelled_embedding), vectors.any(1).astype(float), rng)
    return Ranking(far.order, far.utility, {"novelty": far.novelty})


def coverage(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Typical images of the largest regions of feature space without a label (after TypiClust, Hacohen et al. 2022).

    Features are standardised. The first `COVER` places know each other; the rest follows by typicality.
    """
    size = len(pool)
    if size < 2:
        return from_order(np.arange(size), {"typicality": np.zeros(size)})
    features, labelled = standardised(pool.features, pool.labelled_features)
    if size > COVERED:
        features, labelled = projected(features), projected(labelled)
    sample = np.sort(rng.choice(size, COVERED, replace=False)) if size > COVERED else np.arange(size)
    typical = typicality(features, features[sample])
    first = sample[cover(features[sample], labelled, typical[sample], pool.first(COVER), rng)]
    return from_order(followed(first, by_utility(typical, {}, rng).order), {"typicality": typical})


def badge(pool: Pool, rng: np.random.Generator) -> Ranking:
    """k-means++ on the gradients against the network's own classes, lengths and all (Ash et al. 2020).

    First the longest one; then by chance in proportion to the squared distance to what was chosen and to zero.
    """
    vectors = (pool.vectors["own"] if len(pool) else pool.embedding).astype(np.float64)
    size, order = len(vectors), list[int]()
    square = (vectors**2).sum(1)
    left, nearest = np.ones(size, bool), square.copy()
    for place in range(pool.first(GREEDY)):
        weight = np.where(left, nearest, 0)
        if place == 0 and weight.any():
            ties = np.flatnonzero(weight == weight.max())
            chosen = int(ties[0] if len(ties) == 1 else rng.choice(ties))
        else:
            weight = weight if weight.sum() > 0 else left.astype(float)
            chosen = int(rng.choice(size, p=weight / weight.sum()))
        order.append(chosen)
        left[chosen] = False
        np.minimum(nearest, np.maximum(square + square[chosen] - 2 * vectors @ vectors[chosen], 0), out=nearest)
    rest = by_utility(np.where(left, nearest, -1), {}, rng).order
    return from_order(followed(order, rest), {"length": np.sqrt(square)})


def coreset(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Farthest from everything labelled or chosen: greedy k-centre on features (Sener and Savarese 2018)."""
    features, size, order = pool.features.astype(np.float64), len(pool), list[int]()
    nearest = np.full(size, np.inf)
    if len(pool.labelled_features) and size:
        nearest = distances(features, pool.labelled_features.astype(np.float64)).min(1)
    left, tie = np.ones(size, bool), rng.permutation(size)
    for _ in range(pool.first(GREEDY)):
        order.append(highest(np.where(left, nearest, -1), tie))
        left[order[-1]] = False
        np.minimum(nearest, distances(features, features[order[-1:]])[:, 0], out=nearest)
    return from_order(followed(order, by_utility(np.where(left, nearest, -1), {}, rng).order), {})


def typiclust(pool: Pool, rng: np.random.Generator) -> Ranking:
    """The most typical image of the largest cluster without a label (Hacohen et al. 2022), one image at a time."""
    return best_of_clusters(pool, [], rng)


def best_of_clusters(pool: Pool, wishes: Sequence[Floats], rng: np.random.Generator) -> Ranking:
    """TypiClust where a cluster's image need not only be typical.

    Args:
        pool: its features are clustered, one cluster more than there are labels.
        wishes: (N,) each; see `best_of_uncovered`.
        rng: of clusters and ties.

    Returns:
        The first `PLACES` know each other; the rest follows by typicality and wishes.
    """
    size, order = len(pool), list[int]()
    features: Floats = pool.features.astype(np.float64)
    labelled: Floats = pool.labelled_features.astype(np.float64).reshape(-1, features.shape[1] or 1)
    if size > COVERED:
        features, labelled = projected(features), projected(labelled)
    if len(labelled) > COVERED:
        labelled = labelled[rng.choice(len(labelled), COVERED, replace=False)]
    rows = np.sort(rng.choice(size, COVERED, replace=False)) if size > COVERED else np.arange(size)
    for _ in range(min(len(rows), pool.first(PLACES))):
        order.append(best_of_uncovered(features[rows], labelled, order, [wish[rows] for wish in wishes], rng))
    # What follows is far from being served: in large pools a sample of neighbours tells it well enough.
    near = features[rows if size <= COVERED else rows[:: COVERED // NEAR]]
    typical = typicality(features, near) if len(rows) > 1 else np.zeros(len(rows))
    rest = by_utility(joint_rank([typical, *wishes]), {}, rng).order
    return from_order(followed(rows[order], rest), {"typicality": typical})


def bait(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Least expected error of the last layer: greedy on tr[(F_chosen)^-1 F_pool], exactly (Ash et al. 2021).

    Fisher matrices are small here, since features are projected to a few dimensions: no approximation is needed.
    """
    size = len(pool)
    if not size:
        return from_order(np.zeros(0, np.intp), {})
    fisher = pool.vectors["fisher"]
    seen = pool.labelled_vectors["fisher"] if len(pool.labelled_features) else np.zeros((0, *fisher.shape[1:]))
    target = (fisher.sum(0) + seen.sum(0)) / (size + len(seen))
    prior = PRIOR * max(float(np.trace(target)) / len(target), 1e-12)
    known = seen.sum(0) + prior * np.eye(len(target))
    left, order, tie = np.ones(size, bool), list[int](), rng.permutation(size)
    gain = np.zeros(size)
    for _ in range(pool.first(PLACES)):
        gain = np.full(size, -np.inf)
        for some in np.array_split(np.flatnonzero(left), -(-size // SOLVED)):
            gain[some] = -np.trace(np.linalg.solve(known + fisher[some], target), axis1=1, axis2=2)
        order.append(highest(gain, tie))
        left[order[-1]] = False
        known = known + fisher[order[-1]]
    return from_order(followed(order, by_utility(gain, {}, rng).order), {})
