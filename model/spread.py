"""Orders that spread: over directions, over features, over quantiles."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

Floats = NDArray[np.floating]
#: Places that are chosen one by one, each knowing those before it; the rest follows by utility.
GREEDY = 300
#: From this many images on the next choices are foreseen, so many at a time, among so many candidates.
LARGE, AHEAD, CANDIDATES = 5000, 24, 512
#: Columns that features of very large pools are projected to.
NARROW = 128
#: Neighbours that typicality looks at.
NEIGHBOURS = 20
#: Images among which typicality looks for neighbours, in large clusters and pools.
NEAR = 500
#: Clusters of feature space at most; more would be single images.
MOST_CLUSTERS = 50
#: Clusters of TypiClust at most; with more labels, several share one.
MOST_REGIONS = 200
#: Rows whose distances are held in memory at a time.
CHUNK = 1000


class Farthest(NamedTuple):
    """A greedy order.

    Attributes:
        order: (N,) a permutation.
        utility: (N,) by index, weight times novelty when the place was given.
        novelty: (N,) by index, 0 (a copy) to 2 (the opposite, or nothing to compare with).
    """

    order: NDArray[np.intp]
    utility: NDArray[np.float64]
    novelty: NDArray[np.float64]


def farthest_first(
    vectors: Floats, seen: Floats, weight: Floats, rng: np.random.Generator, places: int = GREEDY
) -> Farthest:
    """Greedy order by weight times distance (1 - largest cosine) to everything chosen before.

    In a large pool the next choices are foreseen among the images now wanted most, and their cosines to all others are
    taken in one matrix product: memory is walked through once for a dozen choices. A choice that was not foreseen ends
    that and starts the next look ahead, so the order is the greedy one.

    Args:
        vectors: (N, E) of length one, or zero.
        seen: (M, E) already chosen.
        weight: (N,) not negative.
        rng: breaks ties.
        places: how many are given one by one, the rest by the utility they then have.
    """
    size, nearest = len(vectors), largest_cosine(vectors, seen)
    novelty = np.clip(1 - nearest, 0, 2).astype(np.float64)
    tie, left, order = rng.permutation(size), np.ones(size, bool), list[int]()
    cosines = dict[int, NDArray[np.floating]]()
    while len(order) < min(size, places):
        wish = np.where(left, weight * novelty, -1)
        order.append(highest(wish, tie))
        if order[-1] not in cosines:
            ahead = foreseen(vectors, nearest, weight, wish, order[-1])
            cosines = dict(zip(ahead, vectors[ahead] @ vectors.T, strict=True))
        left[order[-1]] = False
        np.maximum(nearest, cosines.pop(order[-1]), out=nearest)
        novelty[left] = np.clip(1 - nearest[left], 0, 2)
    rest, utility = np.flatnonzero(left), weight * novelty
    rest = rest[np.lexsort((tie[rest], utility[rest]))[::-1]]
    return Farthest(np.array([*order, *rest], np.intp), utility, novelty)


def foreseen(vectors: Floats, nearest: Floats, weight: Floats, wish: Floats, first: int) -> list[int]:
    """The next choices, as far as those decide that are wanted most now: `first` and up to `AHEAD` in all."""
    if len(vectors) < LARGE:
        return [first]
    few = np.argpartition(wish, -CANDIDATES)[-CANDIDATES:]
    if wish[few].min() == wish[first]:  # all are wanted alike, so far: nothing can be foreseen
        return [first]
    few = np.append(first, few[few != first])
    near, cosines, chosen = nearest[few].astype(np.float64), vectors[few] @ vectors[few].T, [0]
    while len(chosen) < AHEAD:
        near = np.maximum(near, cosines[chosen[-1]])
        hope = weight[few] * np.clip(1 - near, 0, 2)
        hope[chosen] = -1
        chosen.append(int(hope.argmax()))
    return [int(few[i]) for i in chosen]


def highest(values: Floats, tie: NDArray[np.intp]) -> int:
    """Where the highest value is; among equal ones where `tie`, a permutation, is highest."""
    ties = np.flatnonzero(values == values.max())
    return int(ties[tie[ties].argmax()])


def largest_cosine(vectors: Floats, seen: Floats) -> NDArray[np.float32]:
    """(N,) cosine to the nearest of the seen directions; -1 where nothing was seen."""
    nearest = np.full(len(vectors), -1, np.float32)
    for start in range(0, len(seen) if len(vectors) else 0, CHUNK):
        np.maximum(nearest, (vectors @ seen[start : start + CHUNK].T).max(1), out=nearest)
    return nearest


def unit(vectors: Floats) -> NDArray[np.float32]:
    """(N, E) vectors of length one; zero stays zero."""
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, length, out=np.zeros(vectors.shape), where=length > 0), np.float32)


def standardised(features: Floats, labelled: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, F) and (M, F) features of pool and labelled images, each column of mean 0 and deviation 1 over both."""
    both = np.concatenate([features, labelled], dtype=np.float64) if len(labelled) else features.astype(np.float64)
    deviation = both.std(0)
    both = (both - both.mean(0)) / np.where(deviation > 1e-9, deviation, 1)  # a constant column is no signal
    return both[: len(features)], both[len(features) :]


def projected(features: Floats) -> NDArray[np.float64]:
    """(N, at most `NARROW`) the same distances within a few per cent, for pools where exact ones would take minutes.

    Source: Johnson and Lindenstrauss 1984, by a fixed random matrix.
    """
    if features.shape[1] <= NARROW:
        return features.astype(np.float64)
    matrix = np.random.default_rng(0).normal(0, NARROW**-0.5, (features.shape[1], NARROW))
    return np.asarray((features.astype(np.float32) @ matrix.astype(np.float32)), np.float64)


def typicality(features: Floats, sample: Floats) -> NDArray[np.float64]:
    """(N,) inverse mean distance to the nearest neighbours in the sample (Hacohen et al. 2022, equation 4)."""
    count = min(NEIGHBOURS, len(sample) - 1)
    result = np.empty(len(features))
    for start in range(0, len(features), CHUNK):
        away = distances(features[start : start + CHUNK], sample)
        near = np.sort(np.partition(away, count, axis=1)[:, : count + 1], axis=1)[
            :, 1:
        ]  # the first is the image itself
        result[start : start + CHUNK] = 1 / np.maximum(near.mean(1), 1e-9)
    return result


def distances(a: Floats, b: Floats) -> NDArray[np.float64]:
    """(N, M) Euclidean distances."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(square, 0)), np.float64)


def cover(
    features: Floats, labelled: Floats, typical: Floats, places: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """One image after another: the most typical one of the largest cluster that has neither label nor choice yet.

    The number of clusters grows with every choice, as in TypiClust with a query size of one. Where every cluster has
    a label, those with the fewest come first.

    Args:
        features: (N, F) of the pool.
        labelled: (M, F).
        typical: (N,) typicality.
        places: how many to choose; at most N are.
        rng: of the clusters.

    Returns:
        Pool indices, the most wanted first.
    """
    size, chosen = len(features), list[int]()
    both = np.concatenate([features, labelled])
    for _ in range(min(size, places)):
        k = min(len(labelled) + len(chosen) + 1, len(both), MOST_CLUSTERS)
        found = clustered(both, k, 3, rng)
        free = np.setdiff1d(np.arange(size), chosen)
        seen = np.bincount(found[[*chosen, *range(size, len(both))]], minlength=k)
        members = np.bincount(found[free], minlength=k)
        best = np.lexsort((-members, seen, members == 0))[0]
        free = free[found[free] == best]
        chosen.append(int(free[typical[free].argmax()]))
    return np.array(chosen, np.intp)


def best_of_uncovered(
    features: Floats, labelled: Floats, chosen: list[int], wishes: Sequence[Floats], rng: np.random.Generator
) -> int:
    """The best image of the largest cluster with neither label nor choice: typical there, and high in every wish.

    One cluster more than there are labels and choices, so that one has none, up to `MOST_REGIONS`; from there on those
    with the fewest count.

    Args:
        features: (N, F) of the pool.
        labelled: (M, F).
        chosen: pool indices that count as labelled.
        wishes: (N,) each; the mean of an image's ranks by these and by typicality in the cluster decides.
        rng: of the clusters, and of ties.
    """
    both = np.concatenate([features, labelled])
    k = min(len(labelled) + len(chosen) + 1, len(both), MOST_REGIONS)
    found = clustered(both, k, "auto", rng)
    free = np.setdiff1d(np.arange(len(features)), chosen)
    size = np.bincount(found[free], minlength=k)
    seen = np.bincount(found[[*chosen, *range(len(features), len(both))]], minlength=k)
    fewest = (size > 0) & (seen == seen[size > 0].min())
    members = free[found[free] == rng.choice(np.flatnonzero(fewest & (size == size[fewest].max())))]
    others = members[:: max(1, len(members) // NEAR)]
    near = typicality(features[members], features[others]) if len(members) > 1 else np.ones(1)
    best = joint_rank([near, *(wish[members] for wish in wishes)])
    return int(members[rng.choice(np.flatnonzero(best == best.max()))])


def clustered(points: Floats, k: int, restarts: int | str, rng: np.random.Generator) -> NDArray[np.int32]:
    """(N,) k-means cluster of each point; `restarts` as scikit-learn's `n_init`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: no harm
        model = KMeans(k, n_init=restarts, random_state=int(rng.integers(2**31))).fit(points)
    return np.asarray(model.labels_, np.int32)


def joint_rank(wishes: Sequence[Floats]) -> NDArray[np.float64]:
    """(N,) geometric mean of the ranks that images have by several numbers, 0 to 1: high where all are high."""
    ranks = [rankdata(wish) / len(wish) for wish in wishes]
    return np.asarray(np.exp(np.mean(np.log(ranks), axis=0)), np.float64)


def van_der_corput(size: int) -> NDArray[np.intp]:
    """Places 0..size-1 in van der Corput order: the middle, the quarters, the eighths, ..., each once."""
    places, denominator = list[int](), 2
    while denominator < 4 * max(size, 1):
        places += [size * numerator // denominator for numerator in range(1, denominator, 2)]
        denominator *= 2
    return np.array(list(dict.fromkeys([*places, *range(size)]) if size else []), np.intp)
