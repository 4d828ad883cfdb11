"""`firstrow perf`: how fast we are, as ratios to something measured beside us in the same run.

Every figure is the median of interleaved rounds: each round calls all that is compared once, every other round in
reverse, so that a machine whose speed drifts slows both sides of a ratio.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from backend.supervisor import child_environment, processors

#: Rounds of each comparison; what takes seconds gets fewer.
ROUNDS = 15
#: What can be measured by itself.
GROUPS = ("learner", "scoring", "images", "queue", "loop")
Call = Callable[[], object]


@dataclass(frozen=True)
class Item:
    """One figure.

    Attributes:
        name: what is compared, ours first, and under what circumstances.
        ratio: median; lower is better. NaN where it could not be measured; `base` then says why.
        target: the ratio must not be higher.
        base: what ours is divided by, and how long that took.
        device: where it was measured.
        low: of the rounds.
        high: of the rounds.
    """

    name: str
    ratio: float
    target: float
    base: str
    device: str
    low: float
    high: float

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio <= self.target


@dataclass(frozen=True)
class Times:
    """Seconds of each call in each round, taken side by side."""

    seconds: Mapping[str, NDArray[np.float64]]
    device: str

    def item(self, name: str, target: float, ours: str, base: str, said: str = "", factor: float = 1.0) -> Item:
        """The ratio of two calls.

        Args:
            name: of the item.
            target: of the ratio.
            ours: name of our call.
            base: name of the other.
            said: what the other is; its name by default.
            factor: by which the other's time is multiplied.
        """
        ratios = self.seconds[ours] / (factor * self.seconds[base])
        ms = 1e3 * factor * float(np.median(self.seconds[base]))
        return ratio(name, target, ratios, f"{said or base}, {ms:.3g} ms", self.device)


def ratio(name: str, target: float, ratios: Sequence[float] | NDArray[np.float64], base: str, device: str) -> Item:
    """An item of the ratios of all rounds."""
    return Item(name, float(np.median(ratios)), target, base, device, float(np.min(ratios)), float(np.max(ratios)))


def missing(name: str, target: float, why: str, device: str) -> Item:
    """An item that cannot be measured here."""
    return Item(name, math.nan, target, why, device, math.nan, math.nan)


def compare(calls: Mapping[str, Call], rounds: int, device: str) -> Times:
    """Time calls in turn, after one call of each that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - start)
    return Times({name: np.array(values) for name, values in taken.items()}, device)


def processor() -> str:
    """The CPU's name and the threads in use."""
    found = [line for line in _cpuinfo() if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {processors()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def measure(groups: Sequence[str]) -> Iterator[Item]:
    """The items of some groups, as they come."""
    from backend import perf_images, perf_learner, perf_loop, perf_queue, perf_scoring

    modules = (perf_learner, perf_scoring, perf_images, perf_queue, perf_loop)
    known = {group: module.items for group, module in zip(GROUPS, modules, strict=True)}
    for group in groups:
        yield from known[group]()


def table(items: Sequence[Item]) -> Table:
    """For people."""
    found = Table("item", "ratio", "target", "", "rounds", "base", title=items[0].device if items else "")
    for item in items:
        verdict = "-" if math.isnan(item.ratio) else "met" if item.met else "[bold]missed[/]"
        figures = [f"{item.ratio:.3f}", f"{item.target:g}", verdict, f"{item.low:.3f} - {item.high:.3f}"]
        found.add_row(item.name, *figures, item.base)
    return found


def run(groups: Sequence[str], as_json: bool) -> int:
    """Measure in a child that has a worker's allocator and threads, and show what it found.

    Returns:
        The exit status: 0, or that of a child that failed. A missed target is a figure and not a fault.
    """
    command = [sys.executable, "-m", "backend.perf", *groups]
    found: list[Item] = []
    with (
        subprocess.Popen(command, env=child_environment(dict(os.environ)), stdout=subprocess.PIPE, text=True) as child,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("measuring", total=None)
        for line in child.stdout or ():
            found.append(read(line))
            bar.update(task, description=f"measured {found[-1].name}")
            if as_json:
                sys.stdout.write(line)
                sys.stdout.flush()
    if not as_json:
        Console().print(table(found))
    return child.returncode


def read(line: str) -> Item:
    """An item from its line of JSON, which has null for what could not be measured."""
    row: dict[str, Any] = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
    return Item(**row)


def main() -> None:
    """The child: one line of JSON per item."""
    for item in measure(sys.argv[1:]):
        row = {key: None if value != value else value for key, value in asdict(item).items()}
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
