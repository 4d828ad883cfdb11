"""What a benchmark's comparison rests on and what it lacks, as far as its rows can tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from model.report_variance import INSTANT
from model.results import FULL, Row

#: Seeds that the protocol asks for.
SEEDS = 5
#: What rows cannot show, and nobody should read into them.
UNSEEN = "the rows cannot show it"


def caution(facts: Mapping[str, Any]) -> Iterator[str]:
    """What to know before reading any ranking."""
    fewest = min(seeds_of(facts))
    if fewest < SEEDS:
        word = "seed" if fewest == 1 else "seeds"
        yield (f"Some strategies have {fewest} {word} only, fewer than the protocol's five: read intervals, not ranks.")
    if len(set(seeds_of(facts))) > 1:
        yield (
            "Strategies have different numbers of seeds, so their areas do not compare; a difference does: it is taken "
            "over the seeds that both strategies have."
        )
    for setting, count in facts["unfinished"].items():
        yield f"{setting}: {count} unfinished curve{'s are' if count > 1 else ' is'} left out of every number."


def seeds_of(facts: Mapping[str, Any]) -> list[int]:
    """Seeds of every strategy on every set."""
    sets = [data for one in facts["settings"].values() for data in one["sets"].values()]
    return [strategy["seeds"] for data in sets for strategy in data["strategies"].values()]


def protocol(rows: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    """How curves were made, and how many there are."""
    for setting, one in facts["settings"].items():
        yield f"{setting}: {extent(one['sets'])}."
    yield "mIoU is of one confusion table summed over all test images, not a mean over images."
    instant = {setting.startswith(INSTANT) for setting in facts["settings"]}
    if True in instant:
        yield (
            "The instant learner has no chance in it: a seed fixes which part of the pool may be picked from, and "
            "ties, for all strategies alike. More seeds are more such parts, not more luck in training."
        )
    if False in instant:
        yield "Every training starts again from the same network; its last state is tested, whatever the test says."
        yield "Seeds are paired: a seed fixes initial head, order, views and ties for all strategies alike."
    yield "Seconds of people's work are modelled from clicks and outlines, not measured with people."
    yield from origins(rows, facts)


def extent(sets: Mapping[str, Any]) -> str:
    """Sets, seeds and budgets of a setting."""
    seeds = sorted({s["seeds"] for data in sets.values() for s in data["strategies"].values()})
    full = [data["full_supervision"]["seeds"] for data in sets.values() if data["full_supervision"]]
    last = sorted({data["budget"] for data in sets.values()})
    return (
        f"{len(sets)} data set{'s' if len(sets) > 1 else ''}; {span(seeds)} seeds per strategy; "
        f"up to {span(last)} images; full supervision on {len(full)} of them"
        + (f" with {span(sorted(set(full)))} seeds" if full else "")
    )


def span(numbers: Sequence[int]) -> str:
    """The least and the most of rising numbers."""
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


def origins(rows: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    """Which code and devices the rows of a setting come from."""
    for setting in facts["settings"]:
        commits = sorted({row.commit for row in rows if row.setting == setting})
        if len(commits) > 1:
            yield f"{setting}: rows of {len(commits)} states of the code are compared ({', '.join(commits)})."
        for name, (least, most) in starts(rows, setting).items():
            yield (
                f"{setting}, {name}: strategies of one seed do not start alike, by up to {most - least:.6f} mIoU at "
                "n = 0: something besides the strategy differs between their rows."
            )
    changed = sorted(commit for commit in facts["commits"] if commit.endswith("+"))
    if changed:
        yield f"Made with changes that were not committed: {', '.join(changed)}."


def starts(rows: Sequence[Row], setting: str) -> dict[str, tuple[float, float]]:
    """Set -> the widest range of mIoU at n = 0 that strategies have for one seed; only where there is one."""
    values: dict[tuple[str, int], set[float]] = {}
    for row in rows:
        if row.setting == setting and row.n == 0 and row.strategy != FULL and np.isfinite(row.mIoU):
            values.setdefault((row.set, row.seed), set()).add(row.mIoU)
    found: dict[str, tuple[float, float]] = {}
    for (name, _), several in sorted(values.items()):
        least, most = min(several), max(several)
        before = found.get(name, (0.0, 0.0))
        if most - least > before[1] - before[0]:
            found[name] = least, most
    return found


def pitfalls(rows: Sequence[Row], facts: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Known ways to fool oneself (Munjal et al. 2022, Lüth et al. 2023, nnActive 2025), and whether we did."""
    settings = facts["settings"]
    sets = {name for one in settings.values() for name in one["sets"]}
    begins = {setting.split(",")[0] for setting in settings}
    commits = {s: {row.commit for row in rows if row.setting == s} for s in settings}
    full = sum(row.strategy == FULL for row in rows)
    tick, fewest = answer, min(seeds_of(facts))
    return (
        ("pitfall avoided", "", "what there is"),
        ("several data sets", *tick(len(sets) > 1, ", ".join(sorted(sets)))),
        ("several conditions of training", *tick(len(begins) > 1, ", ".join(sorted(begins)))),
        ("several query sizes", *sizes(facts)),
        ("several starting budgets", *tick(False, "every curve starts at n = 0")),
        ("five paired seeds or more", *tick(fewest >= SEEDS, f"{fewest} at least")),
        ("full supervision as a mark", *tick(full > 0, f"{full} trainings")),
        ("chance that knows the foreground", *adapted(facts)),
        ("learning without full labels as a rival", *tick(any(facts["refinement"].values()), "see R8")),
        ("cost in work, not in images alone", *tick(any(r.full_seconds > 0 for r in rows), "modelled seconds, clicks")),
        ("one state of the code per setting", *tick(all(len(c) == 1 for c in commits.values()), codes(commits))),
        ("one kind of device", *tick(len(facts["devices"]) == 1, "; ".join(facts["devices"]))),
        ("strategies not designed or chosen on these test images", "?", UNSEEN),
        ("recipe tuned on a small validation set only", "?", UNSEEN),
        ("gains that outlive strong regularisation", "?", f"{UNSEEN}: one recipe per setting"),
    )


def answer(good: bool, what: str) -> tuple[str, str]:
    """A tick or a no, with what it rests on."""
    return ("yes" if good else "no"), what


def sizes(facts: Mapping[str, Any]) -> tuple[str, str]:
    """How many images were picked at a time."""
    found = {data["n"][1] - data["n"][0] for one in facts["settings"].values() for data in one["sets"].values()}
    return answer(len(found) > 1, ", ".join(str(size) for size in sorted(found)))


def adapted(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the baseline by chance that uses the coarse labels ran everywhere."""
    have = [
        "foreground-random" in data["strategies"] for one in facts["settings"].values() for data in one["sets"].values()
    ]
    return answer(all(have), f"foreground-random in {sum(have)} of {len(have)} comparisons")


def codes(commits: Mapping[str, set[str]]) -> str:
    """States of the code by setting."""
    return "; ".join(f"{setting}: {len(found)}" for setting, found in commits.items())
