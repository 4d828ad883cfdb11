"""Maps made visible: clusters, classes, gradients, and sheets of them side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]


def palette(n: int) -> Picture:
    """(n, 3) RGB colours, far apart on the colour wheel and of alternating brightness."""
    golden = 0.618034
    colours = [colorsys.hsv_to_rgb((i * golden + 0.08) % 1, 0.65, 0.95 if i % 2 else 0.7) for i in range(n)]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def paint(labels: NDArray[np.integer], colours: Picture, image: Picture | None = None, opacity: float = 0.6) -> Picture:
    """Colour a label map; labels without a colour stay as in the image (or black).

    Args:
        labels: (H, W) label of every pixel.
        colours: (n, 3) RGB.
        image: (H, W, 3) RGB to paint on.
        opacity: of the paint, 0..1.

    Returns:
        (H, W, 3) RGB.
    """
    base = np.zeros((*labels.shape, 3), np.uint8) if image is None else image
    known = labels < len(colours)
    painted = base.astype(np.float32)
    strength = opacity if image is not None else 1.0
    painted[known] = (1 - strength) * painted[known] + strength * colours[labels[known]]
    return painted.round().astype(np.uint8)


def heat(values: NDArray[np.floating], image: Picture | None = None) -> Picture:
    """A heat map of non-negative values, scaled to their 99th percentile.

    Args:
        values: (H, W).
        image: (H, W, 3) RGB shown through.

    Returns:
        (H, W, 3) RGB.
    """
    top = float(np.percentile(values, 99)) or 1.0
    scaled = (np.clip(values / max(top, 1e-12), 0, 1) * 255).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return np.asarray(coloured if image is None else cv2.addWeighted(image, 0.3, coloured, 0.7, 0), np.uint8)


def sheet(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Picture]]], width: int = 320) -> Image.Image:
    """A contact sheet: one row per image, one column per title.

    Args:
        titles: of the columns.
        rows: a caption and the pictures of each row; a row may have fewer pictures than there are titles.
        width: of one picture, in pixels.

    Returns:
        The sheet.

    Raises:
        ValueError: there is no row, or a row has more pictures than there are titles.
    """
    if not rows or any(len(pictures) > len(titles) for _, pictures in rows):
        raise ValueError(f"a sheet needs rows of at most {len(titles)} pictures each")
    font, line, gap = ImageFont.load_default(14), 22, 6
    heights = [max(round(p.shape[0] * width / p.shape[1]) for p in pictures) for _, pictures in rows]
    size = (len(titles) * (width + gap) + gap, line + sum(heights) + len(rows) * (line + gap))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), 3), title, fill="black", font=font)
    top = line
    for (caption, pictures), height in zip(rows, heights, strict=True):
        draw.text((gap, top + 2), caption, fill="#444444", font=font)
        for column, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
            page.paste(scaled, (gap + column * (width + gap), top + line))
        top += line + height + gap
    return page
