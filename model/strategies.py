"""Query strategies: scores of a pool -> the order in which its images are wanted. Pure functions over arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

Floats = NDArray[np.float64]
#: Places that are chosen one by one, each knowing those before it; the rest follows by utility.
GREEDY = 300
#: Images chosen for coverage before a network's opinion counts.
COVER = 3
#: Neighbours that typicality looks at.
NEIGHBOURS = 20
#: Images among which coverage measures distances; more are sampled.
COVERED = 2000


@dataclass(frozen=True)
class Pool:
    """What a strategy sees of N pool images and M labelled ones.

    Attributes:
        scores: (N,) each, by the names of `ImageScore`'s numbers.
        embedding: (N, E) gradient embeddings.
        features: (N, F) pooled features.
        labelled_embedding: (M, E) the same of the labelled images, under the same network.
        labelled_features: (M, F).

    Raises:
        ValueError: lengths differ, or a number is not finite.
    """

    scores: Mapping[str, Floats]
    embedding: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    features: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    labelled_embedding: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    labelled_features: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.scores.items()}
        lengths |= {"embedding": len(self.embedding), "features": len(self.features)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the parts of a pool differ in length: {lengths}")
        arrays = {**self.scores, "embedding": self.embedding, "features": self.features}
        bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
        if bad:
            raise ValueError(f"{', '.join(bad)} of the pool has values that are not finite; score those images again")

    def __len__(self) -> int:
        return len(self.embedding)


class Ranking(NamedTuple):
    """The wish of a strategy.

    Attributes:
        order: (N,) pool indices, most wanted first.
        utility: (N,) by pool index, high = wanted.
        parts: what the utility is made of, (N,) each by pool index.
    """

    order: NDArray[np.intp]
    utility: Floats
    parts: Mapping[str, Floats]


Strategy = Callable[[Pool, np.random.Generator], Ranking]


def random(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Chance."""
    return by_utility(rng.random(len(pool)), {}, rng)


def foreground_random(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Chance in proportion to the share of foreground (Efraimidis and Spirakis 2006: weighted, without replacement)."""
    share = np.maximum(pool.scores["foreground"], 1e-9)
    utility = np.log(np.maximum(rng.random(len(pool)), 1e-300)) / share
    return by_utility(utility, {"foreground": pool.scores["foreground"]}, rng)


def entropy(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Mean entropy of the network's classes."""
    parts = {name: pool.scores[name] for name in ("coarse_entropy", "fine_entropy")}
    return by_utility(pool.scores["entropy"], parts, rng)


def egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected gradient length with labels drawn from the network (Settles et al. 2008, squared form)."""
    return by_utility(pool.scores["egl"], {"egl": pool.scores["egl"]}, rng)


def gradient_magnitude(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Largest gradient of the loss against the pseudo ground truth."""
    return by_utility(pool.scores["magnitude"], {"magnitude": pool.scores["magnitude"]}, rng)


def magnitude_range(pool: Pool, rng: np.random.Generator) -> Ranking:
    """A wide range of gradient magnitudes: quantiles in van der Corput order, so that every prefix is spread."""
    size = len(pool)
    ranked = by_utility(pool.scores["magnitude"], {}, rng).order[::-1]
    order, taken = [], np.zeros(size, bool)
    for place in van_der_corput(size):
        if not taken[place]:
            taken[place] = True
            order.append(ranked[place])
    return from_order(np.array(order, np.intp), {"magnitude": pool.scores["magnitude"]})


def direction_range(pool: Pool, rng: np.random.Generator) -> Ranking:
    """A wide range of gradient directions: farthest-first on 1 - cos, from the labelled images on."""
    far = farthest_first(unit(pool.embedding), unit(pool.labelled_embedding), np.ones(len(pool)), rng)
    return Ranking(far.order, far.utility, {"novelty": far.parts["novelty"]})


def coarse_egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected squared gradient length with labels drawn from what the coarse label allows."""
    parts = {"magnitude": pool.scores["magnitude"], "variance": pool.scores["variance"]}
    return by_utility(pool.scores["coarse_egl"], parts, rng)


def coverage(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Typical images of the largest regions of feature space without a label (TypiClust, Hacohen et al. 2022)."""
    size = len(pool)
    if size < 2:
        return from_order(np.arange(size), {"typicality": np.zeros(size)})
    features = standardised(pool.features, pool.labelled_features)
    sample = np.sort(rng.choice(size, COVERED, replace=False)) if size > COVERED else np.arange(size)
    typical = typicality(features[:size], features[sample])
    first = cover(features[sample], features[size:], typical[sample], rng)
    order = np.concatenate([sample[first], np.setdiff1d(by_utility(typical, {}, rng).order, sample[first])])
    rest = order[len(first) :]
    order[len(first) :] = rest[np.argsort(-typical[rest], kind="stable")]
    return from_order(order.astype(np.intp), {"typicality": typical})


def first_row(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Cover with the first images, then coarse EGL times novelty of direction."""
    missing = COVER - len(pool.labelled_features)
    scored = novel_egl(pool, rng)
    if missing <= 0:
        return scored
    head = coverage(pool, rng)
    chosen = head.order[:missing]
    order = np.concatenate([chosen, scored.order[~np.isin(scored.order, chosen)]]).astype(np.intp)
    return from_order(order, {**head.parts, **scored.parts})


def novel_egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Root of the coarse EGL (a gradient length) times 1 - max cos to labelled and better placed images."""
    length = np.sqrt(np.maximum(pool.scores["coarse_egl"], 0))
    far = farthest_first(unit(pool.embedding), unit(pool.labelled_embedding), length, rng)
    return Ranking(far.order, far.utility, {"gradient": length, "novelty": far.parts["novelty"]})


STRATEGIES: dict[str, Strategy] = {
    "first-row": first_row,
    "coarse-egl": coarse_egl,
    "egl": egl,
    "gradient-magnitude": gradient_magnitude,
    "magnitude-range": magnitude_range,
    "direction-range": direction_range,
    "entropy": entropy,
    "coverage": coverage,
    "foreground-random": foreground_random,
    "random": random,
}
DEFAULT = "first-row"


def by_utility(utility: Floats, parts: Mapping[str, Floats], rng: np.random.Generator) -> Ranking:
    """The order of falling utility; ties by chance, so that the order of tasks in the project means nothing."""
    shuffled = rng.permutation(len(utility))
    order = shuffled[np.argsort(-utility[shuffled], kind="stable")]
    return Ranking(order.astype(np.intp), np.asarray(utility, np.float64), parts)


def from_order(order: NDArray[np.intp], parts: Mapping[str, Floats]) -> Ranking:
    """A ranking of which only the order is known: utility falls from 1 to just above 0."""
    utility = np.empty(len(order))
    utility[order] = 1 - np.arange(len(order)) / max(len(order), 1)
    return Ranking(order, utility, parts)


def farthest_first(vectors: Floats, seen: Floats, weight: Floats, rng: np.random.Generator) -> Ranking:
    """Greedy order by weight times distance (1 - largest cosine) to everything chosen before.

    Args:
        vectors: (N, E) of length one, or zero.
        seen: (M, E) already chosen.
        weight: (N,) not negative.
        rng: breaks ties.

    Returns:
        The order; `GREEDY` places one by one, the rest by the utility they then have.
    """
    size = len(vectors)
    nearest = (vectors @ seen.T).max(1) if len(seen) and size else np.full(size, -np.inf)
    order, utility, novelty = [], np.zeros(size), np.ones(size)
    tie, left = rng.random(size), np.ones(size, bool)
    for _ in range(min(size, GREEDY)):
        novelty[left] = np.clip(1 - np.maximum(nearest[left], 0), 0, 1)
        utility[left] = weight[left] * novelty[left]
        best = int(np.lexsort((tie, np.where(left, utility, -np.inf)))[-1])
        order.append(best)
        left[best] = False
        np.maximum(nearest, vectors @ vectors[best], out=nearest)
    rest = np.flatnonzero(left)
    rest = rest[np.lexsort((tie[rest], utility[rest]))[::-1]]
    return Ranking(np.array([*order, *rest], np.intp), utility, {"novelty": novelty})


def unit(vectors: NDArray[np.floating]) -> Floats:
    """(N, E) vectors of length one; zero stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, length, out=np.zeros(vectors.shape), where=length > 0), np.float64)


def standardised(features: NDArray[np.floating], labelled: NDArray[np.floating]) -> Floats:
    """(N + M, F) features of pool and labelled images, each column of mean 0 and deviation 1."""
    both = np.concatenate([features, labelled.reshape(-1, features.shape[1])]).astype(np.float64)
    return np.asarray((both - both.mean(0)) / np.maximum(both.std(0), 1e-9))


def typicality(features: Floats, sample: Floats) -> Floats:
    """(N,) inverse mean distance to the nearest neighbours in the sample (Hacohen et al. 2022, equation 4)."""
    count = min(NEIGHBOURS, len(sample) - 1)
    result = np.empty(len(features))
    for start in range(0, len(features), 1000):
        near = np.sort(distances(features[start : start + 1000], sample), axis=1)[:, 1 : count + 1]
        result[start : start + 1000] = 1 / np.maximum(near.mean(1), 1e-9)
    return result


def distances(a: Floats, b: Floats) -> Floats:
    """(N, M) Euclidean distances."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(square, 0)), np.float64)


def cover(features: Floats, labelled: Floats, typical: Floats, rng: np.random.Generator) -> NDArray[np.intp]:
    """One image after another: the most typical one of the largest cluster that has neither label nor choice yet.

    The number of clusters grows with every choice, as in TypiClust with a query size of one.
    """
    chosen: list[int] = []
    both = np.concatenate([features, labelled])
    for _ in range(min(len(features), COVER)):
        k = min(len(labelled) + len(chosen) + 1, len(both))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters: no harm
            found = KMeans(k, n_init=3, random_state=int(rng.integers(2**31))).fit(both).labels_
        used = set(found[[*chosen, *range(len(features), len(both))]].tolist())
        free = [c for c in range(k) if c not in used] or list(range(k))
        sizes = np.bincount(found[: len(features)], minlength=k)
        members = np.flatnonzero(found[: len(features)] == max(free, key=lambda c: int(sizes[c])))
        members = np.setdiff1d(members if members.size else np.arange(len(features)), chosen)
        members = members if members.size else np.setdiff1d(np.arange(len(features)), chosen)
        chosen.append(int(members[typical[members].argmax()]))
    return np.array(chosen, np.intp)


def van_der_corput(size: int) -> list[int]:
    """Places 0..size-1 in van der Corput order: the middle, the quarters, the eighths, ..., then what is left."""
    places, denominator = [], 2
    while denominator < 4 * max(size, 1):
        places += [int(size * numerator / denominator) for numerator in range(1, denominator, 2)]
        denominator *= 2
    return [place for place in places if place < size] + list(range(size))
