"""A benchmark's results in numbers: `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.report_variance import variance_of
from model.results import Row
from model.statistics import (
    REFERENCES,
    SHARES,
    Curves,
    Floats,
    Group,
    areas,
    budget_of,
    crossing,
    grouped,
    holm,
    images_to,
    interval,
    paired,
    penalties,
    references,
    t_test,
)

#: Numbers of labelled images at which two settings are compared.
POINTS = (0, 1, 2, 5, 10, 20)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """All that a report says, by setting, set and strategy."""
    group, full = grouped(rows), references(rows)
    own: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        own.setdefault((row.setting, row.set), []).append(row)
    settings = {
        setting: {
            "sets": {
                name: summary_of_set(curves, full.get((setting, name), np.zeros(0)))
                | {"variance": variance_of(curves, own[setting, name])}
                for name, curves in sets.items()
            },
            "penalty": penalty(sets),
        }
        for setting, sets in group.items()
    }
    return {
        "settings": settings,
        "refinement": compared(group, ", no weak labels"),
        "layers": {layers: compared(group, f", layers={layers}") for layers in ("head", "all")},
        "commits": sorted({row.commit for row in rows}),
        "devices": sorted({row.device for row in rows}),
        "rows": len(rows),
    }


def summary_of_set(curves: Group, full: Floats) -> dict[str, Any]:
    """One data set under one setting."""
    found = {name: summary_of(one, float(full.mean()) if len(full) else None) for name, one in curves.items()}
    for reference in REFERENCES:
        if reference in curves:
            add_comparison(found, curves, reference)
    first = next(iter(curves.values()))
    coarse = [row.coarse_seconds for one in curves.values() for curve in one.rows for row in curve if row.n]
    return {
        "budget": budget_of(first.n),
        "n": list(first.n),
        "start": float(np.mean([one.miou[:, 0].mean() for one in curves.values()])),
        "full_supervision": {"mean": float(full.mean()), "seeds": len(full)} if len(full) else None,
        "coarse_seconds": float(np.max(coarse)) if coarse else 0.0,
        "strategies": found,
    }


def summary_of(curves: Curves, full: float | None) -> dict[str, Any]:
    """One strategy's curves."""
    area, at = areas(curves), curves.n.index(budget_of(curves.n))
    facts: dict[str, Any] = {
        "seeds": len(curves.seeds),
        "auc": float(area.mean()),
        "auc_interval": interval(area),
        "auc_log": float(areas(curves, log=True).mean()),
        "final_mIoU": float(curves.miou[:, at].mean()),
        "final_interval": interval(curves.miou[:, at]),
        "train_seconds": float(curves.values(lambda row: row.train_seconds)[:, 1:].mean()),
        "score_seconds": float(curves.values(lambda row: row.score_seconds)[:, 1:].mean()),
        "versus": {},
    }
    for share in SHARES:
        facts |= effort_to(curves, None if full is None else share * full, round(100 * share))
    return facts


def effort_to(curves: Curves, target: float | None, percent: int) -> dict[str, Any]:
    """Images, seconds and clicks until the mean curve reaches a target; None where it does not."""
    n = None if target is None else images_to(curves, target)
    at = None if n is None else curves.n.index(n)

    def mean(values: Floats) -> float | None:
        return None if at is None else float(values[:, at].mean())

    return {
        f"images_to_{percent}": n,
        f"seconds_to_{percent}": mean(curves.seconds(scratch=False)),
        f"scratch_seconds_to_{percent}": mean(curves.seconds(scratch=True)),
        f"clicks_to_{percent}": mean(curves.clicks()),
    }


def add_comparison(found: dict[str, Any], curves: Group, reference: str) -> None:
    """Paired differences of every strategy to one, corrected over the strategies, and where they end."""
    tests = {name: paired(one, curves[reference]) for name, one in curves.items() if name != reference}
    told = {name: test for name, test in tests.items() if test}
    corrected = holm({name: test["p"] for name, test in told.items()})
    for name, test in told.items():
        ends = crossing(curves[name], curves[reference])
        found[name]["versus"][reference] = {**test, "p_holm": corrected[name], "gain": ends}


def penalty(sets: Mapping[str, Group]) -> dict[str, Any]:
    """The penalty matrix of a setting; a column's mean is over all strategies, itself included."""
    names, table = penalties(sets)
    return {"strategies": names, "matrix": table.tolist(), "column_means": table.mean(0).tolist() if names else []}


def compared(group: Mapping[str, Mapping[str, Group]], suffix: str) -> dict[str, Any]:
    """Settings that differ by one thing, by setting and set: mIoU and IoU with, without, and the paired difference.

    A difference is plain less changed: of weak labels, what they add.
    """
    found: dict[str, Any] = {}
    for setting, sets in group.items():
        for name, curves in group.get(setting + suffix, {}).items():
            shared = [s for s in curves if s in sets.get(name, {})]
            if shared:
                entries = {s: compare(sets[name][s], curves[s]) for s in shared}
                found.setdefault(setting, {})[name] = {s: entry for s, entry in entries.items() if entry}
    return found


def compare(plain: Curves, changed: Curves) -> dict[str, Any]:
    """One strategy under two settings, over common seeds; empty where there is none."""
    seeds = [seed for seed in plain.seeds if seed in changed.seeds]
    steps = [n for n in plain.n if n in changed.n]
    if not seeds or len(steps) < 2:
        return {}
    pairs = [(plain.rows[plain.seeds.index(s)], changed.rows[changed.seeds.index(s)]) for s in seeds]
    points = {}
    for n in [n for n in POINTS if n in steps]:
        at = [(a[plain.n.index(n)], b[changed.n.index(n)]) for a, b in pairs]
        classes = list(at[0][0].iou)
        points[str(n)] = {
            "mIoU": [float(np.mean([row.mIoU for row in side])) for side in zip(*at, strict=True)],
            "iou": {c: [mean_of([row.iou[c] for row in side]) for side in zip(*at, strict=True)] for c in classes},
            "difference": t_test(np.array([a.mIoU - b.mIoU for a, b in at])),
        }
    same = plain.n == changed.n
    return {"points": points, "auc": paired(plain, changed) if same else None, "seeds": len(seeds)}


def mean_of(values: Sequence[float]) -> float | None:
    """Mean of an IoU over seeds; None where the class was neither there nor predicted."""
    told = [value for value in values if np.isfinite(value)]
    return float(np.mean(told)) if told else None
