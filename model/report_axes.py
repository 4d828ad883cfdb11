"""What all figures of a report share: colours and lines of strategies, panels, scales, small files."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats

from model.statistics import LEVEL, REFERENCES, Curves, Floats, Group

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
#: Colours that people tell apart however they see them (Okabe and Ito).
COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#000000", "#E69F00", "#CC79A7")
#: Shown where a figure has room for a few strategies only; a solid line each, in the order of `COLOURS`.
SOLID = ("first-row", "entropy", "badge", "egl", "coarse-egl", "coverage", "typiclust")
FEW = (*REFERENCES, *SOLID, "gradient-magnitude")
#: Lines of the other strategies, colour by colour, and of those that nobody told us about.
LINES = ((0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
STRANGE = (0, (3, 1, 1, 1, 1, 1))
GREYS: Mapping[str, tuple[str, Any]] = {"random": ("#777777", "-"), "foreground-random": ("#AAAAAA", (0, (4, 2)))}
WIDTH, HEIGHT, DPI = 4.6, 3.3, 100
#: Colours of a saved figure; red, green and blue as one number.
PALETTE, POSITIONS = 96, np.array([1 << 16, 1 << 8, 1])
Spread = tuple[Floats, Floats, Floats]


def look(strategy: str) -> dict[str, Any]:
    """The colour and line that a strategy has in every figure, and no other one has."""
    line: Any
    rest = [name for members in FAMILIES.values() for name in members if name not in SOLID]
    if strategy in GREYS:
        colour, line = GREYS[strategy]
    elif strategy in SOLID:
        colour, line = COLOURS[SOLID.index(strategy)], "-"
    elif strategy in rest:
        turn, place = divmod(rest.index(strategy), len(COLOURS))
        colour, line = COLOURS[place], LINES[turn]
    else:
        colour, line = COLOURS[zlib.crc32(strategy.encode()) % len(COLOURS)], STRANGE
    return {"color": colour, "linestyle": line}


def plain(text: str) -> str:
    """A name as matplotlib writes it without reading formulas into it."""
    return text.replace("$", r"\$")


def few(group: Group) -> list[str]:
    """The strategies of a figure that has room for a few only."""
    known = [s for s in FEW if s in group]
    return known if set(known) - set(REFERENCES) else [*known, *(s for s in group if s not in known)][:8]


def spread(values: Floats) -> Spread:
    """Mean over seeds (S, T), and its 95 % t-interval; the mean itself of fewer than two seeds."""
    mean, count = values.mean(0), len(values)
    if count < 2:
        return mean, mean, mean
    reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
    return mean, mean - reach, mean + reach


def draw(axes: Axes, x: Floats, values: Floats, strategy: str) -> None:
    """One line with its band."""
    mean, low, high = spread(values)
    axes.plot(x, mean, label=plain(strategy), linewidth=1.4, **look(strategy))
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


def legend(row: Sequence[Axes]) -> None:
    """Beside a row of panels, every name that one of them has."""
    found: dict[str, Any] = {}
    for axes in row:
        found |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        row[-1].legend(list(found.values()), list(found), frameon=False, fontsize=8, **place)


def axis(curves: Curves) -> Floats:
    """(T,) numbers of labelled images."""
    return np.array(curves.n, np.float64)


def share_scale(columns: Iterable[Sequence[Axes]]) -> None:
    """The same units to the centimetre in every panel, and the same ends in all of a column, a data set.

    That of the lines, since bands of few seeds would dwarf them. Data sets differ more in height than strategies do:
    the same ends for all would press every curve flat.
    """
    found = [(column, *heights(column)) for column in columns]
    span = max((high - low for _, low, high in found), default=0.0) * 1.16 + 1e-3
    for column, low, high in found:
        for axes in column:
            axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)


def heights(column: Sequence[Axes]) -> tuple[float, float]:
    """Lowest and highest point of all lines of some panels."""
    drawn = [np.asarray(line.get_ydata(), np.float64).ravel() for axes in column for line in axes.lines]
    points = np.concatenate([*drawn, np.zeros(0)])
    points = points[np.isfinite(points)]
    return (float(points.min()), float(points.max())) if points.size else (0.0, 1.0)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in few colours, the strategies' own among them, and without a date.

    Files stay small, and equal rows give equal bytes.
    """
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    own = np.array([to_rgb(name) for name in ("white", *COLOURS, *(c for c, _ in GREYS.values()))])
    own = np.rint(255 * own).astype(np.int64)
    common = image.quantize(PALETTE - len(own), dither=Image.Dither.NONE)
    places = np.asarray(common) + len(own)
    pixels = np.asarray(image, np.int64) @ POSITIONS
    for place, colour in enumerate(own):
        places[pixels == colour @ POSITIONS] = place
    small = Image.fromarray(places.astype(np.uint8))
    small.putpalette([*own.ravel().tolist(), *(common.getpalette() or [])])
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path, optimize=True)
