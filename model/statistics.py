"""What learning curves say: areas with intervals, paired differences, the penalty matrix, where gains end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from model.metrics import area_under_curve
from model.report_curves import Curves, Floats, Group, budget_of, grouped, references, unfinished

__all__ = [
    "LEVEL",
    "REFERENCES",
    "RESAMPLES",
    "SHARES",
    "Curves",
    "Floats",
    "Group",
    "areas",
    "budget_of",
    "crossing",
    "difference_of",
    "grouped",
    "holm",
    "images_to",
    "interval",
    "paired",
    "penalties",
    "references",
    "shared_seeds",
    "shared_steps",
    "t_test",
    "unfinished",
]

#: Resamples of a bootstrap, and its coverage.
RESAMPLES, LEVEL = 10_000, 0.95
#: What other strategies are compared with.
REFERENCES = ("random", "foreground-random")
#: Shares of full supervision that are aimed at.
SHARES = (0.90, 0.95)


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
    difference = np.array([a[seed] - b[seed] for seed in shared_seeds(ours, theirs)])
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
    seeds = shared_seeds(ours, theirs)
    if len(seeds) < 2:
        return 0.0
    difference, n = difference_of(ours, theirs, seeds), np.array(shared_steps(ours, theirs))
    inside = (n >= 1) & (n <= budget_of(n))
    mean, deviation = difference.mean(0)[inside], difference.std(0, ddof=1)[inside]
    t = np.sqrt(len(seeds)) * mean / np.where(deviation > 0, deviation, np.inf)
    t = np.where((deviation == 0) & (mean > 0), np.inf, t)
    return float((t > stats.t.ppf(0.975, len(seeds) - 1)).mean())


def shared_seeds(ours: Curves, theirs: Curves) -> list[int]:
    """The seeds that both have, which makes them pairs."""
    return sorted(set(ours.seeds) & set(theirs.seeds))


def shared_steps(ours: Curves, theirs: Curves) -> tuple[int, ...]:
    """The n that both have; one may have a tail that the other lacks."""
    return tuple(n for n in ours.n if n in theirs.n)


def difference_of(ours: Curves, theirs: Curves, seeds: Sequence[int]) -> Floats:
    """(S, T) our mIoU less theirs, seed by seed, at the n that both have."""
    n = shared_steps(ours, theirs)

    def at(curves: Curves) -> Floats:
        places = np.ix_([curves.seeds.index(s) for s in seeds], [curves.n.index(m) for m in n])
        return np.asarray(curves.miou[places], np.float64)

    return at(ours) - at(theirs)


def crossing(ours: Curves, theirs: Curves) -> dict[str, Any] | None:
    """Where the gain over another strategy ends.

    Returns:
        `significant_until`, the last n of the leading run of n >= 1 at which the 95 % interval of the mean difference
        lies above 0 (0: none); `crosses`, the first n at which the mean difference, smoothed over three n, is not
        positive, and its bootstrap `interval` (None: not within the curve); None of fewer than two pairs.
    """
    seeds = shared_seeds(ours, theirs)
    n = np.array(shared_steps(ours, theirs))
    if len(seeds) < 2 or not (n >= 1).any():
        return None
    difference, n = difference_of(ours, theirs, seeds)[:, n >= 1], n[n >= 1]
    error = difference.std(0, ddof=1) / np.sqrt(len(seeds))
    above = difference.mean(0) - stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1) * error > 0
    count = len(n) if above.all() else int(above.argmin())
    draws = np.random.default_rng(0).integers(len(seeds), size=(1000, len(seeds)))
    points = np.sort([first_loss(n, difference[draw].mean(0)) for draw in draws])
    ends = [points[round((len(points) - 1) * share)] for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    return {
        "significant_until": int(n[count - 1]) if count else 0,
        "crosses": within(first_loss(n, difference.mean(0))),
        "interval": [within(end) for end in ends],
    }


def within(n: float) -> int | None:
    """A crossing point, None where there is none."""
    return int(n) if np.isfinite(n) else None


def first_loss(n: NDArray[np.integer], difference: Floats) -> float:
    """The first n at which a smoothed difference is not positive; infinite where it always is."""
    smooth = np.convolve(np.pad(difference, 1, mode="edge"), np.ones(3) / 3, mode="valid")
    lost = np.flatnonzero(smooth <= 0)
    return float(n[lost[0]]) if lost.size else np.inf
