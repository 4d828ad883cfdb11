"""How much of the spread between seeds comes from the choice of images, and how much from training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from model.pages import Block
from model.results import FULL, Row
from model.statistics import Group, areas

#: How the settings of the instant learner begin; see `model.benchmark.Curve.setting`.
INSTANT = "instant"


class Repeats(NamedTuple):
    """Rows that learnt the same images under different seeds: all that differs between them is training.

    Attributes:
        variance: of their mIoU, pooled.
        widest: largest difference between two of them.
        number: how many rows beyond the first of each kind.
    """

    variance: float
    widest: float
    number: int


def repeats(rows: Sequence[Row]) -> Repeats | None:
    """What the rows of one setting and set tell of training by itself; None where no images were learnt twice."""
    found: dict[tuple[int, frozenset[str]], dict[int, float]] = {}
    ordered = sorted(rows, key=lambda row: (row.strategy, row.seed, row.n))
    for (strategy, seed), curve in groupby(ordered, lambda row: (row.strategy, row.seed)):
        learnt = frozenset[str]()
        for row in curve:
            learnt |= frozenset(row.image.split())
            if np.isfinite(row.mIoU) and (len(learnt) == row.n > 0 or strategy == FULL):
                found.setdefault((row.n, learnt), {})[seed] = row.mIoU
    groups = [np.array(list(seeds.values())) for seeds in found.values() if len(seeds) > 1]
    count = sum(len(values) - 1 for values in groups)
    if not count:
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in groups)
    return Repeats(squares / count, max(float(np.ptp(values)) for values in groups), count)


def variance_of(curves: Group, rows: Sequence[Row]) -> dict[str, Any]:
    """The spread of areas over seeds, and of training, in one setting and set.

    Args:
        curves: by strategy.
        rows: of the same setting and set, full supervision among them.
    """
    training, spread = repeats(rows), {name: areas(one) for name, one in curves.items() if len(one.seeds) > 1}
    return {
        "area": float(np.mean([values.var(ddof=1) for values in spread.values()])) if spread else None,
        "strategies": len(spread),
        "training": training._asdict() if training else None,
    }


def variance(facts: Mapping[str, Any]) -> Iterator[Block]:
    """The section of the report."""
    yield Block("h2", "How much of the spread is choice, and how much training")
    for setting, one in facts["settings"].items():
        for name, data in one["sets"].items():
            yield Block("li", f"{setting}, {name}: {split(data['variance'], setting.startswith(INSTANT))}")


def split(facts: Mapping[str, Any], instant: bool) -> str:
    """The split of one setting and set in a sentence."""
    area, training = facts["area"], facts["training"]
    if area is None:
        return "not told, since no strategy has two seeds."
    spread = f"areas of one strategy deviate by {area**0.5:.4f} between seeds"
    if instant:
        checked = f"; {training['number']} repeats differ by {training['widest']:.6f} at most" if training else ""
        return (
            f"{spread}. All of it is choice, by the images that a seed may pick from and by ties: "
            f"the same images always give the same head{checked}."
        )
    if training is None:
        return f"{spread}. How much of it is training cannot be told, since no images were learnt under two seeds."
    # Training under one seed errs alike at neighbouring n at worst: then the area deviates as a single point does.
    share = min(1.0, training["variance"] / area) if area else 1.0
    return (
        f"{spread}; mIoU after the same images, by {training['variance'] ** 0.5:.4f} "
        f"({training['number']} repeats under other seeds). "
        f"Training makes at most {share:.0%} of the areas' variance, choice at least {1 - share:.0%}."
    )
