"""All that a score says about an image's pixels, in one walk over them; for CPUs.

The same numbers as `scoring.py` takes by torch, which stays the way on GPUs and is what tests compare with. Here the
logits are enlarged row by row, and a row stays in the processor's nearest cache until everything is known about it.
Each step is a plain loop along the row, of a form that compilers turn into instructions on many pixels at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.classes import Classes
from model.compiled import compiled, in_slabs
from model.grids import Products
from model.rows import HALF, ONE, ZERO, Axis, axis, enlarge, exponential, logarithm, mix, spread

Floats = NDArray[np.float32]

#: Sums over pixels, in the order in which they are kept.
SUMS = ("entropy", "coarse_entropy", "least_confidence", "margin", "pseudo_loss", "foreground", "egl", "variance")
ENTROPY, COARSE_ENTROPY, LEAST_CONFIDENCE, MARGIN, PSEUDO_LOSS, FOREGROUND, EGL, VARIANCE = range(len(SUMS))
#: Below this share of the total, what the set allows is computed again with a maximum of its own.
FAINT = np.float32(1e-25)
#: Below any probability that counts; its logarithm is finite.
TINY = np.float32(1e-30)


class Tables(NamedTuple):
    """What the classes mean.

    Attributes:
        sets: (C, K) 1 where a row of the target allows a class.
        coarse: (C,) coarse class of each class.
        foreground: (K, C) 1 where a pixel of that row and most probable class counts as foreground.
    """

    sets: Floats
    coarse: NDArray[np.int32]
    foreground: NDArray[np.uint8]


class Maps(NamedTuple):
    """(H, W) each: most probable class, its probability times 255, foreground."""

    prediction: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    foreground: NDArray[np.uint8]


class Row(NamedTuple):
    """What is known about the row at hand; (C, W) logits, p and q, else (W,) but for `low`, which is (2, w + 1)."""

    z: Floats
    p: Floats
    q: Floats
    top: Floats
    second: Floats
    total: Floats
    inside: Floats
    log_total: Floats
    log_inside: Floats
    group: Floats
    squared: Floats
    low: Floats
    best: NDArray[np.int32]
    bits: NDArray[np.int32]


class Pixels(NamedTuple):
    """What a walk over the pixels found.

    Attributes:
        sums: over pixels, by the names in `SUMS`; `egl` and `variance` are 1 - |p|^2 and 1 - |q|^2, each pixel weighed
            by its squared features.
        wide: (C, h, W) adjoint of the vertical enlargement of p - q; of p - own where the target allows any class.
        own: whether the target allows any class everywhere.
        maps: of classes, confidence and foreground.
    """

    sums: dict[str, float]
    wide: Floats
    own: bool
    maps: Maps


@lru_cache(maxsize=16)
def tables(classes: Classes) -> Tables:
    """The meaning of classes as arrays."""
    coarse, named = classes.coarse_of().astype(np.int32), classes.named()[:, None]
    foreground = np.where(named >= 0, named, coarse[None]) != 0
    return Tables(np.ascontiguousarray(classes.sets().T, np.float32), coarse, foreground.astype(np.uint8))


def walk(logits: Floats, target: NDArray[np.uint8], classes: Classes, products: Products, biases: int) -> Pixels:
    """Everything about the pixels of an image.

    Args:
        logits: (C, h, w) as the network gives them, not yet enlarged; finite.
        target: (H, W) rows of `classes.sets()`; where it is any class everywhere, `wide` is of p - own.
        classes: fine and coarse classes.
        products: of the last layers' inputs.
        biases: how many last layers there are.
    """
    maps = Maps(*(np.empty(target.shape, np.uint8) for _ in Maps._fields))
    down, across = axis(logits.shape[1], target.shape[0]), axis(logits.shape[2], target.shape[1])
    meaning, own = tables(classes), bool((target == classes.any_row).all())

    def slab(start: int, stop: int) -> tuple[NDArray[np.float64], Floats]:
        sums, wide = np.zeros(len(SUMS)), np.zeros((*logits.shape[:2], target.shape[1]), np.float32)
        row = buffers(len(logits), logits.shape[2], target.shape[1])
        _rows(start, stop, logits, target, meaning, down, across, products, biases, own, row, maps, wide, sums)
        return sums, wide

    parts = in_slabs(slab, len(target))
    sums, wide = (sum(part[which] for part in parts) for which in range(2))
    return Pixels(dict(zip(SUMS, sums.tolist(), strict=True)), wide, own, maps)


def buffers(classes: int, low: int, width: int) -> Row:
    """Room for one row."""
    z, p, q = np.empty((3, classes, width), np.float32)
    best, bits = np.empty((2, width), np.int32)
    top, second, total, inside, log_total, log_inside, group, squared = np.empty((8, width), np.float32)
    both = np.empty((2, low + 1), np.float32)
    return Row(z, p, q, top, second, total, inside, log_total, log_inside, group, squared, both, best, bits)


@compiled
def _rows(
    start: int,
    stop: int,
    logits: Floats,
    target: NDArray[np.uint8],
    meaning: Tables,
    down: Axis,
    across: Axis,
    products: Products,
    biases: int,
    own: bool,
    row: Row,
    maps: Maps,
    wide: Floats,
    sums: NDArray[np.float64],
) -> None:
    last = logits.shape[1] - 1
    for y in range(start, stop):
        i, a = down.low[y], down.weight[y]
        j = min(i + 1, last)
        for c in range(logits.shape[0]):
            mix(logits[c, i], logits[c, j], a, row.low[0])
            enlarge(row.low[0], across, row.z[c])
        _probabilities(row)
        _inside(target[y], meaning, row)
        logarithm(row.total, row.log_total, row.bits)
        logarithm(row.inside, row.log_inside, row.bits)
        sums[PSEUDO_LOSS] += _again(target[y], meaning, row)
        _squares(products, i, j, a, across, biases, row)
        _reasons(row, sums)
        sums[COARSE_ENTROPY] += _between(meaning, row)
        sums[FOREGROUND] += _look(target[y], meaning, row, maps.prediction[y], maps.confidence[y], maps.foreground[y])
        for c in range(logits.shape[0]):
            _pull(row, c, own)
            spread(row.q[c], ONE - a, wide[c, i])
            spread(row.q[c], a, wide[c, j])


@compiled
def _probabilities(row: Row) -> None:
    """The highest logit and its class, logits less that, p not yet divided by its total, and the second of it."""
    row.top[:] = row.z[0]
    row.best[:] = 0
    for c in range(1, row.z.shape[0]):
        for x in range(row.top.shape[0]):
            higher = row.z[c, x] > row.top[x]
            row.best[x] = np.int32(c) if higher else row.best[x]
            row.top[x] = row.z[c, x] if higher else row.top[x]
    row.total[:] = 0
    row.group[:] = 0
    row.second[:] = 0
    for c in range(row.z.shape[0]):
        exponential(row.z[c], row.top, row.p[c], row.bits)
        for x in range(row.top.shape[0]):
            value = row.p[c, x]
            row.total[x] += value
            row.second[x] = max(row.second[x], min(row.group[x], value))
            row.group[x] = max(row.group[x], value)


@compiled
def _inside(target: NDArray[np.uint8], meaning: Tables, row: Row) -> None:
    """q, not yet divided by its total."""
    row.inside[:] = 0
    for c in range(row.p.shape[0]):
        allowed = meaning.sets[c]
        for x in range(target.shape[0]):
            row.q[c, x] = row.p[c, x] * allowed[target[x]]
            row.inside[x] += row.q[c, x]


@compiled
def _again(target: NDArray[np.uint8], meaning: Tables, row: Row) -> float:
    """Where the network is certain of a class outside the set: q with a maximum of its own; returns the loss to add."""
    lowest = ONE
    for x in range(target.shape[0]):
        lowest = min(lowest, row.inside[x])
    if lowest >= FAINT:
        return 0.0
    more = 0.0
    for x in range(target.shape[0]):
        if row.inside[x] >= FAINT:
            continue
        top, total = -np.inf, 0.0
        for c in range(row.z.shape[0]):
            if meaning.sets[c, target[x]] > 0:
                top = max(top, row.z[c, x])
        for c in range(row.z.shape[0]):
            row.q[c, x] = np.exp(row.z[c, x] - top) if meaning.sets[c, target[x]] > 0 else 0.0
            total += row.q[c, x]
        more += row.log_inside[x] - (top + np.log(total))
        row.inside[x] = total
    return more


@compiled
def _squares(products: Products, i: int, j: int, a: np.float32, across: Axis, biases: int, row: Row) -> None:
    """Squared features along the row; see `gradients.squared_features`."""
    same, beside, width = row.low[0], row.low[1], products.own.shape[1]
    u, v, w = (ONE - a) * (ONE - a), a * a, np.float32(2) * a * (ONE - a)
    for x in range(width):
        same[x] = u * products.own[i, x] + v * products.own[j, x] + w * products.below[i, x]
        beside[x] = np.float32(2) * (u * products.right[i, x] + v * products.right[j, x] + w * products.across[i, x])
    same[width] = same[width - 1]
    for x in range(row.squared.shape[0]):
        left, b = across.low[x], across.weight[x]
        rest = ONE - b
        row.squared[x] = (
            rest * rest * same[left] + b * b * same[left + np.uint32(1)] + b * rest * beside[left] + np.float32(biases)
        )


@compiled
def _reasons(row: Row, sums: NDArray[np.float64]) -> None:
    """Divide p and q by their totals, and add up what the row says."""
    loss, unsure, between, entropy = ZERO, ZERO, ZERO, ZERO
    for x in range(row.total.shape[0]):
        share = ONE / row.total[x]
        loss += row.log_total[x] - row.log_inside[x]
        unsure += (row.total[x] - ONE) * share
        between += (ONE - row.second[x]) * share
        entropy += row.log_total[x]
        row.top[x] = ONE
        row.second[x] = ONE
    for c in range(row.p.shape[0]):
        for x in range(row.total.shape[0]):
            p, q = row.p[c, x] / row.total[x], row.q[c, x] / row.inside[x]
            entropy -= p * row.z[c, x]
            row.top[x] -= p * p
            row.second[x] -= q * q
            row.p[c, x], row.q[c, x] = p, q
    spread, spread_inside = ZERO, ZERO
    for x in range(row.total.shape[0]):
        spread += max(row.top[x], ZERO) * row.squared[x]
        spread_inside += max(row.second[x], ZERO) * row.squared[x]
    sums[ENTROPY] += entropy
    sums[LEAST_CONFIDENCE] += unsure
    sums[MARGIN] += between
    sums[PSEUDO_LOSS] += loss
    sums[EGL] += spread
    sums[VARIANCE] += spread_inside


@compiled
def _between(meaning: Tables, row: Row) -> np.float64:
    """Entropy of the coarse classes."""
    found = np.float64(0)
    for g in range(meaning.coarse.max() + 1):
        row.group[:] = TINY
        for c in range(row.p.shape[0]):
            if meaning.coarse[c] == g:
                for x in range(row.group.shape[0]):
                    row.group[x] += row.p[c, x]
        logarithm(row.group, row.second, row.bits)
        part = ZERO
        for x in range(row.group.shape[0]):
            part -= row.group[x] * row.second[x]
        found += part
    return found


@compiled
def _look(
    target: NDArray[np.uint8],
    meaning: Tables,
    row: Row,
    prediction: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    foreground: NDArray[np.uint8],
) -> int:
    """The row of each map; returns how many pixels are foreground."""
    for x in range(target.shape[0]):
        prediction[x] = np.uint8(row.best[x])
        confidence[x] = np.uint8(np.int32(np.float32(255) / row.total[x] + HALF))
    found = 0
    for x in range(target.shape[0]):
        foreground[x] = meaning.foreground[target[x], prediction[x]]
        found += foreground[x]
    return found


@compiled
def _pull(row: Row, c: int, own: bool) -> None:
    """The gradient at the logits of one class takes the place of q."""
    if own:
        for x in range(row.best.shape[0]):
            row.q[c, x] = row.p[c, x] - (ONE if row.best[x] == c else ZERO)
    else:
        for x in range(row.best.shape[0]):
            row.q[c, x] = row.p[c, x] - row.q[c, x]
