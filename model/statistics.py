"""What learning curves say: areas with intervals, paired differences, the penalty matrix, where gains end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from model.metrics import area_under_curve
from model.results import FULL, Row

Floats = NDArray[np.float64]

#: Resamples of a bootstrap, and its coverage.
RESAMPLES, LEVEL = 10_000, 0.95
#: What other strategies are compared with.
REFERENCES = ("random", "foreground-random")
#: Shares of full supervision that are aimed at.
SHARES = (0.90, 0.95)


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


def grouped(rows: Iterable[Row]) -> dict[str, dict[str, Group]]:
    """Complete curves by setting, set and strategy; the reference and unfinished curves are left out.

    A set's curves are complete up to the longest run of n = 0, 1, ... that its longest curve has.
    """
    bag: dict[tuple[str, str], dict[str, dict[int, list[Row]]]] = {}
    for row in sorted(rows, key=lambda row: row.n):
        if row.strategy != FULL:
            bag.setdefault((row.setting, row.set), {}).setdefault(row.strategy, {}).setdefault(row.seed, []).append(row)
    found: dict[str, dict[str, Group]] = {}
    for (setting, name), strategies in bag.items():
        longest = max((curve for seeds in strategies.values() for curve in seeds.values()), key=len)
        steps = tuple(row.n for row in longest)
        group = {strategy: complete(seeds, steps) for strategy, seeds in strategies.items()}
        group = {strategy: curves for strategy, curves in group.items() if curves.seeds}
        if group and len(steps) > 2:
            found.setdefault(setting, {})[name] = group
    return found


def complete(seeds: Mapping[int, Sequence[Row]], steps: tuple[int, ...]) -> Curves:
    """The seeds whose curves have every step."""
    whole = {seed: tuple(rows) for seed, rows in sorted(seeds.items()) if tuple(row.n for row in rows) == steps}
    return Curves(steps, tuple(whole), tuple(whole.values()))


def references(rows: Iterable[Row]) -> dict[tuple[str, str], Floats]:
    """(S,) mean IoU of full supervision by setting and set."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.strategy == FULL:
            found.setdefault((row.setting, row.set), []).append(row.mIoU)
    return {key: np.array(values) for key, values in found.items()}


def budget_of(n: Sequence[int]) -> int:
    """The last n up to which images were picked at one rate; what follows is the tail."""
    steps = np.diff(n)
    same = np.flatnonzero(steps != steps[0])
    return int(n[same[0]] if same.size else n[-1])


def areas(curves: Curves, log: bool = False) -> Floats:
    """(S,) area under mIoU(n) for n from 1 to the budget, a mean height; on a logarithmic axis of n with `log`."""
    n = np.array(curves.n)
    inside = (n >= 1) & (n <= budget_of(curves.n))
    x = np.log(n[inside]) if log else n[inside].astype(float)
    return np.array([area_under_curve(list(x), list(values[inside])) for values in curves.miou])


def interval(values: Floats) -> list[float] | None:
    """95 % bootstrap interval of a mean over seeds; None of fewer than two."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def paired(ours: Curves, theirs: Curves) -> dict[str, Any] | None:
    """Difference of areas over common seeds: mean, 95 % interval and p of a paired t-test; None of fewer than two."""
    a, b = (dict(zip(curves.seeds, areas(curves), strict=True)) for curves in (ours, theirs))
    difference = np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
    return t_test(difference)


def t_test(difference: Floats) -> dict[str, Any] | None:
    """Mean, 95 % interval and two-sided p of differences; None of fewer than two."""
    count = len(difference)
    if count < 2:
        return None
    mean, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(count))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    t = abs(mean) / error if error > 0 else np.inf if mean else 0.0
    p = float(2 * stats.t.sf(t, count - 1))
    return {"mean": mean, "interval": [mean - reach, mean + reach], "p": p, "pairs": count}


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Corrects p values for being several (Holm 1979)."""
    found, highest = dict[str, float](), 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        found[name] = highest
    return found


def images_to(curves: Curves, target: float) -> int | None:
    """The first n whose mean mIoU reaches a target; None where none does."""
    reached = np.flatnonzero(curves.miou.mean(0) >= target)
    return int(curves.n[reached[0]]) if reached.size else None


def penalties(group: Mapping[str, Group]) -> tuple[list[str], Floats]:
    """Pairwise penalty matrix over the data sets of a setting (Ash et al. 2020).

    Returns:
        Names, and (K, K) how often the row beats the column: for every set a share of the budgets at which the paired
        t-test over seeds is significant, summed over sets. The lower a column's mean, the better.
    """
    names = sorted(set.intersection(*(set(curves) for curves in group.values()))) if group else []
    table = np.zeros((len(names), len(names)))
    for curves in group.values():
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                table[i, j] += wins(curves[one], curves[other]) if i != j else 0.0
    return names, table


def wins(ours: Curves, theirs: Curves) -> float:
    """Share of the budgets, n from 1 on, at which we are significantly better over the common seeds."""
    seeds = sorted(set(ours.seeds) & set(theirs.seeds))
    if len(seeds) < 2:
        return 0.0
    difference = difference_of(ours, theirs, seeds)
    inside = (np.array(ours.n) >= 1) & (np.array(ours.n) <= budget_of(ours.n))
    mean, deviation = difference.mean(0)[inside], difference.std(0, ddof=1)[inside]
    t = np.sqrt(len(seeds)) * mean / np.where(deviation > 0, deviation, np.inf)
    t = np.where((deviation == 0) & (mean > 0), np.inf, t)
    return float((t > stats.t.ppf(0.975, len(seeds) - 1)).mean())


def difference_of(ours: Curves, theirs: Curves, seeds: Sequence[int]) -> Floats:
    """(S, T) our mIoU less theirs, seed by seed."""
    a, b = (dict(zip(curves.seeds, curves.miou, strict=True)) for curves in (ours, theirs))
    return np.array([a[seed] - b[seed] for seed in seeds])


def crossing(ours: Curves, theirs: Curves) -> dict[str, Any] | None:
    """Where the gain over another strategy ends.

    Returns:
        `significant_until`, the last n of the leading run of n >= 1 at which the 95 % interval of the mean difference
        lies above 0 (0: none); `crosses`, the first n from which on the mean difference, smoothed over three n, is not
        positive, and its bootstrap `interval` (the last n stands for "never"); None of fewer than two pairs.
    """
    seeds = sorted(set(ours.seeds) & set(theirs.seeds))
    if len(seeds) < 2:
        return None
    n = np.array(ours.n[1:])
    difference = difference_of(ours, theirs, seeds)[:, 1:]
    error = difference.std(0, ddof=1) / np.sqrt(len(seeds))
    above = difference.mean(0) - stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1) * error > 0
    until = int(n[above.argmin() - 1]) if not above.all() and above.argmin() else int(n[-1]) if above.all() else 0
    draws = np.random.default_rng(0).integers(len(seeds), size=(1000, len(seeds)))
    points = [first_loss(n, difference[draw].mean(0)) for draw in draws]
    low, high = np.quantile(points, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "significant_until": until,
        "crosses": first_loss(n, difference.mean(0)),
        "interval": [float(low), float(high)],
    }


def first_loss(n: NDArray[np.integer], difference: Floats) -> int:
    """The first n at which a smoothed difference is not positive; the last n where it always is."""
    smooth = np.convolve(np.pad(difference, 1, mode="edge"), np.ones(3) / 3, mode="valid")
    lost = np.flatnonzero(smooth <= 0)
    return int(n[lost[0]] if lost.size else n[-1])
