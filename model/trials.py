"""What a learning curve runs on: a data set, a learner and a strategy; the deep learner and the instant one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.arena import Arena, Known, Learner
from model.experiment import Experiment
from model.pool import Pool
from model.scoring import NUMBERS, ImageScore
from model.strategies import NEEDS, REFERENCES, STRATEGIES

Map = NDArray[np.uint8]


class Trial(Protocol):
    """A learner on one data set; it begins knowing nothing."""

    @property
    def data(self) -> Arena | Experiment:
        """The data set."""
        ...

    @property
    def candidates(self) -> Sequence[int]:
        """The images of the pool that may be picked."""
        ...

    def learn(self, labelled: Sequence[int], times: int = 1) -> float:
        """Learn these images of the pool from the start, `times` as long as usual; returns the seconds it took."""
        ...

    def pick(self, labelled: Sequence[int], count: int) -> list[int]:
        """The images that the strategy wants next, by what was learnt."""
        ...

    def prelabel(self, index: int) -> Map:
        """(H, W) classes that were learnt to be in an image of the pool."""
        ...

    def test(self) -> NDArray[np.int64]:
        """(C, C) confusion table summed over the test images."""
        ...


class InstantTrial:
    """A head made of sums on frozen features; a seed is which part of the pool may be picked, and ties."""

    def __init__(self, data: Experiment, strategy: str, seed: int, weak: bool, coarse: bool) -> None:
        """Begin.

        Args:
            data: made ready.
            strategy: a key of `STRATEGIES` or `REFERENCES`.
            seed: of the part of the pool, of ties and of what the strategy draws.
            weak: pixels without a label teach too, as coarse labels guess them.
            coarse: the strategy knows coarse labels.
        """
        self.data, self._strategy, self._seed, self._weak, self._coarse = data, strategy, seed, weak, coarse
        self.candidates = data.available(seed)
        self._head = data.start(weak)

    def learn(self, labelled: Sequence[int], times: int = 1) -> float:
        """See `Trial`; there is nothing to take longer for."""
        self._head, seconds = self.data.train(labelled, self._weak)
        return seconds

    def pick(self, labelled: Sequence[int], count: int) -> list[int]:
        """See `Trial`."""
        rest = [index for index in self.candidates if index not in set(labelled)]
        order = self.data.order(self._strategy, self._head, rest, labelled, self._coarse, self._seed, count)
        return order[:count]

    def prelabel(self, index: int) -> Map:
        """See `Trial`."""
        return self.data.prelabel(self._head, index)

    def test(self) -> NDArray[np.int64]:
        """See `Trial`."""
        return self.data.test(self._head)


class DeepTrial:
    """A network trained by descent; a seed is its fresh head, the order of its views, and ties."""

    def __init__(self, data: Arena, learner: Learner, strategy: str, seed: int, coarse: bool, layers: str) -> None:
        """Begin.

        Args:
            data: made ready.
            learner: trains on it.
            strategy: a key of `STRATEGIES` or `REFERENCES`.
            seed: of ties and of what the strategy draws.
            coarse: the strategy knows coarse labels.
            layers: whose gradient is taken, "last", "head" or "all".
        """
        self.data, self._learner, self._strategy, self._seed = data, learner, strategy, seed
        self._coarse, self._layers = coarse, layers
        self.candidates = range(len(data.names))
        self._network = learner.start

    def learn(self, labelled: Sequence[int], times: int = 1) -> float:
        """See `Trial`."""
        self._network, seconds = self._learner.train(labelled, times)
        return seconds

    def pick(self, labelled: Sequence[int], count: int) -> list[int]:
        """See `Trial`."""
        pool = [index for index in self.candidates if index not in set(labelled)]
        rng = np.random.default_rng([self._seed, len(labelled)])
        if self._strategy == "random":  # looks at nothing, so nothing is scored
            return [pool[i] for i in rng.permutation(len(pool))[:count]]
        extras, known = NEEDS.get(self._strategy, ()), Known(self._coarse, frozenset(labelled))
        scores = self.data.score(self._network, known, extras, self._layers)
        strategy = (STRATEGIES | REFERENCES)[self._strategy]
        order = strategy(as_pool([scores[i] for i in pool], [scores[i] for i in labelled], extras), rng).order
        return [pool[int(i)] for i in order[:count]]

    def prelabel(self, index: int) -> Map:
        """See `Trial`."""
        return self.data.prelabel(self._network, index)

    def test(self) -> NDArray[np.int64]:
        """See `Trial`."""
        return self.data.test(self._network)


def as_pool(scores: Sequence[ImageScore], labelled: Sequence[ImageScore], extras: Sequence[str]) -> Pool:
    """The arrays a strategy sees."""

    def columns(rows: Sequence[ImageScore]) -> dict[str, NDArray[np.float64]]:
        found = {name: np.array([getattr(s, name) for s in rows], np.float64) for name in NUMBERS}
        return found | {e: np.array([s.extras[e] for s in rows]) for e in extras if scores[0].extras[e].ndim == 0}

    def vectors(rows: Sequence[ImageScore]) -> dict[str, NDArray[np.float64]]:
        return {e: np.array([s.extras[e] for s in rows]) for e in extras if scores[0].extras[e].ndim}

    def stacked(rows: Sequence[ImageScore], name: str) -> NDArray[np.float32]:
        return np.stack([getattr(s, name) for s in rows]) if rows else np.zeros((0, 0), np.float32)

    return Pool(
        scores=columns(scores),
        embedding=stacked(scores, "embedding"),
        features=stacked(scores, "features"),
        labelled_embedding=stacked(labelled, "embedding"),
        labelled_features=stacked(labelled, "features"),
        vectors=vectors(scores),
        labelled_vectors=vectors(labelled),
        labelled_scores=columns(labelled),
    )
