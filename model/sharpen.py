"""Masks at full resolution: a head's coarse logits enlarged along the edges of the image.

Source: He, Sun and Tang 2013, guided image filtering; He and Sun 2015, the fast form: its coefficients are found at the
resolution of the logits and enlarged, then applied to the image in full.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: Radius of the filter's windows in cells of the maps, and variance of colour (0 to 1) below which it blurs.
RADIUS, EDGE = 3, 1e-5


def sharpen(probabilities: Floats, image: NDArray[np.uint8], radius: int = RADIUS, edge: float = EDGE) -> Floats:
    """Enlarge maps to an image's size so that their edges follow the image's.

    Args:
        probabilities: (C, h, w) of each class, at a stride of the image.
        image: (H, W, 3) RGB.
        radius: of the windows in which a map is taken for a linear function of the image's colour, in cells.
        edge: variance of a colour channel below which a difference counts as noise.

    Returns:
        (C, H, W), which sum to 1 over classes as the maps do, but may lie a little outside 0 to 1.
    """
    guide = image.astype(np.float32) / 255
    small: Floats = np.asarray(cv2.resize(guide, probabilities.shape[:0:-1], interpolation=cv2.INTER_AREA), np.float32)
    slopes, offsets = coefficients(probabilities, small, radius, edge)
    size = (image.shape[1], image.shape[0])
    sharpened = np.empty((len(probabilities), *image.shape[:2]), np.float32)
    for number, (slope, offset) in enumerate(zip(slopes, offsets, strict=True)):
        slope, offset = (cv2.resize(values, size, interpolation=cv2.INTER_LINEAR) for values in (slope, offset))
        np.einsum("hwc,hwc->hw", slope, guide, out=sharpened[number])
        sharpened[number] += offset
    return sharpened


def coefficients(maps: Floats, guide: Floats, radius: int, edge: float) -> tuple[Floats, Floats]:
    """Slopes (C, h, w, 3) and offsets (C, h, w) of the linear functions of colour that maps (C, h, w) are closest to.

    Each is the mean over all windows that a cell is in.
    """
    mean = box(guide, radius)
    pairs = guide[..., :, None] * guide[..., None, :]
    spread = box(pairs.reshape(*guide.shape[:2], 9), radius).reshape(pairs.shape)
    covariance = spread - mean[..., :, None] * mean[..., None, :] + edge * np.eye(3, dtype=np.float32)
    inverse = np.linalg.inv(covariance)
    slopes, offsets = np.empty((*maps.shape, 3), np.float32), np.empty(maps.shape, np.float32)
    for number, values in enumerate(maps):
        level = box(values, radius)
        together = box(guide * values[..., None], radius) - mean * level[..., None]
        slope = np.einsum("hwij,hwj->hwi", inverse, together)
        slopes[number] = box(slope, radius)
        offsets[number] = box(level - (slope * mean).sum(2), radius)
    return slopes, offsets


def box(values: Floats, radius: int) -> Floats:
    """(h, w, ...) mean over squares, mirrored at the edges."""
    side = 2 * radius + 1
    if values.ndim == 2:
        return np.asarray(cv2.blur(values, (side, side)), np.float32)
    # OpenCV takes no more than four channels at a time.
    return np.dstack([cv2.blur(values[..., i : i + 4], (side, side)) for i in range(0, values.shape[2], 4)])
