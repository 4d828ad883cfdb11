"""Masks at full resolution: a head's coarse probabilities enlarged along the edges of the image.

Source: He, Sun and Tang 2013, guided image filtering; He and Sun 2015, the fast form: its coefficients are found at the
resolution of the probabilities and enlarged, then applied to the image in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

#: Radius of the filter's windows in cells of the maps, and variance of colour (0 to 1) below which it blurs.
RADIUS, EDGE = 3, 1e-5
#: Values that differ by less are equal: classes of equal probability stay so, however they are rounded.
EQUAL = 1e-4


@dataclass(frozen=True)
class Guide:
    """An image, and what sharpening along its edges needs to know of it.

    Attributes:
        image: (3, H, W) RGB.
        small: (h, w, 3) the same at the resolution of the maps, in 0 to 1.
        mean: (h, w, 3) of the windows around each cell.
        inverse: (h, w, 3, 3) of the windows' covariance.
        radius: of the windows, in cells.
    """

    image: Bytes
    small: Floats
    mean: Floats
    inverse: Floats
    radius: int


def guide_of(image: Bytes, size: tuple[int, int], radius: int = RADIUS, edge: float = EDGE) -> Guide:
    """Make an image ready.

    Args:
        image: (H, W, 3) RGB.
        size: height and width of the maps.
        radius: of the windows in which a map is taken for a linear function of the image's colour, in cells.
        edge: variance of a colour channel below which a difference counts as noise.
    """
    large = np.asarray(image, np.float32) / np.float32(255)
    small: Floats = np.asarray(cv2.resize(large, size[::-1], interpolation=cv2.INTER_AREA), np.float32)
    pairs = weighed(np.ascontiguousarray(small.transpose(2, 0, 1)), small)
    means = box(pairs.reshape(*size, 12), radius).reshape(pairs.shape)
    mean = np.ascontiguousarray(means[..., 3])
    return Guide(np.stack(cv2.split(image)), small, mean, inverted(means, edge), radius)


def sharpen(probabilities: Floats, guide: Guide) -> Floats:
    """Enlarge maps to an image's size so that their edges follow the image's.

    Args:
        probabilities: (C, h, w) of each class, at the size that the guide was made for; they sum to 1 over classes.
        guide: the image.

    Returns:
        (C, H, W), which sum to 1 over classes too, but may lie a little outside 0 to 1.
    """
    # What is left of 1 is the last class: enlarging is linear, and leaves a map of ones as it is.
    return applied(coefficients(probabilities[:-1], guide), guide.image)


def coefficients(maps: Floats, guide: Guide) -> Floats:
    """(h, w, C, 4) slopes and offset of the linear function of colour that each map (C, h, w) is closest to.

    Each is the mean over all windows that a cell is in.
    """
    size, pairs = maps.shape[1:], weighed(np.ascontiguousarray(maps), guide.small)
    means = box(pairs.reshape(*size, 4 * len(maps)), guide.radius).reshape(pairs.shape)
    fitted = fit(means, guide.mean, guide.inverse)
    return box(fitted.reshape(*size, 4 * len(maps)), guide.radius).reshape(pairs.shape)


@compiled
def weighed(maps: Floats, small: Floats) -> Floats:
    """(h, w, C, 4) each map (C, h, w) times each colour (h, w, 3), then the map itself."""
    classes, height, width = maps.shape
    result = np.empty((height, width, classes, 4), np.float32)
    for row in range(height):
        for c in range(classes):
            for column in range(width):
                value = maps[c, row, column]
                for colour in range(3):
                    result[row, column, c, colour] = value * small[row, column, colour]
                result[row, column, c, 3] = value
    return result


@compiled
def inverted(means: Floats, edge: float) -> Floats:
    """(h, w, 3, 3) inverse covariance of colour, `edge` added to each variance, of what `weighed` gives of colours."""
    height, width = means.shape[:2]
    result = np.empty((height, width, 3, 3), np.float32)
    a = np.empty((3, 3), np.float64)
    for row in range(height):
        for column in range(width):
            m = means[row, column]
            for i in range(3):
                for j in range(3):
                    a[i, j] = m[i, j] - m[i, 3] * m[j, 3]
                a[i, i] += edge
            first = a[1, 1] * a[2, 2] - a[1, 2] * a[2, 1]
            second = a[1, 2] * a[2, 0] - a[1, 0] * a[2, 2]
            third = a[1, 0] * a[2, 1] - a[1, 1] * a[2, 0]
            scale = 1 / (a[0, 0] * first + a[0, 1] * second + a[0, 2] * third)
            for i in range(3):
                for j in range(3):
                    k, n, p, q = (i + 1) % 3, (i + 2) % 3, (j + 1) % 3, (j + 2) % 3
                    result[row, column, j, i] = scale * (a[k, p] * a[n, q] - a[k, q] * a[n, p])
    return result


@compiled
def fit(means: Floats, mean: Floats, inverse: Floats) -> Floats:
    """(h, w, C, 4) slopes and offset of each window, of the means of what `weighed` gives."""
    height, width, classes, _ = means.shape
    result = np.empty_like(means)
    for row in range(height):
        for column in range(width):
            for c in range(classes):
                level = means[row, column, c, 3]
                offset = level
                for i in range(3):
                    slope = np.float32(0)
                    for j in range(3):
                        together = means[row, column, c, j] - mean[row, column, j] * level
                        slope += inverse[row, column, i, j] * together
                    result[row, column, c, i] = slope
                    offset -= slope * mean[row, column, i]
                result[row, column, c, 3] = offset
    return result


def box(values: Floats, radius: int) -> Floats:
    """(h, w, K) mean over squares of values (h, w, K), mirrored at the edges."""
    height, width, _ = values.shape
    return means_over(np.ascontiguousarray(values), mirrored(height, radius), mirrored(width, radius))


@lru_cache(maxsize=64)
def mirrored(length: int, radius: int) -> NDArray[np.intp]:
    """(length + 2 radius,) places of a line mirrored at its ends, which are not repeated."""
    period = max(2 * (length - 1), 1)
    place = np.arange(-radius, length + radius) % period
    return np.asarray(np.minimum(place, period - place), np.intp)


@compiled
def means_over(values: Floats, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Floats:
    """(h, w, K) means of values over windows; each window is 1 + len(rows) - h rows of those named, columns alike."""
    height, width, channels = values.shape
    side, radius = 1 + len(rows) - height, (len(columns) - width) // 2
    result = np.zeros((height, width * channels), np.float32)
    line, share = np.empty(len(columns) * channels, np.float32), np.float32(1 / side**2)
    for row in range(height):
        middle, out = line[radius * channels : (radius + width) * channels], result[row]
        middle[:] = values[rows[row]].ravel()
        for aside in range(1, side):
            add(middle, values[rows[row + aside]].ravel())
        for column in range(len(columns)):
            if not radius <= column < radius + width:
                for k in range(channels):
                    line[column * channels + k] = middle[columns[column] * channels + k]
        for aside in range(side):
            add(out, line[aside * channels : aside * channels + len(out)])
        for i in range(len(out)):
            out[i] *= share
    return result.reshape(values.shape)


@compiled
def add(total: Floats, values: Floats) -> None:
    """Add values (n,) to a total (n,)."""
    for i in range(len(total)):
        total[i] += values[i]


def applied(fitted: Floats, image: Bytes) -> Floats:
    """(C + 1, H, W) linear functions of colour (h, w, C, 4), bilinearly enlarged to an image (3, H, W) and applied.

    The last is what the others leave of 1.
    """
    rows, columns = (places(image.shape[1 + axis], fitted.shape[axis]) for axis in (0, 1))
    return apply_rows(np.ascontiguousarray(fitted.transpose(0, 2, 3, 1)), image, *rows, *columns)


@lru_cache(maxsize=64)
def places(length: int, cells: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Between which cells of a line each of its pixels lies, and how near to the second of them, 0 to 1."""
    middle = (np.arange(length) + 0.5) * (cells / length) - 0.5
    first = np.floor(middle).astype(np.intp)
    nearness = (middle - first).astype(np.float32)
    return first.clip(0, cells - 1), (first + 1).clip(0, cells - 1), nearness


@compiled
def apply_rows(
    fitted: Floats,
    image: Bytes,
    above: NDArray[np.intp],
    below: NDArray[np.intp],
    down: Floats,
    before: NDArray[np.intp],
    after: NDArray[np.intp],
    along: Floats,
) -> Floats:
    """What `applied` says, of fitted (h, C, 4, w), and `places` of rows and of columns."""
    _, height, width = image.shape
    classes = fitted.shape[1]
    result = np.empty((classes + 1, height, width), np.float32)
    first, second = np.empty((classes, 4, width), np.float32), np.empty((classes, 4, width), np.float32)
    colours, left = np.empty((3, width), np.float32), np.empty(width, np.float32)
    for row in range(height):
        if row == 0:
            widen(fitted[above[row]], before, after, along, second)
        # Cells are no smaller than pixels: what was below is above next.
        if row == 0 or above[row] != above[row - 1] or below[row] != below[row - 1]:
            first, second = second, first
            widen(fitted[below[row]], before, after, along, second)
        for i in range(3):
            for column in range(width):
                colours[i, column] = np.float32(image[i, row, column]) * np.float32(1 / 255)
        left[:] = np.float32(1)
        for c in range(classes):
            apply_line(first[c], second[c], down[row], colours, result[c, row], left)
        result[classes, row] = left
    return result


@compiled
def widen(cells: Floats, before: NDArray[np.intp], after: NDArray[np.intp], along: Floats, out: Floats) -> None:
    """Write a row of cells (C, 4, w) bilinearly enlarged to (C, 4, W)."""
    for c in range(out.shape[0]):
        for i in range(4):
            line = cells[c, i]
            for column in range(out.shape[2]):
                one, other = line[before[column]], line[after[column]]
                out[c, i, column] = one + along[column] * (other - one)


@compiled
def apply_line(above: Floats, below: Floats, near: float, colours: Floats, out: Floats, left: Floats) -> None:
    """Write a line of pixels, and take it from what is left.

    Args:
        above: (4, W) slopes and offset of the cells above.
        below: (4, W) of those below.
        near: how near the line is to those below, 0 to 1.
        colours: (3, W) of the line, 0 to 1.
        out: (W,) is written.
        left: (W,) is lessened.
    """
    far = np.float32(1) - near
    for x in range(len(out)):
        value = far * above[3, x] + near * below[3, x]
        value += (far * above[0, x] + near * below[0, x]) * colours[0, x]
        value += (far * above[1, x] + near * below[1, x]) * colours[1, x]
        value += (far * above[2, x] + near * below[2, x]) * colours[2, x]
        out[x] = value
        left[x] -= value


@compiled
def strongest(maps: Floats, classes: Bytes) -> tuple[Bytes, Floats]:
    """(H, W) class of the highest of maps (C, H, W), of equal ones the first, and (H, W) its value.

    Args:
        maps: one for each class.
        classes: (C,) their numbers.
    """
    _, height, width = maps.shape
    best, value = np.full((height, width), classes[0], np.uint8), maps[0].copy()
    for row in range(height):
        for c in range(1, len(classes)):
            for column in range(width):
                if maps[c, row, column] > value[row, column] + np.float32(EQUAL):
                    value[row, column] = maps[c, row, column]
                    best[row, column] = classes[c]
    return best, value
