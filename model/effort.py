"""What a person has to do to a prelabel: pieces to relabel, pixels to repaint, and the seconds that takes."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from model.classes import IGNORE
from model.clusters import SMALLEST, pieces, without_small

Map = NDArray[np.uint8]

#: Pieces of a prelabel below this share of the image are joined to their surroundings: relabelling many specks costs
#: a person more than painting the few of them that were right.
SMALLEST_PIECE = 0.005
#: Seconds to open an image, look at it and submit it.
OPEN = 5.0
#: Seconds for one click and one key on a piece (Bearman et al. 2016 measured 2.4 s for a first click on an object).
CLICK = 2.4
#: Seconds to trace an outline as long as the longer side of the image. A street scene then takes about the 239 s that
#: the same people measured for a full segmentation of an image.
TRACE = 10.0
#: Slivers thinner than this many pixels are left as they are: edges of hand-painted masks differ by more.
SLIVER = 3


class Effort(NamedTuple):
    """Work on one image.

    Attributes:
        clicks: pieces whose class has to be changed, one click and one key each.
        repaint: share of the pixels that is still wrong then, 0..1.
        outline: length of the outlines to trace for that, in longer sides of the image; without slivers.
    """

    clicks: int
    repaint: float
    outline: float

    @property
    def seconds(self) -> float:
        """At the rates above."""
        return OPEN + CLICK * self.clicks + TRACE * self.outline


def correct(prelabel: Map, mask: Map) -> Effort:
    """What makes a prelabel equal to a mask, pieces first and then pixels.

    A piece that is mostly wrong gets the class of most of its pixels; what is wrong after that has to be painted.
    Specks are joined to their surroundings first, as in the prelabels that people are shown.

    Args:
        prelabel: (H, W) class of every pixel.
        mask: (H, W) true classes, IGNORE where nobody knows: such pixels cost nothing.

    Raises:
        ValueError: sizes differ.
    """
    if prelabel.shape != mask.shape:
        raise ValueError(f"the prelabel is {prelabel.shape}, the mask {mask.shape}")
    shown, known = without_small(prelabel, SMALLEST_PIECE), mask != IGNORE
    if not known.any():
        return Effort(0, 0.0, 0.0)
    piece = pieces(shown)
    classes = int(max(mask[known].max(), shown.max())) + 1
    table = np.bincount(piece[known] * classes + mask[known], minlength=(int(piece.max()) + 1) * classes)
    table = table.reshape(-1, classes)
    label = np.zeros(len(table), np.uint8)
    label[piece] = shown
    # A piece keeps its class where another one is only as frequent.
    wrong = table.max(1) > table[np.arange(len(table)), label]
    left = known & (np.where(wrong, table.argmax(1), label)[piece] != mask)
    return Effort(int(wrong.sum()), float(left.sum() / known.sum()), traced(left))


def from_scratch(mask: Map) -> Effort:
    """The same work on an empty image: its most frequent class fills it, all else is drawn piece by piece.

    Args:
        mask: (H, W) true classes, IGNORE where nobody knows.
    """
    known = mask != IGNORE
    if not known.any():
        return Effort(0, 0.0, 0.0)
    counts = np.bincount(mask[known])
    whole = without_small(np.where(known, mask, counts.argmax()).astype(np.uint8), SMALLEST)
    drawn = np.unique(pieces(whole)[whole != counts.argmax()])
    return Effort(len(drawn), float(1 - counts.max() / counts.sum()), outline(whole))


def traced(wrong: NDArray[np.bool_]) -> float:
    """Outline of what is wrong, but for slivers, in longer sides of the image."""
    kernel = np.ones((SLIVER, SLIVER), np.uint8)
    return outline(np.asarray(cv2.morphologyEx(wrong.view(np.uint8), cv2.MORPH_OPEN, kernel), np.uint8))


def outline(labels: Map) -> float:
    """Length of the borders between pieces of different label, in longer sides of the image."""
    edges = (labels[:, 1:] != labels[:, :-1]).sum() + (labels[1:] != labels[:-1]).sum()
    return float(edges) / max(labels.shape)
