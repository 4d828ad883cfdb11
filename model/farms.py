"""The two farms of the rendered fields, and where things are in one picture of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from model.plants import Floats, Range, Species

Style = Literal["source", "target"]

#: Binary digits after the point in coordinates to draw at.
SHIFT = 4
#: Lengths below are in pixels of an image this wide.
WIDTH = 480


@dataclass(frozen=True)
class Farm:
    """What the images of one style share."""

    crop: Species
    weeds: tuple[Species, ...]
    soil: tuple[int, int, int]
    clods: float
    stones: Range
    straw: Range
    light: tuple[float, float, float]
    shadow: Range
    row_distance: Range
    plant_distance: Range
    tilt: Range


BEET = Species((7, 11), (20, 31), (0.42, 0.55), 0.25, 0.6, 0, 0.5, False, (80, 130, 56))
MAIZE = Species((5, 7), (34, 56), (0.1, 0.15), 0.0, 0.35, 0, 1.1, True, (90, 134, 62))
CHICKWEED = Species((4, 9), (5, 9), (0.7, 0.95), 0.15, 0.5, 0, 0.2, False, (92, 138, 62))
GRASS = Species((5, 12), (10, 22), (0.07, 0.1), 0.0, 0.3, 0, 1.0, False, (98, 140, 66))
THISTLE = Species((6, 10), (14, 26), (0.4, 0.5), 0.05, 0.55, 4, 0.3, False, (86, 120, 80))
CLOVER = Species((9, 20), (6, 11), (0.75, 0.95), 0.45, 0.65, 0, 0.4, False, (66, 118, 56))
FARMS: dict[Style, Farm] = {
    "source": Farm(
        crop=BEET,
        weeds=(CHICKWEED, GRASS),
        soil=(146, 121, 97),
        clods=0.55,
        stones=(0, 25),
        straw=(0, 6),
        light=(1.04, 1.0, 0.93),
        shadow=(0.35, 0.6),
        row_distance=(110, 150),
        plant_distance=(44, 62),
        tilt=(0.0, 0.25),
    ),
    "target": Farm(
        crop=MAIZE,
        weeds=(THISTLE, CLOVER, GRASS),
        soil=(112, 98, 92),
        clods=0.85,
        stones=(10, 70),
        straw=(10, 70),
        light=(0.93, 0.99, 1.07),
        shadow=(0.05, 0.3),
        row_distance=(150, 210),
        plant_distance=(40, 62),
        tilt=(0.15, 0.55),
    ),
}


@dataclass(frozen=True)
class Camera:
    """A view of the ground plane: turned, then tilted so that the upper edge is farther away."""

    matrix: NDArray[np.float64]

    def edges(self, *lines: Floats) -> list[NDArray[np.int32]]:
        """(L, P, 2) lines on the ground to lines in the image, in fractions of a pixel as OpenCV draws them."""
        flat = [cv2.perspectiveTransform(line.reshape(1, -1, 2), self.matrix).reshape(line.shape) for line in lines]
        return [(line * (1 << SHIFT)).round().astype(np.int32) for line in flat]


@dataclass(frozen=True)
class Scene:
    """Where everything is in one image, on the ground plane in pixels around the image's middle.

    Attributes:
        farm: what grows where.
        size: of the image, width and height.
        camera: ground to image.
        spacing: between rows, which run along y.
        shift: of the rows, along x.
        growth: of the crop, 1 is the mean.
        sun: where shadows fall to, a unit vector.
    """

    farm: Farm
    size: tuple[int, int]
    camera: Camera
    spacing: float
    shift: float
    growth: float
    sun: Floats

    def extent(self) -> tuple[Floats, Floats]:
        """Lowest and highest ground coordinates in view."""
        width, height = self.size
        corners = np.array([[[0, 0], [width, 0], [0, height], [width, height]]], np.float64)
        ground = cv2.perspectiveTransform(corners, np.linalg.inv(self.camera.matrix))[0].astype(np.float32)
        return ground.min(0), ground.max(0)


def arrange(farm: Farm, size: tuple[int, int], rng: np.random.Generator) -> Scene:
    """Choose camera, rows and sun."""
    angle, tilt = rng.uniform(-0.3, 0.3), rng.uniform(*farm.tilt)
    scale = size[0] / WIDTH
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    lean = np.array([[1, 0, 0], [0, 1, 0], [0, -tilt * scale / size[1], 1]])
    middle = np.array([[scale, 0, size[0] / 2], [0, scale, size[1] / 2], [0, 0, 1]])
    spacing, bearing = rng.uniform(*farm.row_distance), rng.uniform(0, 2 * np.pi)
    return Scene(
        farm=farm,
        size=size,
        camera=Camera(middle @ lean @ turn),
        spacing=spacing,
        shift=rng.uniform(0, spacing),
        growth=rng.uniform(0.6, 1.2),
        sun=np.array([np.cos(bearing), np.sin(bearing)], np.float32),
    )
