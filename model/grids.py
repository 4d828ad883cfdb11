"""What is taken from the inputs of the last layers and from the backbone's output, cell by cell; for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.compiled import compiled, in_slabs
from model.rows import HALF, ZERO, Axis, reduce

Floats = NDArray[np.float32]


class Products(NamedTuple):
    """Inner products of neighbouring features, (h, w) each: with itself, to the right, below, across (their mean)."""

    own: Floats
    right: Floats
    below: Floats
    across: Floats


def grid(features: Tensor) -> Floats:
    """(h, w, D) of features (D, h, w); no copy where channels come last in memory."""
    return np.asarray(features.permute(1, 2, 0).contiguous().numpy())


def neighbour_products(grids: Sequence[Floats]) -> Products:
    """Inner products of neighbours, summed over all last layers' inputs, (h, w, D) each."""
    found = Products(*(np.zeros(grids[0].shape[:2], np.float32) for _ in Products._fields))
    for one in grids:
        in_slabs(partial(_products, grid=one, found=found), len(one))
    return found


def embedding(wide: Floats, across: Axis, grids: Sequence[Floats], pixels: int) -> Floats:
    """`gradients.gradient_embedding`, from the gradient at logits that are still as wide as the image.

    Args:
        wide: (C, h, W) sums over pixels.
        across: by which the logits were enlarged from w to W.
        grids: per last layer (h, w, D), its input.
        pixels: H * W.
    """
    low, parts = np.zeros((*wide.shape[:2], grids[0].shape[1]), np.float32), []
    in_slabs(lambda start, stop: _narrow(start, stop, wide, across, low), wide.shape[1])
    bias = low.sum((1, 2), dtype=np.float64)
    for one in grids:
        outer = in_slabs(partial(_outer, low=low, grid=one), len(one))
        parts += [np.ravel(sum(outer)), bias]
    return np.asarray(np.concatenate(parts) / pixels, np.float32)


def pooled(features: Floats, foreground: NDArray[np.uint8]) -> Floats:
    """(2 F,) means of features (h, w, F) over the image and over the foreground, a map (H, W) of 0 and 1."""
    found = in_slabs(lambda start, stop: _means(start, stop, features, foreground), len(features))
    whole, inside, share = (sum(part[which] for part in found) for which in range(3))
    whole = whole / features[..., 0].size
    return np.asarray(np.concatenate([whole, inside / share if share else whole]), np.float32)


def looked_up(image: NDArray[np.uint8], table: Floats) -> Floats:
    """(H, W, 3) what a table (256, 3) has for each channel of each pixel of an image (H, W, 3)."""
    found = np.empty(image.shape, np.float32)
    in_slabs(lambda start, stop: _look_up(start, stop, image, table, found), len(image))
    return found


@compiled
def _look_up(start: int, stop: int, image: NDArray[np.uint8], table: Floats, found: Floats) -> None:
    for y in range(start, stop):
        for x in range(image.shape[1]):
            for channel in range(3):
                found[y, x, channel] = table[image[y, x, channel], channel]


@compiled
def _narrow(start: int, stop: int, wide: Floats, across: Axis, low: Floats) -> None:
    for c in range(wide.shape[0]):
        for y in range(start, stop):
            reduce(wide[c, y], across, low[c, y])


@compiled
def _outer(start: int, stop: int, low: Floats, grid: Floats) -> NDArray[np.float64]:
    classes, depth = low.shape[0], grid.shape[2]
    total, row = np.zeros((classes, depth)), np.empty((classes, depth), np.float32)
    for y in range(start, stop):
        row[:] = 0  # a row in single precision, their sum in double
        for x in range(grid.shape[1]):
            for c in range(classes):
                weight = low[c, y, x]
                for k in range(depth):
                    row[c, k] += weight * grid[y, x, k]
        total += row
    return total


@compiled
def _means(
    start: int, stop: int, features: Floats, foreground: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.float64], np.float64]:
    """Sums of features over cells start..stop, the same times each cell's share of foreground, and of the shares."""
    height, width, depth = features.shape
    whole, inside, shares = np.zeros(depth), np.zeros(depth), np.float64(0)
    row, part = np.empty(depth, np.float32), np.empty(depth, np.float32)
    for y in range(start, stop):
        row[:] = 0
        part[:] = 0
        for x in range(width):
            share = _share(foreground, y, x, height, width)
            shares += share
            for k in range(depth):
                row[k] += features[y, x, k]
                part[k] += share * features[y, x, k]
        whole += row
        inside += part
    return whole, inside, shares


@compiled
def _share(foreground: NDArray[np.uint8], y: int, x: int, height: int, width: int) -> np.float32:
    """Mean of a map's block that belongs to a cell, as torch's adaptive pooling divides it."""
    tall, broad = foreground.shape
    top, bottom = y * tall // height, -(-(y + 1) * tall // height)
    left, right = x * broad // width, -(-(x + 1) * broad // width)
    found = 0
    for i in range(top, bottom):
        for j in range(left, right):
            found += foreground[i, j]
    return np.float32(found / ((bottom - top) * (right - left)))


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
