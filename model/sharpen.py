"""Masks at full resolution: a head's coarse logits enlarged along the edges of the image.

Source: He, Sun and Tang 2013, guided image filtering; He and Sun 2015, the fast form: its coefficients are found at the
resolution of the logits and enlarged, then applied to the image in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: Radius of the filter's windows in cells of the maps, and variance of colour (0 to 1) below which it blurs.
RADIUS, EDGE = 3, 1e-5


@dataclass(frozen=True)
class Guide:
    """An image, and what sharpening along its edges needs to know of it.

    Attributes:
        image: (H, W, 3) RGB in 0 to 1.
        small: (h, w, 3) the same at the resolution of the maps.
        mean: (h, w, 3) of the windows around each cell.
        inverse: (h, w, 3, 3) of the windows' covariance.
        radius: of the windows, in cells.
    """

    image: Floats
    small: Floats
    mean: Floats
    inverse: Floats
    radius: int


def guide_of(image: NDArray[np.uint8], size: tuple[int, int], radius: int = RADIUS, edge: float = EDGE) -> Guide:
    """Make an image ready.

    Args:
        image: (H, W, 3) RGB.
        size: height and width of the maps.
        radius: of the windows in which a map is taken for a linear function of the image's colour, in cells.
        edge: variance of a colour channel below which a difference counts as noise.
    """
    large: Floats = np.asarray(image / np.float32(255), np.float32)
    small: Floats = np.asarray(cv2.resize(large, size[::-1], interpolation=cv2.INTER_AREA), np.float32)
    mean, pairs = box(small, radius), small[..., :, None] * small[..., None, :]
    spread = box(pairs.reshape(*size, 9), radius).reshape(pairs.shape)
    covariance = spread - mean[..., :, None] * mean[..., None, :] + edge * np.eye(3, dtype=np.float32)
    return Guide(large, small, mean, np.asarray(np.linalg.inv(covariance), np.float32), radius)


def sharpen(probabilities: Floats, guide: Guide) -> Floats:
    """Enlarge maps to an image's size so that their edges follow the image's.

    Args:
        probabilities: (C, h, w) of each class, at the size that the guide was made for.
        guide: the image.

    Returns:
        (C, H, W), which sum to 1 over classes as the maps do, but may lie a little outside 0 to 1.
    """
    size = (guide.image.shape[1], guide.image.shape[0])
    sharpened = np.empty((len(probabilities), *guide.image.shape[:2]), np.float32)
    for number, values in enumerate(probabilities):
        parts = coefficients(values, guide)
        slope, offset = (resized(part, size) for part in parts)
        sharpened[number] = np.einsum("hwc,hwc->hw", slope, guide.image) + offset
    return sharpened


def coefficients(values: Floats, guide: Guide) -> tuple[Floats, Floats]:
    """Slope (h, w, 3) and offset (h, w) of the linear function of colour that a map (h, w) is closest to.

    Each is the mean over all windows that a cell is in.
    """
    level = box(values, guide.radius)
    together = box(guide.small * values[..., None], guide.radius) - guide.mean * level[..., None]
    slope = (guide.inverse @ together[..., None])[..., 0]
    return box(slope, guide.radius), box(level - (slope * guide.mean).sum(2), guide.radius)


def resized(values: Floats, size: tuple[int, int]) -> Floats:
    """(H, W, ...) values (h, w, ...) at another width and height, bilinearly."""
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_LINEAR), np.float32)


def box(values: Floats, radius: int) -> Floats:
    """(h, w, ...) mean over squares, mirrored at the edges."""
    side = 2 * radius + 1
    if values.ndim == 2:
        return np.asarray(cv2.blur(values, (side, side)), np.float32)
    # OpenCV takes no more than four channels at a time.
    return np.dstack([cv2.blur(values[..., i : i + 4], (side, side)) for i in range(0, values.shape[2], 4)])
