"""Orders of large pools beside the least work they can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from backend.perf import Item, compare, processor
from model.spread import farthest_first, unit


def items() -> Iterator[Item]:
    """Every figure about ranking: farthest-first places beside one matrix-vector product each."""
    vectors = clustered(100_000, 512)
    none, weight = np.zeros((0, 512), np.float32), np.ones(len(vectors))
    for places, target in ((100, 0.50), (300, 0.45)):
        calls: dict[str, Callable[[], object]] = {
            "select": partial(farthest_first, vectors, none, weight, np.random.default_rng(0), places),
            "matvec": partial(products, vectors, places),
        }
        times = compare(calls, 5, processor())
        yield times.item(f"select/matvec {places}", target, "select", "matvec", f"{places} matrix-vector products")


def products(vectors: NDArray[np.float32], count: int) -> object:
    """As many matrix-vector products."""
    return [vectors @ vectors[place] for place in range(count)]


def clustered(size: int, width: int) -> NDArray[np.float32]:
    """(size, width) directions in clusters, as those of images are."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, width))
    found = centres[rng.integers(0, 200, size)] + 0.7 * rng.normal(size=(size, width))
    return unit(found)
