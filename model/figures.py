"""Pictures of learning curves. Every one is remade from the rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.report_axes import DPI, FAMILIES, axis, draw, few, legend, look, panels, plain, save, share_scale
from model.report_work import cost_curves, effort
from model.statistics import (
    REFERENCES,
    Curves,
    Floats,
    Group,
    areas,
    budget_of,
    difference_of,
    interval,
    shared_seeds,
    shared_steps,
)

__all__ = ["gains", "learning_curves", "look", "of_setting", "penalty_matrix", "save"]


def of_setting(sets: Mapping[str, Group], facts: Mapping[str, Any], brief: bool) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of what one setting shows; in `brief` curves and areas, for a variant of another."""
    budget = max(budget_of(c.n) for g in sets.values() for c in g.values())
    yield "curves", f"mIoU at every n up to {budget}, mean and 95 % band over seeds.", learning_curves(sets)
    if (late := tail(sets)) is not None:
        yield "tail", "mIoU of few strategies on to large numbers of images, on a logarithmic axis.", late
    yield "auc", "Area under the learning curve with 95 % bootstrap intervals over seeds.", area_dots(sets)
    if brief:
        return
    if (gain := gains(sets, facts["sets"])) is not None:
        yield (
            "gain",
            "Difference to random, paired by seed, with its 95 % band: where a band holds 0, nothing is shown. "
            "A dot is where the smoothed difference comes down to 0.",
            gain,
        )
    if len(facts["penalty"]["strategies"]) > 1:
        matrix = penalty_matrix(facts["penalty"]["strategies"], facts["penalty"]["matrix"])
        yield (
            "penalty",
            "Pairwise penalty matrix: a column's mean says how often the others beat it; lower is better.",
            matrix,
        )
    yield "cost", "mIoU against a person's work, coarse labels included.", cost_curves(sets)
    if (work := effort(facts["sets"])) is not None:
        yield "effort", "Work until 90 and 95 % of full supervision, with prelabels and from empty images.", work
    for name, group in sets.items():
        yield f"classes-{name}", f"{name}: IoU of each class.", class_curves(group)


def families_of(sets: Mapping[str, Group]) -> dict[str, list[str]]:
    """The strategies that are there, by family, in their fixed order; those of no family by name."""
    present = {strategy for group in sets.values() for strategy in group}
    known = {strategy for members in FAMILIES.values() for strategy in members}
    found = {name: [s for s in members if s in present] for name, members in FAMILIES.items()}
    found["others"] = sorted(present - known - set(REFERENCES))
    found = {name: members for name, members in found.items() if members}
    return found or {"by chance": []}


def learning_curves(sets: Mapping[str, Group]) -> Figure:
    """mIoU against labelled images: a row per family of strategies, a column per data set."""  # noqa: D403
    families = families_of(sets)
    figure, grid = panels(len(families), len(sets))
    for row, (family, members) in zip(grid, families.items(), strict=True):
        for axes, (name, group) in zip(row, sets.items(), strict=True):
            for strategy in [s for s in (*REFERENCES, *members) if s in group]:
                inside = axis(group[strategy]) <= budget_of(group[strategy].n)
                draw(axes, axis(group[strategy])[inside], group[strategy].miou[:, inside], strategy)
            label(axes, f"{name}: {family}")
        legend(row)
    share_scale(zip(*grid, strict=True))
    return figure


def label(axes: Axes, title: str) -> None:
    """Title of a panel, and names of a learning curve's axes."""
    axes.set_title(plain(title), fontsize=10)
    axes.set_xlabel("labelled images")
    axes.set_ylabel("mIoU")


def tail(sets: Mapping[str, Group]) -> Figure | None:
    """Curves on to their last n; None where no curve goes past the budget."""
    late = {name: {s: group[s] for s in few(group) if has_tail(group[s])} for name, group in sets.items()}
    late = {name: group for name, group in late.items() if group}
    if not late:
        return None
    figure, (row,) = panels(1, len(late))
    for axes, (name, group) in zip(row, late.items(), strict=True):
        for strategy, curves in group.items():
            picked = axis(curves) >= 1
            draw(axes, axis(curves)[picked], curves.miou[:, picked], strategy)
        axes.set_xscale("log")
        label(axes, name)
    legend(row)
    share_scale([axes] for axes in row)
    return figure


def has_tail(curves: Curves) -> bool:
    """Whether there are rows past the budget."""
    return curves.n[-1] > budget_of(curves.n)


def class_curves(group: Group) -> Figure:
    """IoU of each class against labelled images; a gap where it is neither there nor predicted."""
    shown = few(group)
    classes = list(dict.fromkeys(name for s in shown for name in group[s].rows[0][0].iou))
    columns = max(1, min(3, len(classes)))
    figure, grid = panels(max(1, -(-len(classes) // columns)), columns, 2.6)
    cells = [axes for row in grid for axes in row]
    for axes, name in zip(cells, classes, strict=False):
        for strategy in shown:
            curves = group[strategy]
            axes.plot(axis(curves), told(curves, name), linewidth=1.3, label=plain(strategy), **look(strategy))
        axes.set_title(plain(name), fontsize=10)
    for axes in cells[len(classes) :]:
        axes.set_visible(False)
    legend(cells[:columns])
    return figure


def told(curves: Curves, name: str) -> Floats:
    """(T,) mean IoU of a class over the seeds that have one; NaN where none has."""
    values = curves.values(lambda row: row.iou.get(name, np.nan))
    count = np.isfinite(values).sum(0)
    return np.asarray(np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan), np.float64)


def area_dots(sets: Mapping[str, Group]) -> Figure:
    """Areas under the curve with bootstrap intervals, the best on top."""
    most = max(len(group) for group in sets.values())
    figure, (row,) = panels(1, len(sets), 1.2 + 0.2 * most)
    for axes, (name, group) in zip(row, sets.items(), strict=True):
        found = sorted((float(areas(c).mean()), s) for s, c in group.items())
        for place, (mean, strategy) in enumerate(found):
            low, high = interval(areas(group[strategy])) or (mean, mean)
            axes.plot([low, high], [place, place], color=look(strategy)["color"], linewidth=2)
            axes.plot([mean], [place], "o", color=look(strategy)["color"], markersize=5)
        axes.set_yticks(range(len(found)), [plain(strategy) for _, strategy in found], fontsize=8)
        axes.set_title(plain(f"{name}: area under mIoU(n)"), fontsize=10)
    return figure


def penalty_matrix(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> Figure:
    """How often the row beats the column; below it the column means, lower is better."""
    table = np.array(matrix, np.float64).reshape(len(names), len(names))
    shown = np.vstack([table, table.mean(0, keepdims=True)])
    side = 2.2 + 0.34 * len(names)
    figure = Figure(figsize=(side + 0.6, side), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=max(float(table.max()), 1e-9))
    for (i, j), value in np.ndenumerate(shown):
        dark = value > 0.6 * max(float(table.max()), 1e-9)
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), [plain(name) for name in names], rotation=90, fontsize=8)
    axes.set_yticks(range(len(names) + 1), [*(plain(name) for name in names), "column mean"], fontsize=8)
    axes.set_title("row beats column (share of budgets, summed over sets)", fontsize=9)
    return figure


def gains(sets: Mapping[str, Group], summaries: Mapping[str, Any]) -> Figure | None:
    """R11: difference to random at every n, with bands, a row per family; None where nobody shares two seeds."""
    usable = {name: {s: c for s, c in group.items() if compares(c, group)} for name, group in sets.items()}
    usable = {name: group for name, group in usable.items() if len(group) > 1}
    if not usable:
        return None
    families = families_of(usable)
    figure, grid = panels(len(families), len(usable))
    for row, (family, members) in zip(grid, families.items(), strict=True):
        for axes, (name, group) in zip(row, usable.items(), strict=True):
            axes.axhline(0, color="#777777", linewidth=1)
            for strategy in [s for s in ("foreground-random", *members) if s in group]:
                gain(axes, group, strategy, summaries[name]["strategies"][strategy]["versus"])
            label(axes, f"{name}: {family}")
            axes.set_ylabel("mIoU less that of random")
        legend(row)
    share_scale([[axes for row in grid for axes in row]])
    return figure


def compares(curves: Curves, group: Group) -> bool:
    """Whether there are two pairs with random, so that a difference has a band."""
    return "random" in group and len(shared_seeds(curves, group["random"])) > 1


def gain(axes: Axes, group: Group, strategy: str, versus: Mapping[str, Any]) -> None:
    """One difference to random, and where it comes down to 0."""
    ours, random = group[strategy], group["random"]
    seeds = shared_seeds(ours, random)
    n = np.array(shared_steps(ours, random), np.float64)
    inside = n <= budget_of(ours.n)
    draw(axes, n[inside], difference_of(ours, random, seeds)[:, inside], strategy)
    end = (versus.get("random", {}).get("gain") or {}).get("crosses")
    if end is not None and 1 < end <= budget_of(ours.n):
        axes.plot([end], [0.0], "o", color=look(strategy)["color"], markersize=4)
