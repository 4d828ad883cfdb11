"""Pictures of what a learning curve costs a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.report_axes import few, legend, look, panels, plain, share_scale
from model.statistics import Group

#: Kinds of work until a share of full supervision: key of the summary, its divisor, name, colour, mark.
MINUTES = (
    ("seconds_to_90", 60, "90 %, prelabels", "#0072B2", "o"),
    ("scratch_seconds_to_90", 60, "90 %, from empty", "#0072B2", "x"),
    ("seconds_to_95", 60, "95 %, prelabels", "#D55E00", "o"),
    ("scratch_seconds_to_95", 60, "95 %, from empty", "#D55E00", "x"),
)
CLICKS = (
    ("clicks_to_90", 1, "90 %, prelabels", "#0072B2", "o"),
    ("clicks_to_95", 1, "95 %, prelabels", "#D55E00", "o"),
)


def cost_curves(sets: Mapping[str, Group]) -> Figure:
    """mIoU against a person's minutes: with prelabels and coarse labels above, from empty images below."""  # noqa: D403
    figure, grid = panels(2, len(sets))
    for scratch, row in zip((False, True), grid, strict=True):
        for axes, (name, group) in zip(row, sets.items(), strict=True):
            for strategy in few(group):
                curves = group[strategy]
                minutes = curves.seconds(scratch).mean(0) / 60
                axes.plot(minutes, curves.miou.mean(0), linewidth=1.4, label=plain(strategy), **look(strategy))
            how = "each image from empty" if scratch else "coarse labels and prelabels"
            axes.set_title(plain(f"{name}: {how}"), fontsize=10)
            axes.set_xlabel("minutes of a person's work")
            axes.set_ylabel("mIoU")
        legend(row)
    columns = list(zip(*grid, strict=True))
    share_scale(columns)
    for column in columns:
        right = max(axes.get_xlim()[1] for axes in column)
        for axes in column:
            axes.set_xlim(0, right)
    return figure


def effort(summaries: Mapping[str, Any]) -> Figure | None:
    """Minutes and clicks to 90 and 95 % of full supervision; None where nobody reaches 90 %."""
    sets = {
        n: s["strategies"]
        for n, s in summaries.items()
        if any(f["images_to_90"] is not None for f in s["strategies"].values())
    }
    if not sets:
        return None
    most = max(len(strategies) for strategies in sets.values())
    figure, grid = panels(2, len(sets), 1.4 + 0.25 * most)
    for row, kinds, unit in zip(grid, (MINUTES, CLICKS), ("minutes of a person's work", "clicks"), strict=True):
        for axes, (name, strategies) in zip(row, sets.items(), strict=True):
            names = sorted(strategies, key=lambda s: -told(strategies[s], kinds[0][0]))
            dots(axes, strategies, names, kinds)
            axes.set_title(plain(f"{name}: to a share of full supervision"), fontsize=10)
            axes.set_xlabel(unit)
        legend(row)
    return figure


def told(facts: Mapping[str, Any], key: str) -> float:
    """A number of the summary, infinite where a target was not reached."""
    return np.inf if facts[key] is None else float(facts[key])


def dots(
    axes: Axes,
    strategies: Mapping[str, Any],
    names: Sequence[str],
    kinds: Sequence[tuple[str, int, str, str, str]],
) -> None:
    """Per strategy a mark for every kind of work, the least on top."""
    for key, divisor, text, colour, mark in kinds:
        points = [(strategies[s][key] / divisor, i) for i, s in enumerate(names) if strategies[s][key] is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], mark, color=colour, label=text, markersize=5)
    axes.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.7, len(names) - 0.3)
