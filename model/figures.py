"""Pictures of learning curves. Every one is remade from the rows alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats

from model.statistics import REFERENCES, Curves, Floats, Group, areas, budget_of, difference_of, interval

#: Strategies that are shown together, so that a panel stays readable.
FAMILIES: Mapping[str, Sequence[str]] = {
    "uncertainty and loss": (
        *("entropy", "entropy-top", "entropy-foreground", "least-confidence", "margin", "bald", "power-bald"),
        *("pseudo-loss", "class-stratified"),
    ),
    "gradients": (
        *("gradient-magnitude", "magnitude-range", "direction-range", "coarse-egl", "coarse-egl-segment", "egl"),
        *("egl-settles", "egl-huang", "learned-gradient", "entropy-gradnorm", "oracle-gradient"),
    ),
    "coverage and mixtures": ("first-row", "novel-egl", "coverage", "typiclust", "coreset", "badge", "bait"),
}
#: Colours that people tell apart however they see them (Okabe and Ito), and lines for more strategies than colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--")
GREYS = {"random": ("#777777", "-"), "foreground-random": ("#AAAAAA", "--")}
#: Shown where a figure has room for a few strategies only.
FEW = (*REFERENCES, "first-row", "coverage", "typiclust", "entropy", "badge", "egl", "coarse-egl")
WIDTH, HEIGHT, DPI = 4.6, 3.3, 100
Spread = tuple[Floats, Floats, Floats]


def look(strategy: str) -> dict[str, Any]:
    """The colour and line that a strategy has in every figure."""
    if strategy in GREYS:
        colour, line = GREYS[strategy]
        return {"color": colour, "linestyle": line}
    members = next((list(f) for f in FAMILIES.values() if strategy in f), [strategy])
    place = members.index(strategy)
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place // len(COLOURS) % len(LINES)]}


def spread(values: Floats) -> Spread:
    """Mean over seeds (S, T), and its 95 % t-interval; the mean itself of fewer than two seeds."""
    mean, count = values.mean(0), len(values)
    if count < 2:
        return mean, mean, mean
    reach = stats.t.ppf(0.975, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
    return mean, mean - reach, mean + reach


def draw(axes: Axes, x: Floats, values: Floats, strategy: str) -> None:
    """One line with its band."""
    mean, low, high = spread(values)
    axes.plot(x, mean, label=strategy, linewidth=1.4, **look(strategy))
    axes.fill_between(x, low, high, color=look(strategy)["color"], alpha=0.1, linewidth=0)


def panels(rows: int, columns: int, height: float = HEIGHT) -> tuple[Figure, list[list[Axes]]]:
    """A figure of panels with plain frames."""
    figure = Figure(figsize=(WIDTH * columns + 1.9, height * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, [list(row) for row in grid]


def legend(axes: Axes) -> None:
    """Names beside a panel that has any."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def axis(curves: Curves) -> Floats:
    """(T,) numbers of labelled images."""
    return np.array(curves.n, np.float64)


def learning_curves(sets: Mapping[str, Group]) -> Figure:
    """mIoU against labelled images: a row per family of strategies, a column per data set."""  # noqa: D403
    present = {strategy for group in sets.values() for strategy in group}
    families = {name: members for name, members in FAMILIES.items() if present & set(members)}
    families = families or {"all": tuple(present)}
    figure, grid = panels(len(families), len(sets))
    for row, (family, members) in zip(grid, families.items(), strict=False):
        for axes, (name, group) in zip(row, sets.items(), strict=True):
            for strategy in [s for s in dict.fromkeys((*REFERENCES, *members)) if s in group]:
                draw(axes, axis(group[strategy]), group[strategy].miou, strategy)
            axes.set_title(f"{name}: {family}", fontsize=10)
            axes.set_xlabel("labelled images")
            axes.set_ylabel("mIoU")
        legend(row[-1])
    for column in zip(*grid, strict=True):
        share_height(column)
    return figure


def share_height(column: Sequence[Axes]) -> None:
    """The same scale in all panels of a data set: that of the lines, since bands of few seeds would dwarf them."""
    heights = np.concatenate([np.asarray(line.get_ydata(), np.float64) for axes in column for line in axes.lines])
    margin = 0.08 * (heights.max() - heights.min()) + 1e-3
    for axes in column:
        axes.set_ylim(heights.min() - margin, heights.max() + margin)


def class_curves(group: Group) -> Figure:
    """IoU of each class against labelled images."""
    few = [s for s in FEW if s in group] or list(group)[:6]
    classes = list(group[few[0]].rows[0][0].iou)
    columns = min(3, len(classes))
    figure, grid = panels(-(-len(classes) // columns), columns, 2.6)
    cells = [axes for row in grid for axes in row]
    for axes, name in zip(cells, classes, strict=False):
        for strategy in few:
            curves = group[strategy]
            axes.plot(
                axis(curves), np.nanmean(filled(curves, name), 0), linewidth=1.3, label=strategy, **look(strategy)
            )
        axes.set_title(name, fontsize=10)
    for axes in cells[len(classes) :]:
        axes.set_visible(False)
    legend(cells[min(columns, len(classes)) - 1])
    return figure


def filled(curves: Curves, name: str) -> Floats:
    """(S, T) IoU of a class; 0 where it is neither there nor predicted."""
    return np.nan_to_num(curves.values(lambda row: row.iou[name]))


def area_dots(sets: Mapping[str, Group]) -> Figure:
    """Areas under the curve with bootstrap intervals, the best on top."""
    most = max(len(group) for group in sets.values())
    figure, (row,) = panels(1, len(sets), 1.2 + 0.2 * most)
    for axes, (name, group) in zip(row, sets.items(), strict=True):
        found = sorted(((float(areas(c).mean()), s) for s, c in group.items()), reverse=True)
        for place, (mean, strategy) in enumerate(reversed(found)):
            low, high = interval(areas(group[strategy])) or (mean, mean)
            axes.plot([low, high], [place, place], color=look(strategy)["color"], linewidth=2)
            axes.plot([mean], [place], "o", color=look(strategy)["color"], markersize=5)
        axes.set_yticks(range(len(found)), [strategy for _, strategy in reversed(found)], fontsize=8)
        axes.set_title(f"{name}: area under mIoU(n)", fontsize=10)
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
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names) + 1), [*names, "column mean"], fontsize=8)
    axes.set_title("row beats column (share of budgets, summed over sets)", fontsize=9)
    return figure


def cost_curves(sets: Mapping[str, Group]) -> Figure:
    """mIoU against a person's minutes: with prelabels and coarse labels above, from empty images below."""  # noqa: D403
    figure, grid = panels(2, len(sets))
    for scratch, row in zip((False, True), grid, strict=True):
        for axes, (name, group) in zip(row, sets.items(), strict=True):
            for strategy in [s for s in FEW if s in group] or list(group)[:6]:
                curves = group[strategy]
                minutes = curves.seconds(scratch).mean(0) / 60
                axes.plot(minutes, curves.miou.mean(0), linewidth=1.4, label=strategy, **look(strategy))
            axes.set_title(
                f"{name}: {'each image from empty' if scratch else 'coarse labels and prelabels'}", fontsize=10
            )
            axes.set_xlabel("minutes of a person's work")
            axes.set_ylabel("mIoU")
        legend(row[-1])
    for column in zip(*grid, strict=True):
        share_height(column)
        right = max(axes.get_xlim()[1] for axes in column)
        for axes in column:
            axes.set_xlim(0, right)
    return figure


def gains(sets: Mapping[str, Group]) -> Figure | None:
    """Difference to random at every n with its band; None without pairs."""
    usable = {name: group for name, group in sets.items() if "random" in group and len(set(FEW) & set(group)) > 1}
    if not usable:
        return None
    figure, (row,) = panels(1, len(usable))
    for axes, (name, group) in zip(row, usable.items(), strict=True):
        axes.axhline(0, color="#777777", linewidth=1)
        for strategy in [s for s in FEW if s in group and s != "random"]:
            seeds = sorted(set(group[strategy].seeds) & set(group["random"].seeds))
            if seeds:
                draw(axes, axis(group[strategy]), difference_of(group[strategy], group["random"], seeds), strategy)
        share_height([axes])
        axes.set_title(f"{name}: mIoU less that of random", fontsize=10)
        axes.set_xlabel("labelled images")
    legend(row[-1])
    return figure


def effort(summaries: Mapping[str, Any]) -> Figure | None:
    """Minutes to 90 and 95 % of full supervision, with prelabels and without; None where nobody reaches it."""
    sets = {
        n: s["strategies"] for n, s in summaries.items() if any(f["images_to_90"] for f in s["strategies"].values())
    }
    if not sets:
        return None
    most = max(len(strategies) for strategies in sets.values())
    figure, (row,) = panels(1, len(sets), 1.4 + 0.25 * most)
    kinds = [
        (f"{prefix}seconds_to_{share}", f"{share} %, {label}", colour, mark)
        for share, colour in ((90, "#0072B2"), (95, "#D55E00"))
        for prefix, label, mark in (("", "prelabels", "o"), ("scratch_", "from empty", "x"))
    ]
    for axes, (name, strategies) in zip(row, sets.items(), strict=True):
        names = sorted(strategies, key=lambda s: -(strategies[s]["seconds_to_90"] or np.inf))
        for key, label, colour, mark in kinds:
            points = [
                (strategies[s][key] / 60, place) for place, s in enumerate(names) if strategies[s][key] is not None
            ]
            axes.plot([x for x, _ in points], [y for _, y in points], mark, color=colour, label=label, markersize=5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"{name}: minutes to a share of full supervision", fontsize=10)
        axes.set_xlabel("minutes of a person's work")
    legend(row[-1])
    return figure


def refinement(entries: Mapping[str, Any]) -> Figure:
    """R8: IoU of each class at n = 0 with and without learning the pseudo ground truth, and mIoU as labels come."""
    figure, grid = panels(2, len(entries))
    for (top, bottom), (name, strategies) in zip(zip(*grid, strict=True), entries.items(), strict=True):
        first = next(iter(strategies.values()))["points"].get("0")
        if first:
            classes = list(first["iou"])
            for shift, side, colour, label in (
                (-0.2, 0, "#0072B2", "coarse labels learnt"),
                (0.2, 1, "#AAAAAA", "not"),
            ):
                heights = [first["iou"][c][side] or 0.0 for c in classes]
                top.bar(np.arange(len(classes)) + shift, heights, 0.4, color=colour, label=label)
            top.set_xticks(range(len(classes)), classes, rotation=45 if len(classes) > 4 else 0, fontsize=8)
        top.set_title(f"{name}: IoU at n = 0", fontsize=10)
        for strategy, entry in strategies.items():
            n = [int(key) for key in entry["points"]]
            for side, line in ((0, "-"), (1, ":")):
                mean = [point["mIoU"][side] for point in entry["points"].values()]
                label = strategy + ("" if side == 0 else ", full labels only")
                bottom.plot(n, mean, line, color=look(strategy)["color"], marker="o", markersize=3, label=label)
        bottom.set_xlabel("labelled images")
        bottom.set_ylabel("mIoU")
    legend(grid[0][-1])
    legend(grid[1][-1])
    return figure


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
    axes.set_yticks(range(len(points)), [label for label, _ in points], fontsize=8)
    axes.set_title("area with those layers less area with the last layer", fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure in few colours and without a date: small files, and equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def of_setting(sets: Mapping[str, Group], facts: Mapping[str, Any], brief: bool) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of what one setting shows; in `brief` curves and areas, for a variant of another."""
    budget = max(budget_of(c.n) for g in sets.values() for c in g.values())
    yield "curves", f"mIoU at every n up to {budget}, mean and 95 % band over seeds.", learning_curves(sets)
    yield "auc", "Area under the learning curve with 95 % bootstrap intervals over seeds.", area_dots(sets)
    if brief:
        return
    if (gain := gains(sets)) is not None:
        yield (
            "gain",
            "Difference to random, paired by seed, with its 95 % band: where a band holds 0, nothing is shown.",
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
