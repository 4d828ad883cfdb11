"""A rendered field: crop rows, weeds, soil and light, with the exact class of every pixel.

A stand-in for photographs where none can be shipped. The two styles are as far apart as two farms: another crop,
other weeds, another soil and sky. Within a style images differ in growth, weeds, light, camera and soil moisture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.farms import FARMS, SHIFT, Farm, Scene, Style, arrange
from model.plants import STATIONS, Floats, Leaves, layered, sprout

SOIL, CROP, WEED = 0, 1, 2


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


def grow(scene: Scene, rng: np.random.Generator) -> Leaves:
    """Sow crop in rows and weeds in patches, and give every plant its leaves; small plants come first."""
    low, high = scene.extent()
    rows = np.arange(np.floor(low[0] / scene.spacing) - 1, high[0] / scene.spacing + 1) * scene.spacing + scene.shift
    steps = np.arange(low[1] - 40, high[1] + 40, rng.uniform(*scene.farm.plant_distance))
    spots = np.stack(np.meshgrid(rows, steps), -1).reshape(-1, 2) + rng.normal(0, 5, (rows.size * steps.size, 2))
    spots = spots[rng.random(len(spots)) > rng.uniform(0.02, 0.2)]
    parts = [sprout(scene.farm.crop, spots, scene.growth, CROP, rng)]
    shares = rng.dirichlet(np.full(len(scene.farm.weeds), 0.5))
    # One image in seven is clean; a few are overgrown.
    infestation = 0.0 if rng.random() < 1 / 7 else rng.gamma(1.5, 30)
    for weed, share in zip(scene.farm.weeds, shares, strict=True):
        grown = patches(rng.poisson(infestation * share), low, high, rng)
        parts.append(sprout(weed, grown, rng.uniform(0.6, 1.3), WEED, rng))
    return layered(parts)


def patches(count: int, low: Floats, high: Floats, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, 2) spots, half of them close together."""
    spots = rng.uniform(low, high, (count, 2))
    middle = rng.uniform(low, high)
    close = rng.random(count) < 0.5
    spots[close] = rng.normal(middle, 45, (int(close.sum()), 2))
    return spots


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
