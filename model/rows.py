"""Steps along a row of numbers, each a loop that compilers turn into instructions on many numbers at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled

Floats = NDArray[np.float32]

ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
#: The exponential of anything lower counts as that of this.
LOWEST = np.float32(-87.0)


class Axis(NamedTuple):
    """Bilinear enlargement of one axis: each place mixes `low` and `low + 1`, the latter by `weight`."""

    low: NDArray[np.uint32]
    weight: Floats


@lru_cache(maxsize=16)
def axis(low: int, high: int) -> Axis:
    """How torch enlarges an axis linearly, without aligning corners."""
    # In single precision, as torch does: else weights differ by more than what they are multiplied with can stand.
    places = np.arange(high, dtype=np.float32) + HALF
    source = np.maximum(np.float32(low) / np.float32(high) * places - HALF, ZERO)
    left = np.minimum(source.astype(np.uint32), low - 1).astype(np.uint32)
    return Axis(left, np.where(left < low - 1, source - left, 0).astype(np.float32))


@compiled
def mix(upper: Floats, lower: Floats, weight: np.float32, out: Floats) -> None:
    """Between two rows; the last value once more, so that an enlargement may look past the end."""
    for x in range(upper.shape[0]):
        out[x] = upper[x] + weight * (lower[x] - upper[x])
    out[upper.shape[0]] = out[upper.shape[0] - 1]


@compiled
def enlarge(low: Floats, across: Axis, out: Floats) -> None:
    """A row enlarged; `low` has one value more than `across` knows."""
    for x in range(out.shape[0]):
        left = across.low[x]
        out[x] = low[left] + across.weight[x] * (low[left + np.uint32(1)] - low[left])


@compiled
def reduce(values: Floats, across: Axis, out: Floats) -> None:
    """The adjoint of `enlarge`, without the value past the end: adds to `out`."""
    last = out.shape[0] - 1
    for x in range(values.shape[0]):
        left, part = across.low[x], across.weight[x] * values[x]
        out[left] += values[x] - part
        out[min(left + 1, last)] += part


@compiled
def spread(values: Floats, weight: np.float32, out: Floats) -> None:
    """Add values times a weight."""
    for x in range(values.shape[0]):
        out[x] += weight * values[x]


@compiled
def exponential(values: Floats, top: Floats, out: Floats, bits: NDArray[np.int32]) -> None:
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
def logarithm(values: Floats, out: Floats, bits: NDArray[np.int32]) -> None:
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
