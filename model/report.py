"""The report of a benchmark: summary.json, figures, report.md and report.html, all from results.csv."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from model import figures
from model.pages import Block, markdown, page, slug
from model.report_protocol import caution, pitfalls, protocol
from model.report_sections import difference, ending, ends, interface, layers, picture, refinement
from model.report_variance import variance
from model.results import Row, read
from model.statistics import REFERENCES, grouped, unfinished
from model.summary import summarise

#: The labelling interface (R7), where the project's own pictures are at hand.
INTERFACE = Path(__file__).parents[1] / "docs" / "images" / "label-coarse.png"
#: A corrected p below this is called a difference.
SIGNIFICANT = 0.05


def write(out: Path) -> None:
    """Remake everything in a folder from its results.csv.

    Raises:
        ResultsError: the file is damaged.
    """
    rows = read(out / "results.csv")
    facts = summarise(rows) | {"unfinished": unfinished(rows)}
    (out / "summary.json").write_text(json.dumps(facts, indent=1, allow_nan=False, default=str) + "\n", "utf-8")
    shutil.rmtree(out / "figures", ignore_errors=True)
    blocks = list(pages(out, rows, facts))
    (out / "report.md").write_text(markdown(blocks), "utf-8")
    (out / "report.html").write_text(page(blocks), "utf-8")


def pages(out: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[Block]:
    """The report, block by block; figures are saved on the way."""
    yield Block("h1", "Which image next: learning curves")
    if not facts["settings"]:
        yield Block("p", "No curve is complete yet: run the benchmark on.")
        return
    yield Block(
        "p",
        f"From {facts['rows']} trained networks; code {', '.join(facts['commits'])}; {'; '.join(facts['devices'])}.",
    )
    yield from (Block("p", sentence) for sentence in caution(facts))
    for setting, told in facts["settings"].items():
        yield Block("h2", f"In short: {setting}")
        for name, one in told["sets"].items():
            yield from (Block("li", sentence) for sentence in verdict(name, one))
    groups = grouped(rows)
    for setting, told in facts["settings"].items():
        yield Block("h2", setting)
        for name, caption, figure in figures.of_setting(groups[setting], told, brief="," in setting):
            yield picture(out, slug(f"{setting}-{name}"), caption, figure)
        yield from (Block("table", f"{name}", rows=table(one)) for name, one in told["sets"].items())
    yield from ends(facts)
    yield from variance(facts)
    yield from refinement(out, facts)
    yield from layers(out, facts)
    yield from interface(out, facts, INTERFACE)
    yield Block("h2", "Protocol")
    yield from (Block("li", sentence) for sentence in protocol(rows, facts))
    yield Block("table", "Pitfalls of such comparisons", rows=pitfalls(rows, facts))


def verdict(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Who wins, ties and loses on a data set, in sentences."""
    strategies = facts["strategies"]
    best = max(strategies, key=lambda s: strategies[s]["auc"])
    full = facts["full_supervision"]
    reach = f"; full supervision reaches {full['mean']:.3f}" if full else ""
    seeds = strategies[best]["seeds"]
    over = f" over {seeds} seeds" if seeds > 1 else ""
    found = [f"{name}: {best} has the largest area, {area(strategies[best])}{over}, which claims nothing{reach}."]
    for reference in REFERENCES:
        tests = {s: f["versus"][reference] for s, f in strategies.items() if reference in f["versus"]}
        if tests:
            found.append(f"{name}, against {reference} ({area(strategies[reference])}): {compared(tests)}")
        elif reference in strategies:
            found.append(f"{name}: too few seeds to compare with {reference}.")
    return found


def area(facts: Mapping[str, Any]) -> str:
    """An area with its interval."""
    ends = facts["auc_interval"]
    return f"{facts['auc']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else " (one seed)")


def compared(tests: Mapping[str, Any]) -> str:
    """Which strategies are better, worse, and not to be told apart after correction."""
    better = [s for s, t in tests.items() if t["p_holm"] < SIGNIFICANT and t["mean"] > 0]
    worse = [s for s, t in tests.items() if t["p_holm"] < SIGNIFICANT and t["mean"] < 0]
    parts = [f"significantly better {named(better, tests)}", f"significantly worse {named(worse, tests)}"]
    rest = [s for s in tests if s not in better and s not in worse]
    first = max(rest, key=lambda s: tests[s]["mean"]) if rest else None
    parts += [f"{len(rest)} not to be told apart" + (f", first among them {named([first], tests)}" if first else "")]
    return "; ".join(parts) + f" ({max(t['pairs'] for t in tests.values())} pairs of seeds at most, Holm-corrected)."


def named(strategies: Sequence[str], tests: Mapping[str, Any]) -> str:
    """Strategies with their differences."""
    return (
        ", ".join(f"{s} ({difference(tests[s])})" for s in sorted(strategies, key=lambda s: -tests[s]["mean"]))
        or "none"
    )


HEAD = (
    *("strategy", "seeds", "area [95 %]", "log area", "at the budget", "images to 90 / 95 %", "minutes to 90 / 95 %"),
    *("from empty", "clicks to 90 %", "less random [95 %], corrected p", "less foreground-random", "gain ends"),
    "s to train / score",
)


def table(facts: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """A row per strategy, the largest area first."""
    strategies = facts["strategies"]
    return (HEAD, *(line(s, strategies[s]) for s in sorted(strategies, key=lambda s: -strategies[s]["auc"])))


def line(strategy: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The table's row of one strategy."""
    versus = [facts["versus"].get(reference) for reference in REFERENCES]
    gain = versus[0] and versus[0]["gain"]
    return (
        strategy,
        str(facts["seeds"]),
        area(facts),
        f"{facts['auc_log']:.3f}",
        f"{facts['final_mIoU']:.3f}",
        f"{shown(facts['images_to_90'])} / {shown(facts['images_to_95'])}",
        f"{minutes(facts['seconds_to_90'])} / {minutes(facts['seconds_to_95'])}",
        f"{minutes(facts['scratch_seconds_to_90'])} / {minutes(facts['scratch_seconds_to_95'])}",
        shown(facts["clicks_to_90"]),
        *(f"{difference(t)}, p {t['p_holm']:.3f}" if t else "" for t in versus),
        ending(gain) if gain else "",
        f"{facts['train_seconds']:.1f} / {facts['score_seconds']:.2f}",
    )


def shown(value: float | None) -> str:
    """A number, or a dash where the target was not reached."""
    return "-" if value is None or math.isnan(value) else f"{value:.0f}"


def minutes(seconds: float | None) -> str:
    """Seconds as minutes."""
    return "-" if seconds is None else f"{seconds / 60:.1f}"
