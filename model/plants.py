"""The shapes of rendered plants: leaves around a stem, seen from above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Range = tuple[float, float]
Floats = NDArray[np.float32]

#: Points along a leaf's midrib.
STATIONS = 11


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
class Leaves:
    """Leaves on the ground plane, in the order they are drawn.

    Attributes:
        left: (L, STATIONS, 2) the left edges from base to tip, x and y.
        right: (L, STATIONS, 2) the right edges.
        colour: (L, 3) RGB, 0..255.
        kind: (L,) class of their pixels.
        plant: (L,) size of the plant that each belongs to.
    """

    left: Floats
    right: Floats
    colour: Floats
    kind: NDArray[np.uint8]
    plant: Floats


def layered(parts: Sequence[Leaves]) -> Leaves:
    """All leaves, those of small plants first, so that large plants hide them."""
    joined = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Leaves)}
    order = np.argsort(joined["plant"], kind="stable")
    return Leaves(**{name: values[order] for name, values in joined.items()})


def sprout(species: Species, spots: NDArray[np.floating], growth: float, kind: int, rng: np.random.Generator) -> Leaves:
    """All leaves of plants of one species.

    Args:
        species: of all of them.
        spots: (n, 2) where they stand.
        growth: 1 is the mean.
        kind: class of their pixels.
        rng: where the randomness comes from.
    """
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
    return Leaves(left, right, colour.astype(np.float32), kinds, size[owner].astype(np.float32))


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
