"""Query strategies: scores of a pool -> the order in which its images are wanted. Pure functions over arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.spread import cover, farthest_first, standardised, typicality, unit, van_der_corput

Floats = NDArray[np.float64]
#: Images chosen for coverage before a network's opinion counts.
COVER = 3
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
        vectors: (N, ...) further arrays by name; see `NEEDS`.
        labelled_vectors: (M, ...) the same of the labelled images.
        labelled_scores: (M,) each, the numbers of the labelled images, against their annotations.

    Raises:
        ValueError: lengths or widths differ, or a number is not finite.
    """

    scores: Mapping[str, Floats]
    embedding: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    features: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    labelled_embedding: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    labelled_features: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 0)))
    vectors: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    labelled_vectors: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    labelled_scores: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.scores.items()}
        lengths |= {"embedding": len(self.embedding), "features": len(self.features)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the parts of a pool differ in length: {lengths}")
        if len(self.labelled_embedding) != len(self.labelled_features):
            raise ValueError("labelled images must have an embedding and features each")
        for name in ("embedding", "features"):
            ours, theirs = getattr(self, name), getattr(self, f"labelled_{name}")
            if len(ours) and len(theirs) and ours.shape[1] != theirs.shape[1]:
                raise ValueError(f"{name}: {ours.shape[1]} columns in the pool, {theirs.shape[1]} of labelled images")
        plain = {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        arrays = {**self.scores, **self.vectors, **self.labelled_vectors, **self.labelled_scores, **plain}
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
    ranked = by_utility(-pool.scores["magnitude"], {}, rng).order
    order = ranked[van_der_corput(len(pool))]
    return from_order(order, {"magnitude": pool.scores["magnitude"]})


def direction_range(pool: Pool, rng: np.random.Generator) -> Ranking:
    """A wide range of gradient directions: farthest-first on 1 - cos, from the labelled images on.

    Images without a gradient have no direction and come last.
    """
    vectors = unit(pool.embedding)
    far = farthest_first(vectors, unit(pool.labelled_embedding), vectors.any(1).astype(float), rng)
    return Ranking(far.order, far.utility, {"novelty": far.novelty})


def coarse_egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected squared gradient length with labels drawn from what the coarse label allows."""
    parts = {"magnitude": pool.scores["magnitude"], "variance": pool.scores["variance"]}
    return by_utility(pool.scores["coarse_egl"], parts, rng)


def coverage(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Typical images of the largest regions of feature space without a label (TypiClust, Hacohen et al. 2022).

    The first `COVER` places know each other; the rest follows by typicality.
    """
    size = len(pool)
    if size < 2:
        return from_order(np.arange(size), {"typicality": np.zeros(size)})
    features, labelled = standardised(pool.features, pool.labelled_features)
    sample = np.sort(rng.choice(size, COVERED, replace=False)) if size > COVERED else np.arange(size)
    typical = typicality(features, features[sample])
    first = sample[cover(features[sample], labelled, typical[sample], COVER, rng)]
    rest = by_utility(typical, {}, rng).order
    return from_order(np.concatenate([first, rest[~np.isin(rest, first)]]), {"typicality": typical})


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
    return Ranking(far.order, far.utility, {"gradient": length, "novelty": far.novelty})


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
#: Numbers and arrays from `model.extras` that a strategy reads besides the plain ones.
NEEDS: dict[str, tuple[str, ...]] = {}
#: Strategies that look at hidden labels: a benchmark's references, no choice for a live project.
REFERENCES: dict[str, Strategy] = {}


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
