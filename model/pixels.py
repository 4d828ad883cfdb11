"""All that a score says about an image's pixels, in one walk over them; for CPUs.

The same numbers as `scoring.py` takes by torch, which stays the way on GPUs and is what tests compare with. Here the
logits are enlarged row by row, and a row stays in the processor's nearest cache until everything is known about it.
Each step is a plain loop along the row, of a form that compilers turn into instructions on many pixels at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.classes import Classes
from model.compiled import compiled, in_slabs

Floats = NDArray[np.float32]

#: Sums over pixels, in the order in which they are kept.
SUMS = ("entropy", "coarse_entropy", "least_confidence", "margin", "pseudo_loss", "foreground", "egl", "variance")
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
#: Below this share of the total, what the set allows is computed again with a maximum of its own.
FAINT = np.float32(1e-25)
#: Below any probability that counts; its logarithm is finite.
TINY = np.float32(1e-30)
#: The exponential of anything lower counts as that of this.
LOWEST = np.float32(-87.0)


class Axis(NamedTuple):
    """Bilinear enlargement of one axis: each place mixes `low` and `low + 1`, the latter by `weight`."""

    low: NDArray[np.uint32]
    weight: Floats


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


class Products(NamedTuple):
    """Inner products of neighbouring features, (h, w) each: with itself, to the right, below, across (their mean)."""

    own: Floats
    right: Floats
    below: Floats
    across: Floats


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
        wide: (C, h, W) adjoint of the vertical enlargement of p - q; of p - own where that was asked for.
        maps: of classes, confidence and foreground.
    """

    sums: dict[str, float]
    wide: Floats
    maps: Maps


@lru_cache(maxsize=16)
def axis(low: int, high: int) -> Axis:
    """How torch enlarges an axis linearly, without aligning corners."""
    # In single precision, as torch does: else weights differ by more than what they are multiplied with can stand.
    places = np.arange(high, dtype=np.float32) + HALF
    source = np.maximum(np.float32(low) / np.float32(high) * places - HALF, ZERO)
    left = np.minimum(source.astype(np.uint32), low - 1).astype(np.uint32)
    return Axis(left, np.where(left < low - 1, source - left, 0).astype(np.float32))


@lru_cache(maxsize=16)
def tables(classes: Classes) -> Tables:
    """The meaning of classes as arrays."""
    coarse = classes.coarse_of().astype(np.int32)
    named = np.array([*coarse, *range(len(classes.coarse)), -1])[:, None]
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
    sums, wide = (sum(part[which] for part in parts[1:]) + parts[0][which] for which in (0, 1))
    return Pixels(dict(zip(SUMS, sums.tolist(), strict=True)), wide, maps)


def buffers(classes: int, low: int, width: int) -> Row:
    """Room for one row."""
    deep, flat = (np.empty((3, classes, width), np.float32), np.empty((8, width), np.float32))
    ints = np.empty((2, width), np.int32)
    return Row(*deep, *flat, np.empty((2, low + 1), np.float32), *ints)


def neighbour_products(features: Sequence[Tensor]) -> Products:
    """Inner products of neighbours, summed over all last layers' inputs, (D, h, w) each."""
    grids = [layer.permute(1, 2, 0).contiguous().numpy() for layer in features]
    found = Products(*(np.zeros(grids[0].shape[:2], np.float32) for _ in Products._fields))
    for grid in grids:
        in_slabs(lambda start, stop, grid=grid: _products(start, stop, grid, found), len(grid))
    return found


@compiled
def _products(start: int, stop: int, grid: Floats, found: Products) -> None:
    height, width, depth = grid.shape
    for y in range(start, stop):
        for x in range(width):
            one, aside = grid[y, x], grid[y, min(x + 1, width - 1)]
            below, corner = grid[min(y + 1, height - 1), x], grid[min(y + 1, height - 1), min(x + 1, width - 1)]
            own, right, down, across = ZERO, ZERO, ZERO, ZERO
            for k in range(depth):
                own += one[k] * one[k]
                right += one[k] * aside[k]
                down += one[k] * below[k]
                across += one[k] * corner[k] + aside[k] * below[k]
            found.own[y, x] += own
            found.right[y, x] += right
            found.below[y, x] += down
            found.across[y, x] += across * HALF


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
            _mix(logits[c, i], logits[c, j], a, row.low[0])
            _enlarge(row.low[0], across, row.z[c])
        _probabilities(row)
        _inside(target[y], meaning, row)
        _log(row.total, row.log_total, row.bits)
        _log(row.inside, row.log_inside, row.bits)
        sums[4] += _again(target[y], meaning, row)
        _squares(products, i, j, a, across, biases, row)
        _reasons(row, sums)
        sums[1] += _between(meaning, row)
        sums[5] += _look(target[y], meaning, row, maps.prediction[y], maps.confidence[y], maps.foreground[y])
        for c in range(logits.shape[0]):
            _pull(row, c, own)
            _spread(row.q[c], ONE - a, wide[c, i])
            _spread(row.q[c], a, wide[c, j])


@compiled
def _mix(upper: Floats, lower: Floats, weight: np.float32, out: Floats) -> None:
    """Between two rows; the last value once more, so that an enlargement may look past the end."""
    for x in range(upper.shape[0]):
        out[x] = upper[x] + weight * (lower[x] - upper[x])
    out[upper.shape[0]] = out[upper.shape[0] - 1]


@compiled
def _enlarge(low: Floats, across: Axis, out: Floats) -> None:
    for x in range(out.shape[0]):
        left = across.low[x]
        out[x] = low[left] + across.weight[x] * (low[left + np.uint32(1)] - low[left])


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
        _exp(row.z[c], row.top, row.p[c], row.bits)
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
        row.total[x] = share
        row.inside[x] = ONE / row.inside[x]
        row.top[x] = ONE
        row.second[x] = ONE
    for c in range(row.p.shape[0]):
        for x in range(row.total.shape[0]):
            p, q = row.p[c, x] * row.total[x], row.q[c, x] * row.inside[x]
            entropy -= p * row.z[c, x]
            row.top[x] -= p * p
            row.second[x] -= q * q
            row.p[c, x], row.q[c, x] = p, q
    spread, spread_inside = ZERO, ZERO
    for x in range(row.total.shape[0]):
        spread += max(row.top[x], ZERO) * row.squared[x]
        spread_inside += max(row.second[x], ZERO) * row.squared[x]
    sums[0] += entropy
    sums[2] += unsure
    sums[3] += between
    sums[4] += loss
    sums[6] += spread
    sums[7] += spread_inside


@compiled
def _between(meaning: Tables, row: Row) -> float:
    """Entropy of the coarse classes."""
    found = 0.0
    for g in range(meaning.coarse.max() + 1):
        row.group[:] = TINY
        for c in range(row.p.shape[0]):
            if meaning.coarse[c] == g:
                for x in range(row.group.shape[0]):
                    row.group[x] += row.p[c, x]
        _log(row.group, row.second, row.bits)
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
        confidence[x] = np.uint8(np.int32(np.float32(255) * row.total[x] + HALF))
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


@compiled
def _spread(values: Floats, weight: np.float32, out: Floats) -> None:
    for x in range(values.shape[0]):
        out[x] += weight * values[x]


@compiled
def _exp(values: Floats, top: Floats, out: Floats, bits: NDArray[np.int32]) -> None:
    """Take `top` from values, none of which is higher, and the exponential of that; after Cephes' expf."""
    for x in range(values.shape[0]):
        values[x] -= top[x]
        v = max(values[x], LOWEST)
        n = np.floor(v * np.float32(1.44269504) + HALF)
        r = v - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        s = np.float32(1.9875691500e-4)
        s = s * r + np.float32(1.3981999507e-3)
        s = s * r + np.float32(8.3334519073e-3)
        s = s * r + np.float32(4.1665795894e-2)
        s = s * r + np.float32(1.6666665459e-1)
        s = s * r + np.float32(5.0000001201e-1)
        out[x] = s * r * r + r + ONE
        bits[x] = (np.int32(n) + np.int32(127)) << np.int32(23)
    scale = bits.view(np.float32)
    for x in range(values.shape[0]):
        out[x] *= scale[x]


@compiled
def _log(values: Floats, out: Floats, bits: NDArray[np.int32]) -> None:
    """Logarithm of positive normal numbers; after Cephes' logf."""
    source, mantissa = values.view(np.int32), bits.view(np.float32)
    for x in range(values.shape[0]):
        # Exponent such that the mantissa lies around 1: between the roots of 1/2 and 2.
        exponent = (source[x] - np.int32(0x3F3504F3)) >> np.int32(23)
        bits[x] = source[x] - (exponent << np.int32(23))
        out[x] = np.float32(exponent)
    for x in range(values.shape[0]):
        e, f = out[x], mantissa[x] - ONE
        s = np.float32(7.0376836292e-2)
        s = s * f - np.float32(1.1514610310e-1)
        s = s * f + np.float32(1.1676998740e-1)
        s = s * f - np.float32(1.2420140846e-1)
        s = s * f + np.float32(1.4249322787e-1)
        s = s * f - np.float32(1.6668057665e-1)
        s = s * f + np.float32(2.0000714765e-1)
        s = s * f - np.float32(2.4999993993e-1)
        s = s * f + np.float32(3.3333331174e-1)
        square = f * f
        low = s * f * square + e * np.float32(-2.12194440e-4) - HALF * square
        out[x] = f + low + e * np.float32(0.693359375)
