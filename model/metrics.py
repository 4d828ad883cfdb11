"""How good a mask is, and how fast a network learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.classes import IGNORE
from model.compiled import compiled


def confusion(prediction: NDArray[np.uint8], mask: NDArray[np.uint8], num_classes: int) -> NDArray[np.int64]:
    """Pixels by true and predicted class.

    Sum the tables of many images and take the IoU of the sum: the mean of per-image IoU is another number.

    Args:
        prediction: any shape, class of every pixel.
        mask: the same shape; IGNORE pixels do not count.
        num_classes: C.

    Returns:
        (C, C) rows are true classes, columns predicted ones.

    Raises:
        ValueError: sizes differ, or there is a class of C or more.
    """
    if prediction.shape != mask.shape:
        raise ValueError(f"the prediction is {prediction.shape}, the mask is {mask.shape}")
    table = pairs(np.ascontiguousarray(mask).ravel(), np.ascontiguousarray(prediction).ravel())[:IGNORE]
    if table[num_classes:].any() or table[:, num_classes:].any():
        highest = max(int(axis.max()) for axis in np.nonzero(table))
        raise ValueError(f"there is a class {highest}, but only {num_classes} classes")
    whole: NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)
    whole[:, : table.shape[1]] = table[:num_classes, :num_classes]
    return whole


@compiled
def pairs(mask: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(256, highest prediction + 1) how many pixels (P,) have a value of the mask, the row, and of the prediction."""
    highest = 0
    for value in prediction:
        highest = max(highest, value)
    table = np.zeros((2, 256, highest + 1), np.int64)
    # Neighbours are mostly alike: with two tables in turn, one need not wait for the other.
    for pixel in range(len(mask)):
        table[pixel % 2, mask[pixel], prediction[pixel]] += 1
    both: NDArray[np.int64] = table.sum(0)
    return both


def iou(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """(C,) intersection over union per class; NaN for a class that is neither there nor predicted."""
    hits = np.diag(table).astype(np.float64)
    union = table.sum(1) + table.sum(0) - hits
    return np.asarray(np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0))


def mean_iou(table: NDArray[np.int64]) -> float:
    """Mean IoU over the classes that are there or predicted; NaN when there is none."""
    found = iou(table)
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def area_under_curve(n: Sequence[float], values: Sequence[float]) -> float:
    """Area under a learning curve by the trapezoid rule, divided by its width: a mean height.

    Args:
        n: numbers of labelled images, rising.
        values: the metric at each.

    Raises:
        ValueError: fewer than two points, not as many values, or n does not rise.
    """
    x, y = np.asarray(n, float), np.asarray(values, float)
    if x.size < 2 or x.size != y.size or not (np.diff(x) > 0).all():
        raise ValueError(
            f"a learning curve needs two or more points with rising n, not n {list(n)}, values {list(values)}"
        )
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def calibration_error(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.floating], bins: int = 15
) -> float:
    """Expected calibration error: how far confidence is from accuracy, on average over pixels.

    Args:
        probabilities: (P, C), each row sums to 1.
        labels: (P,) true classes.
        weights: (P,) how much each pixel counts.
        bins: of equal width, by the highest probability.

    Source: Guo et al. 2017, equation 3.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    gaps = np.bincount(place, weights * (confidence - right), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())
