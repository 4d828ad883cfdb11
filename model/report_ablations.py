"""Pictures of settings that differ by one thing: weak labels (R8), layers of the gradient (R10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.report_axes import legend, look, panels, plain, share_scale


def refinement(entries: Mapping[str, Any]) -> Figure | None:
    """R8: IoU of each class at n = 0 with and without learning the pseudo ground truth, and mIoU as labels come.

    None where no strategy has a seed under both settings.
    """
    entries = {name: strategies for name, strategies in entries.items() if strategies}
    if not entries:
        return None
    figure, grid = panels(2, len(entries))
    for (top, bottom), (name, strategies) in zip(zip(*grid, strict=True), entries.items(), strict=True):
        bars(top, next(iter(strategies.values()))["points"].get("0"))
        top.set_title(plain(f"{name}: IoU at n = 0"), fontsize=10)
        for strategy, entry in strategies.items():
            lines(bottom, strategy, entry["points"])
        bottom.set_xlabel("labelled images")
        bottom.set_ylabel("mIoU")
    for row in grid:
        legend(row)
    share_scale([axes] for axes in grid[1])
    return figure


def bars(axes: Axes, point: Mapping[str, Any] | None) -> None:
    """IoU of each class with and without; a class that is neither there nor predicted has no bar."""
    if point is None:
        return
    classes = list(point["iou"])
    for shift, side, colour, text in ((-0.2, 0, "#0072B2", "coarse labels learnt"), (0.2, 1, "#AAAAAA", "not")):
        told = [(place, point["iou"][c][side]) for place, c in enumerate(classes)]
        told = [(place, height) for place, height in told if height is not None]
        axes.bar([x + shift for x, _ in told], [height for _, height in told], 0.4, color=colour, label=text)
    axes.set_ylim(0, 1)
    turn = 45 if len(classes) > 4 else 0
    axes.set_xticks(np.arange(len(classes)), [plain(c) for c in classes], rotation=turn, fontsize=8)


def lines(axes: Axes, strategy: str, points: Mapping[str, Any]) -> None:
    """A strategy's mIoU with and without."""
    for side, width, more in ((0, 1.8, ""), (1, 0.7, ", full labels only")):
        heights = [point["mIoU"][side] for point in points.values()]
        mark = "os"[side]
        axes.plot(
            *([int(n) for n in points], heights, mark),
            **look(strategy),
            linewidth=width,
            markersize=3.5,
            markerfacecolor="white" if side else look(strategy)["color"],
            label=plain(strategy) + more,
        )


def layer_dots(entries: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """R10: what taking the gradient of more layers changes in the area, with 95 % intervals; None without pairs."""
    points = [
        (f"{strategy}, {name}, {layers}", entry["auc"])
        for layers, sets in entries.items()
        for name, strategies in sets.items()
        for strategy, entry in strategies.items()
        if entry.get("auc")
    ]
    if not points:
        return None
    figure, ((axes,),) = panels(1, 1, 1.2 + 0.25 * len(points))
    axes.axvline(0, color="#777777", linewidth=1)
    for place, (_, test) in enumerate(points):
        low, high = (-end for end in test["interval"])
        axes.plot([low, high], [place, place], color="#0072B2", linewidth=2)
        axes.plot([-test["mean"]], [place], "o", color="#0072B2")
    axes.set_yticks(range(len(points)), [plain(text) for text, _ in points], fontsize=8)
    axes.set_title("area with those layers less area with the last layer", fontsize=9)
    return figure
