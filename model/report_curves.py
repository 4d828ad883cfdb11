"""The rows of a benchmark as learning curves: what is complete, up to which n, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.results import FULL, Row

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """The complete learning curves of one setting, one data set and one strategy.

    Attributes:
        n: (T,) labelled images, rising from 0.
        seeds: (S,) of the curves.
        rows: per seed, a row for every n.
    """

    n: tuple[int, ...]
    seeds: tuple[int, ...]
    rows: tuple[tuple[Row, ...], ...]

    def values(self, read: Callable[[Row], float]) -> Floats:
        """(S, T) one number of every row."""
        return np.array([[read(row) for row in curve] for curve in self.rows], np.float64)

    @property
    def miou(self) -> Floats:
        """(S, T) mean IoU."""
        return self.values(lambda row: row.mIoU)

    def seconds(self, scratch: bool) -> Floats:
        """(S, T) a person's work up to each n: with prelabels and coarse labels, or from scratch without either."""
        step = self.values(lambda row: row.scratch_seconds if scratch else row.full_seconds)
        coarse = 0 if scratch else self.values(lambda row: row.coarse_seconds)
        return np.asarray(step.cumsum(1) + coarse, np.float64)

    def clicks(self) -> Floats:
        """(S, T) pieces relabelled up to each n."""
        return np.asarray(self.values(lambda row: float(row.fix_clicks)).cumsum(1), np.float64)


Group = dict[str, Curves]


#: Strategy -> seed -> n -> row, of one setting and set.
Bag = dict[str, dict[int, dict[int, Row]]]


def bags(rows: Iterable[Row]) -> dict[tuple[str, str], Bag]:
    """Rows of curves by setting and set; one whose mIoU is no number counts as not there."""
    found: dict[tuple[str, str], Bag] = {}
    for row in sorted(rows, key=lambda row: row.n):
        if row.strategy != FULL and np.isfinite(row.mIoU):
            bag = found.setdefault((row.setting, row.set), {})
            bag.setdefault(row.strategy, {}).setdefault(row.seed, {})[row.n] = row
    return found


def steps_of(bag: Bag) -> tuple[int, ...]:
    """Every n up to the budget that the curve with the most rows has."""
    longest = max((tuple(curve) for seeds in bag.values() for curve in seeds.values()), key=len)
    return tuple(n for n in longest if n <= budget_of(longest)) if len(longest) > 2 else longest


def grouped(rows: Iterable[Row]) -> dict[str, dict[str, Group]]:
    """Curves that are complete up to the budget, by setting, set and strategy; the reference is left out."""
    found: dict[str, dict[str, Group]] = {}
    for (setting, name), bag in bags(rows).items():
        steps = steps_of(bag)
        group = {strategy: complete(seeds, steps) for strategy, seeds in bag.items()}
        group = {strategy: curves for strategy, curves in group.items() if curves.seeds}
        if group and len(steps) > 2:
            found.setdefault(setting, {})[name] = group
    return found


def complete(seeds: Mapping[int, Mapping[int, Row]], steps: tuple[int, ...]) -> Curves:
    """The seeds whose curves have every step, and of the tail after it what all of them have."""
    whole = {seed: curve for seed, curve in sorted(seeds.items()) if set(steps) <= curve.keys()}
    shared = set.intersection(*(set(curve) for curve in whole.values())) if whole else set()
    n = (*steps, *sorted(m for m in shared if m > steps[-1]))
    return Curves(n, tuple(whole), tuple(tuple(curve[m] for m in n) for curve in whole.values()))


def unfinished(rows: Iterable[Row]) -> dict[str, int]:
    """Setting -> curves that end before the budget and count nowhere."""
    found: dict[str, int] = {}
    for (setting, _), bag in bags(rows).items():
        steps = set(steps_of(bag))
        short = sum(not steps <= curve.keys() for seeds in bag.values() for curve in seeds.values())
        if short:
            found[setting] = found.get(setting, 0) + short
    return found


def references(rows: Iterable[Row]) -> dict[tuple[str, str], Floats]:
    """(S,) mean IoU of full supervision by setting and set."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.strategy == FULL and np.isfinite(row.mIoU):
            found.setdefault((row.setting, row.set), []).append(row.mIoU)
    return {key: np.array(values) for key, values in found.items()}


def budget_of(n: Sequence[int] | NDArray[np.integer]) -> int:
    """The last n up to which images were picked at one rate; what follows is the tail.

    Where that leaves no curve, fewer than two n from 1 on, it is the last n of all.
    """
    steps = np.diff(n)
    same = np.flatnonzero(steps != steps[0])
    last = int(n[same[0]] if same.size else n[-1])
    return last if sum(1 <= m <= last for m in n) > 1 else int(n[-1])
