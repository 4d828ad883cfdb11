"""Sections of a benchmark's report that answer one question each, or say in a sentence why they cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from model import report_ablations
from model.pages import Block, slug
from model.report_axes import save


def picture(out: Path, name: str, caption: str, figure: Figure) -> Block:
    """Save a figure under a name that no other one has; the block that shows it."""
    path, number = f"figures/{name}.png", 2
    while (out / path).exists():
        path, number = f"figures/{name}-{number}.png", number + 1
    save(figure, out / path)
    return Block("img", caption, path)


def difference(test: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    return f"{test['mean']:+.3f} [{test['interval'][0]:+.3f}, {test['interval'][1]:+.3f}]"


def ending(gain: Mapping[str, Any]) -> str:
    """Where a difference comes down to 0, with its interval."""
    low, high = ("never" if end is None else str(end) for end in gain["interval"])
    at = "never" if gain["crosses"] is None else f"n = {gain['crosses']}"
    return f"{at} [{low}, {high}]"


def ends(facts: Mapping[str, Any]) -> Iterator[Block]:
    """R11: up to where choosing images is better than chance."""
    yield Block("h2", "Where gains over random end (R11)")
    told = 0
    for setting, one in facts["settings"].items():
        for name, data in one["sets"].items():
            tests = {s: f["versus"]["random"] for s, f in data["strategies"].items() if "random" in f["versus"]}
            told += len(tests)
            for sentence in gains(tests, data["n"][-1]):
                yield Block("li", f"{setting}, {name}: {sentence}")
    if not told:
        yield Block("p", "Left out: no strategy shares two seeds with random.")


def gains(tests: Mapping[str, Any], last: int) -> Iterator[str]:
    """Strategies by where their leading run of significant gains ends, the longest first."""
    by_end: dict[int, list[str]] = {}
    for strategy, test in tests.items():
        if test["gain"]:
            by_end.setdefault(test["gain"]["significant_until"], []).append(strategy)
    for end in sorted(by_end, reverse=True):
        names = ", ".join(
            f"{s} (difference down to 0: {ending(tests[s]['gain'])})" if end else s for s in sorted(by_end[end])
        )
        if end == 0:
            yield f"not above random at n = 1 by a 95 % interval, so no run of gains to end: {names}."
        else:
            still = ", the last n there is" if end == last else ""
            yield f"above random at every n from 1 to {end}{still} (95 % interval of each n by itself): {names}."


def refinement(out: Path, facts: Mapping[str, Any]) -> Iterator[Block]:
    """R8: learning pseudo ground truth, alone and beside true labels."""
    yield Block("h2", "Learning from coarse labels alone (R8)")
    drawn = False
    for setting, sets in facts["refinement"].items():
        figure = report_ablations.refinement(sets)
        if figure is None:
            continue
        drawn = True
        caption = f"{setting}: with and without coarse labels in training."
        yield picture(out, f"{slug(setting)}-refinement", caption, figure)
        for name, strategies in sets.items():
            for strategy, entry in strategies.items():
                yield Block("table", f"{name}, {strategy}: with / without, {pairs(entry)}", rows=points(entry))
    if not drawn:
        yield Block("p", "Left out: no setting was run both with and without weak labels (--no-weak).")


def pairs(entry: Mapping[str, Any]) -> str:
    """How many seeds a comparison rests on."""
    return f"{entry['seeds']} pair{'s' if entry['seeds'] > 1 else ''} of seeds"


def points(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """A row per n: mIoU and IoU of each class with and without, and the paired difference of mIoU."""
    classes = list(dict.fromkeys(c for point in entry["points"].values() for c in point["iou"]))
    found = [("n", "mIoU", "difference [95 %]", *(f"IoU of {c}" for c in classes))]
    for n, point in entry["points"].items():
        sure = difference(point["difference"]) if point["difference"] else "-"
        found.append((n, both(point["mIoU"]), sure, *(both(point["iou"].get(c, (None, None))) for c in classes)))
    return tuple(found)


def both(sides: Any) -> str:
    """Two numbers, a dash for one that is not there."""
    return " / ".join("-" if value is None else f"{value:.3f}" for value in sides)


def layers(out: Path, facts: Mapping[str, Any]) -> Iterator[Block]:
    """R10: whose gradient is taken."""
    yield Block("h2", "Layers whose gradient is taken (R10)")
    by_setting: dict[str, dict[str, Any]] = {}
    for which, settings in facts["layers"].items():
        for setting, sets in settings.items():
            by_setting.setdefault(setting, {})[which] = sets
    drawn = {setting: report_ablations.layer_dots(entries) for setting, entries in by_setting.items()}
    for setting, figure in drawn.items():
        if figure is not None:
            yield picture(out, f"{slug(setting)}-layers", f"{setting}: gradients of more layers.", figure)
    if not any(drawn.values()):
        yield Block("p", "Left out: no setting was run with --layers head or all on two seeds or more.")


def interface(out: Path, facts: Mapping[str, Any], screenshot: Path) -> Iterator[Block]:
    """R7: what a person sees, where there is a picture of it, and how long coarse labels take."""
    yield Block("h2", "Coarse labels (R7)")
    if screenshot.is_file():
        (out / "figures").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(screenshot, out / "figures" / screenshot.name)
        caption = "A task in Label Studio: clusters with guesses; a wrong one takes a click and a key."
        yield Block("img", caption, f"figures/{screenshot.name}")
    else:
        yield Block("p", "The picture of the interface is in the project's repository.")
    told: dict[str, float] = {}
    for one in facts["settings"].values():
        for name, data in one["sets"].items():
            told[name] = max(told.get(name, 0.0), data["coarse_seconds"])
    for name, seconds in told.items():
        yield Block("li", f"{name}: {seconds:.0f} s of modelled work on coarse labels for the whole pool.")
