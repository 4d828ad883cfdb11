"""What a query strategy sees, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
        places: how many images will be taken of the order at most, if that is known; these are the same whatever it is.

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
    places: int | None = None

    def first(self, most: int) -> int:
        """How many places a strategy gives one by one that would give `most` of them."""
        return min(len(self), most, len(self) if self.places is None else self.places)

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.scores.items()}
        lengths |= {name: len(values) for name, values in self.vectors.items()}
        lengths |= {"embedding": len(self.embedding), "features": len(self.features)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the parts of a pool differ in length: {lengths}")
        seen = {"labelled_embedding": len(self.labelled_embedding), "labelled_features": len(self.labelled_features)}
        if len(set(seen.values())) > 1:
            raise ValueError("labelled images must have an embedding and features each")
        seen |= {f"labelled {name}": len(values) for name, values in self.labelled_scores.items()}
        seen |= {f"labelled {name}": len(values) for name, values in self.labelled_vectors.items()}
        if len(set(seen.values())) > 1:
            raise ValueError(f"the parts of the labelled images differ in length: {seen}")
        for name in ("embedding", "features"):
            ours, theirs = getattr(self, name), getattr(self, f"labelled_{name}")
            if len(ours) and len(theirs) and ours.shape[1] != theirs.shape[1]:
                raise ValueError(f"{name}: {ours.shape[1]} columns in the pool, {theirs.shape[1]} of labelled images")
        plain = {name: array for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        mappings = (self.scores, self.vectors, self.labelled_vectors, self.labelled_scores, plain)
        arrays = [pair for mapping in mappings for pair in mapping.items()]
        bad = [name for name, values in arrays if not np.isfinite(values).all()]
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


def by_utility(utility: Floats, parts: Mapping[str, Floats], rng: np.random.Generator) -> Ranking:
    """The order of falling utility; ties by chance, so that the order of tasks in the project means nothing."""
    shuffled = rng.permutation(len(utility))
    order = shuffled[np.argsort(-utility[shuffled], kind="stable")]
    return Ranking(order.astype(np.intp), np.asarray(utility, np.float64), parts)


def followed(first: Sequence[int] | NDArray[np.intp], rest: NDArray[np.intp]) -> NDArray[np.intp]:
    """An order that begins with some images and goes on with what another order has besides."""
    head = np.asarray(first, np.intp)
    return np.concatenate([head, rest[~np.isin(rest, head)]])


def from_order(order: NDArray[np.intp], parts: Mapping[str, Floats]) -> Ranking:
    """A ranking of which only the order is known: utility falls from 1 to just above 0."""
    utility = np.empty(len(order))
    utility[order] = 1 - np.arange(len(order)) / max(len(order), 1)
    return Ranking(order, utility, parts)
