"""A rendered field: crop rows, weeds, soil and light, with the exact class of every pixel.

A stand-in for photographs where none can be shipped. The two styles are as far apart as two farms: another crop,
other weeds, another soil and sky. Within a style images differ in growth, weeds, light, camera and soil moisture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Style = Literal["source", "target"]
Range = tuple[float, float]
Floats = NDArray[np.float32]

SOIL, CROP, WEED = 0, 1, 2
#: Points along a leaf's midrib.
STATIONS = 11
#: Binary digits after the point in coordinates to draw at.
SHIFT = 4
#: Lengths below are in pixels of an image this wide.
WIDTH = 480


@dataclass(frozen=True)
class Species:
    """A plant seen from above.

    Attributes:
        leaves: fewest and most leaves.
        length: of a leaf at mean growth, in pixels.
        width: of a leaf, as a share of its length.
        stalk: share of the length that is bare stalk.
        tip: where the leaf is widest, 0 at its base to 1 at its end.
        lobes: teeth along each edge; 0 for a smooth one.
        bend: how far a leaf turns along its length, in radians.
        fan: whether leaves leave in two opposite directions instead of all around.
        colour: RGB.
    """

    leaves: tuple[int, int]
    length: Range
    width: Range
    stalk: float
    tip: float
    lobes: int
    bend: float
    fan: bool
    colour: tuple[int, int, int]


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
class Leaves:
    """Leaves on the ground plane, in the order they are drawn.

    Attributes:
        left: (L, STATIONS, 2) the left edges from base to tip, x and y.
        right: (L, STATIONS, 2) the right edges.
        colour: (L, 3) RGB, 0..255.
        kind: (L,) CROP or WEED.
    """

    left: Floats
    right: Floats
    colour: Floats
    kind: NDArray[np.uint8]


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


def render(seed: int, style: Style, size: tuple[int, int] = (480, 360)) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One image of a field; the same seed gives the same image.

    Args:
        seed: which image.
        style: which farm.
        size: width and height in pixels.

    Returns:
        Image (H, W, 3) RGB and mask (H, W): 0 soil, 1 crop, 2 weed.
    """
    rng = np.random.default_rng([seed, list(FARMS).index(style)])
    scene = arrange(FARMS[style], size, rng)
    ground, leaves = earth(scene, rng), grow(scene, rng)
    cast_shadows(ground, leaves, scene, rng.uniform(*scene.farm.shadow))
    mask = draw(ground, leaves, scene)
    return photograph(ground, mask, scene, rng), mask


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


def grow(scene: Scene, rng: np.random.Generator) -> Leaves:
    """Sow crop in rows and weeds in patches, and give every plant its leaves; small plants come first."""
    low, high = scene.extent()
    rows = np.arange(np.floor(low[0] / scene.spacing) - 1, high[0] / scene.spacing + 1) * scene.spacing + scene.shift
    steps = np.arange(low[1] - 40, high[1] + 40, rng.uniform(*scene.farm.plant_distance))
    spots = np.stack(np.meshgrid(rows, steps), -1).reshape(-1, 2) + rng.normal(0, 5, (rows.size * steps.size, 2))
    spots = spots[rng.random(len(spots)) > rng.uniform(0.02, 0.2)]
    parts = [plants(scene.farm.crop, spots, scene.growth, CROP, rng)]
    shares = rng.dirichlet(np.full(len(scene.farm.weeds), 0.5))
    # One image in seven is clean; a few are overgrown.
    infestation = 0.0 if rng.random() < 1 / 7 else rng.gamma(1.5, 30)
    for weed, share in zip(scene.farm.weeds, shares, strict=True):
        grown = patches(rng.poisson(infestation * share), low, high, rng)
        parts.append(plants(weed, grown, rng.uniform(0.6, 1.3), WEED, rng))
    size = np.concatenate([part[0] for part in parts])
    order = np.argsort(size, kind="stable")
    left, right, colour, kind = (np.concatenate([getattr(p[1], n) for p in parts])[order] for n in LEAF_PARTS)
    return Leaves(left, right, colour, kind)


LEAF_PARTS = ("left", "right", "colour", "kind")


def patches(count: int, low: Floats, high: Floats, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, 2) spots, half of them close together."""
    spots = rng.uniform(low, high, (count, 2))
    middle = rng.uniform(low, high)
    close = rng.random(count) < 0.5
    spots[close] = rng.normal(middle, 45, (int(close.sum()), 2))
    return spots


def plants(
    species: Species, spots: NDArray[np.floating], growth: float, kind: int, rng: np.random.Generator
) -> tuple[Floats, Leaves]:
    """All leaves of plants of one species, and per leaf its plant's size (for the order of drawing)."""
    counts = rng.integers(species.leaves[0], species.leaves[1] + 1, len(spots))
    owner = np.repeat(np.arange(len(spots)), counts)
    index = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    age = index / counts[owner]
    size = growth * rng.lognormal(0, 0.13, len(spots)) * rng.uniform(*species.length, len(spots))
    length = size[owner] * (1.05 - 0.5 * age) * rng.uniform(0.75, 1.05, owner.size)
    angle = rng.uniform(0, 2 * np.pi, len(spots))[owner] + rng.normal(0, 0.2, owner.size)
    angle += index % 2 * np.pi + index * 0.12 if species.fan else index * 2.4
    left, right = outlines(species, spots[owner], length, angle, rng)
    tone = rng.normal(1, 0.09, (len(spots), 1))[owner] * (0.8 + 0.35 * age[:, None])
    colour = np.array(species.colour) * rng.normal(1, 0.05, 3) * tone * rng.normal(1, 0.03, (owner.size, 3))
    kinds = np.full(owner.size, kind, np.uint8)
    return size[owner].astype(np.float32), Leaves(left, right, colour.astype(np.float32), kinds)


def outlines(
    species: Species,
    base: NDArray[np.floating],
    length: NDArray[np.floating],
    angle: NDArray[np.floating],
    rng: np.random.Generator,
) -> tuple[Floats, Floats]:
    """(L, STATIONS, 2) left and right edges of leaves that start at base (L, 2)."""
    along = np.linspace(0, 1, STATIONS)
    heading = angle[:, None] + species.bend * rng.normal(0, 0.6, (length.size, 1)) * along**1.5
    direction = np.stack([np.cos(heading), np.sin(heading)], -1)
    steps = direction * (length / (STATIONS - 1))[:, None, None]
    rib = base[:, None] + np.cumsum(steps, 1) - steps[:, :1]
    blade = np.clip((along - species.stalk) / (1 - species.stalk), 0, 1)
    rise, fall = 1.5 * species.tip, 1.5 * (1 - species.tip)
    shape = blade**rise * (1 - blade) ** fall / (species.tip**rise * (1 - species.tip) ** fall)
    shape *= 1 - (0.25 - 0.25 * np.cos(2 * np.pi * species.lobes * blade))
    widths = rng.uniform(*species.width, (length.size, 1)) / 2 * shape + 0.025 * (1 - 0.7 * along)
    aside = np.stack([-direction[..., 1], direction[..., 0]], -1) * (length[:, None] * widths)[..., None]
    return (rib + aside).astype(np.float32), (rib - aside).astype(np.float32)


def earth(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3) bare soil: clods in slanting light, ridges along the rows, damp places, stones and straw."""
    low, high = scene.extent()
    size = int(np.ceil(high[0] - low[0])), int(np.ceil(high[1] - low[1]))
    shade = clods(scene, size, low[0], rng)
    damp = 1 / (1 + np.exp(3 - 5 * noise(size, 90, rng) - 2 * noise(size, 15, rng)))
    shade *= 1 - rng.uniform(0, 0.35) * damp
    soil = np.array(scene.farm.soil) * warmth(0.03, rng) * rng.uniform(0.85, 1.15)
    ground = np.clip(shade[..., None] * soil.astype(np.float32), 0, 255).astype(np.uint8)
    litter(ground, scene.farm, rng)
    place = scene.camera.matrix @ np.array([[1, 0, low[0]], [0, 1, low[1]], [0, 0, 1.0]])
    return cast(NDArray[np.uint8], cv2.warpPerspective(ground, place, scene.size, borderMode=cv2.BORDER_REFLECT_101))


def clods(scene: Scene, size: tuple[int, int], left: float, rng: np.random.Generator) -> Floats:
    """(H, W) brightness of rough soil in the sun, about 1; its first column lies at `left` on the ground."""
    relief = np.zeros(size[::-1], np.float32)
    for cell in (1.6, 3.2, 7, 17, 48):
        bumps = noise(size, cell, rng)
        # The middle sizes are clods: round above and sharp in between; the rest is grain and unevenness.
        relief += np.float32(cell**0.8) * (-1.3 * np.abs(bumps) if 3 < cell < 20 else bumps)
    ridge = 8 * np.cos(2 * np.pi * (np.arange(size[0]) + left - scene.shift) / scene.spacing)
    relief += ridge.astype(np.float32)
    slope = cv2.Sobel(relief, cv2.CV_32F, 1, 0) * scene.sun[0] + cv2.Sobel(relief, cv2.CV_32F, 0, 1) * scene.sun[1]
    shade = 1 - 0.2 * scene.farm.clods / np.float32(slope.std()) * slope + 0.05 * noise(size, 1.3, rng)
    return cast(Floats, np.clip(shade, 0.4, 1.4, out=shade))


def noise(size: tuple[int, int], cell: float, rng: np.random.Generator) -> Floats:
    """(H, W) smooth noise of about unit deviation, its bumps `cell` pixels wide."""
    width, height = size
    coarse = rng.standard_normal((int(height / cell) + 3, int(width / cell) + 3), np.float32)
    return cast(Floats, cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def warmth(spread: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(3,) gains that make RGB a little warmer or colder."""
    shift = rng.normal(0, spread)
    return np.array([1 + shift, 1.0, 1 - shift])


def litter(ground: NDArray[np.uint8], farm: Farm, rng: np.random.Generator) -> None:
    """Strew stones and straw onto soil."""
    height, width = ground.shape[:2]
    for _ in range(int(rng.uniform(*farm.stones))):
        x, y, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 180)
        axes = tuple(float(n) for n in rng.uniform(2, 7, 2))
        grey = rng.uniform(110, 190) * np.array([1.02, 1.0, 0.96])
        cv2.ellipse(ground, ((x + 1, y + 1), axes, angle), tuple(grey * 0.45), -1, cv2.LINE_AA)
        cv2.ellipse(ground, ((x, y), axes, angle), tuple(grey), -1, cv2.LINE_AA)
    for _ in range(int(rng.uniform(*farm.straw))):
        start, angle = rng.uniform(0, [width, height]), rng.uniform(0, np.pi)
        end = start + rng.uniform(8, 30) * np.array([np.cos(angle), np.sin(angle)])
        pale = rng.uniform(0.75, 1.05) * np.array([196, 178, 134])
        ends = [tuple(int(n) for n in point) for point in (start, end)]
        cv2.line(ground, ends[0], ends[1], tuple(pale), int(rng.integers(1, 3)), cv2.LINE_AA)


def cast_shadows(ground: NDArray[np.uint8], leaves: Leaves, scene: Scene, strength: float) -> None:
    """Darken soil where leaves keep the sun off."""
    reach = np.abs(leaves.left[:, -1] - leaves.left[:, 0]).max(1)[:, None, None] * 0.22 * scene.sun
    shadow = np.zeros(ground.shape[:2], np.uint8)
    for outline in np.concatenate(scene.camera.edges(leaves.left + reach, leaves.right[:, ::-1] + reach), 1):
        cv2.fillPoly(shadow, [outline], 255, cv2.LINE_8, SHIFT)
    dark = 1 - np.float32(strength / 255) * cv2.GaussianBlur(shadow, (0, 0), 1.5)
    ground[:] = ground * dark[..., None]


def draw(ground: NDArray[np.uint8], leaves: Leaves, scene: Scene) -> NDArray[np.uint8]:
    """Paint leaves onto soil, each with a lit and a dark half and a pale rib; returns the mask (H, W)."""
    mask = np.zeros(ground.shape[:2], np.uint8)
    left, right, rib = scene.camera.edges(leaves.left, leaves.right, (leaves.left + leaves.right) * np.float32(0.5))
    across = leaves.left[:, STATIONS // 2] - leaves.right[:, STATIONS // 2]
    lit = (across @ -scene.sun / np.maximum(np.linalg.norm(across, axis=1), 1e-6) * 0.14)[:, None]
    tones = [(leaves.colour * gain).tolist() for gain in (1 + lit, 1 - lit)]
    pale, kinds = (leaves.colour * 1.12 + 8).tolist(), leaves.kind.tolist()
    near, far = np.concatenate([left, rib[:, ::-1]], 1), np.concatenate([right, rib[:, ::-1]], 1)
    outlines = np.concatenate([left, right[:, ::-1]], 1)
    for leaf in visible(outlines, scene.size):
        cv2.fillPoly(ground, [near[leaf]], tones[0][leaf], cv2.LINE_AA, SHIFT)
        cv2.fillPoly(ground, [far[leaf]], tones[1][leaf], cv2.LINE_AA, SHIFT)
        cv2.polylines(ground, [rib[leaf]], False, pale[leaf], 1, cv2.LINE_AA, SHIFT)
        cv2.fillPoly(mask, [outlines[leaf]], kinds[leaf], cv2.LINE_8, SHIFT)
    return mask


def visible(outlines: NDArray[np.int32], size: tuple[int, int]) -> list[int]:
    """Which outlines touch the image."""
    limit = np.array(size) << SHIFT
    touching = (outlines.max(1) >= 0).all(1) & (outlines.min(1) < limit).all(1)
    return cast(list[int], np.flatnonzero(touching).tolist())


def photograph(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], scene: Scene, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Light, lens and sensor: leaf texture, colour of the light, exposure, dark corners, blur and grain."""
    width, height = scene.size
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    gain = 1 - np.float32(rng.uniform(0, 0.16)) * (x**2 + y**2)
    gain *= 1 + np.float32(0.07) * noise(scene.size, 4, rng) * (mask > 0)
    light = np.array(scene.farm.light) * warmth(0.03, rng) * rng.uniform(0.8, 1.25)
    lit = cv2.GaussianBlur(image * gain[..., None], (0, 0), rng.uniform(0.4, 0.9)) * light.astype(np.float32)
    grain = rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(2, 6))
    return np.clip(lit + grain, 0, 255).astype(np.uint8)


def write_folder(path: Path, n_train: int, n_test: int, style: Style, seed: int) -> None:
    """Render a pixel-labelled folder as `model.data.Folder` reads it.

    Args:
        path: is made; files of the same name are replaced.
        n_train: images in the split "train".
        n_test: images in the split "test".
        style: which farm.
        seed: other seeds give other images.
    """
    for folder in ("images", "masks"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{number:04d}" for number in range(1, n_train + n_test + 1)]
    for number, name in enumerate(names):
        image, mask = render(seed * 1_000_000 + number, style)
        Image.fromarray(image).save(path / "images" / f"{name}.jpg", quality=93)
        Image.fromarray(mask).save(path / "masks" / f"{name}.png")
    facts = {
        "name": f"field-{style}",
        "title": f"Rendered field, {style}",
        "classes": [{"id": i, "name": name} for i, name in enumerate(("soil", "crop", "weed"))],
        "groups": {"background": ["soil"], "vegetation": ["crop", "weed"]},
        "splits": {"train": names[:n_train], "test": names[n_train:]},
    }
    (path / "dataset.json").write_text(json.dumps(facts, indent=1), "utf-8")
