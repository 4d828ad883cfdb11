"""`firstrow bench`: many learning curves, over the cores of this machine or over rq workers; resumable."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from backend.curves import over_processes, over_workers
from backend.enqueue import Board
from backend.errors import BenchError
from model import results
from model.benchmark import SCALES, Curve, train_source
from model.data import Folder, FolderError, ImageError
from model.farms import Style
from model.field import write_folder
from model.network import PretrainedError, device
from model.results import FULL, Row
from model.strategies import REFERENCES, STRATEGIES

#: Where the benchmark of this project got its rendered sets from: images for the pool and for the test.
RENDERED: dict[Style, tuple[int, int]] = {"source": (80, 20), "target": (100, 40)}
#: `random` runs with this many times the seeds: everything is compared with it.
RANDOM_SEEDS = 3


@dataclass(frozen=True)
class Order:
    """What `firstrow bench run` was asked for.

    Attributes:
        data: pixel-labelled folders.
        strategies: names.
        budget: labelled images at most, from 1 on.
        tail: further numbers of labelled images beyond the budget.
        query_size: images picked at a time.
        seeds: learning curves per strategy.
        scale: a key of `model.benchmark.SCALES`.
        network: a key of `model.network.NETWORKS`.
        start: "pretrained" or "scratch".
        source: pixel-labelled folder to learn first; its network is then where every training starts.
        weak: coarsely labelled images are trained on too.
        layers: whose gradient is taken.
        out: folder of the results.
        learner: "instant" or "deep".
    """

    data: tuple[Path, ...]
    strategies: tuple[str, ...]
    budget: int
    tail: tuple[int, ...]
    query_size: int
    seeds: int
    scale: str
    network: str
    start: str
    source: Path | None
    weak: bool
    layers: str
    out: Path
    learner: str


def bench(order: Order, workers: int, board: Board | None, console: Console) -> int:
    """Run what is missing of a benchmark.

    Args:
        order: what to run.
        workers: processes on this machine.
        board: rq workers are used instead when it is given.
        console: for the progress bar.

    Returns:
        The number of rows written.

    Raises:
        BenchError: the order makes no sense, or curves failed; those that did not are kept.
    """
    check(order)
    file = order.out / "results.csv"
    try:
        done = by_curve(results.read(file))
        curves = [curve for curve in plan(order) if missing(curve, done)]
    except (FolderError, ImageError, PretrainedError, results.ResultsError) as error:
        raise BenchError(str(error)) from error
    rows = sum(len(missing(curve, done)) for curve in curves)
    make = over_workers(board, order.out) if board else over_processes(workers)
    written, faults = 0, list[str]()
    with bar(console) as progress:
        task = progress.add_task(f"{len(curves)} curves", total=rows)
        for found in make([(curve, done.get(name_of(curve), [])) for curve in curves]):
            if isinstance(found, str):
                faults.append(found)
                console.print(found, style="red")
                continue
            results.append(file, [found])
            written += 1
            progress.update(task, advance=1, description=f"{found.set} {found.strategy} seed {found.seed}")
    if faults:
        raise BenchError(
            f"{len(faults)} of {len(curves)} curves failed, first: {faults[0]}; run the same command again"
        )
    return written


def check(order: Order) -> None:
    """Refuse what cannot be run before anything is.

    Raises:
        BenchError: says what is wrong and what to do.
    """
    unknown = set(order.strategies) - set(STRATEGIES) - set(REFERENCES)
    if unknown:
        names = ", ".join([*STRATEGIES, *REFERENCES])
        raise BenchError(f"there is no strategy {', '.join(sorted(unknown))}: choose from {names}")
    folders = [folder.resolve().name for folder in order.data]
    if len(set(folders)) < len(folders):
        raise BenchError(f"two of the data folders are called the same ({', '.join(folders)}): rename one")
    check_folders(order.data)
    check_folders(filter(None, [order.source]))
    if order.learner == "instant" and (order.start != "pretrained" or order.source or order.layers != "last"):
        raise BenchError(
            "the instant learner has one layer on a pretrained backbone: other layers or starts need --learner deep"
        )
    if order.start == "scratch" and SCALES[order.scale].frozen and not order.source:
        raise BenchError(f"the scale {order.scale} trains no backbone, so it cannot start from scratch: use another")
    if any(n <= order.budget for n in order.tail):
        raise BenchError(f"the tail {order.tail} must lie beyond the budget {order.budget}")


def check_folders(folders: Iterable[Path]) -> None:
    """Refuse a folder that is not there, and folders of which none can be read; one that cannot costs its own curves.

    Raises:
        BenchError: what is wrong with each.
    """
    faults = {folder: unreadable(folder) for folder in folders}
    if not all(folder.is_dir() for folder in faults) or (faults and all(faults.values())):
        raise BenchError("; ".join(filter(None, faults.values())))


def unreadable(folder: Path) -> str:
    """Why a folder is no pixel-labelled one, empty where it looks like one; no picture is opened."""
    try:
        data = Folder(folder)
        data.names("train"), data.names("test")
    except FolderError as error:
        return str(error)
    return ""


def plan(order: Order) -> Iterator[Curve]:
    """Every curve, seed by seed, so that what is there after a kill can be compared."""
    start = order.start
    if order.source:
        start = str(train_source(order.source, order.scale, order.network, order.out, device()))
    steps = (*range(order.query_size, order.budget + 1, order.query_size), *order.tail)
    base = Curve("", "", 0, steps, order.scale, order.network, start, order.weak, order.layers, commit(), order.learner)
    for seed in range(order.seeds * RANDOM_SEEDS):
        for folder, strategy in itertools.product(order.data, (*order.strategies, FULL)):
            if seed < order.seeds or strategy == "random":
                yield replace(base, data=str(folder.resolve()), strategy=strategy, seed=seed)


Known = dict[tuple[str, str, str, int], list[Row]]


def by_curve(rows: Iterable[Row]) -> Known:
    """Rows by setting, set, strategy and seed, rising n."""
    found: Known = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.n):
        found[row.key[:4]].append(row)
    return dict(found)


def name_of(curve: Curve) -> tuple[str, str, str, int]:
    """What the rows of a curve share."""
    return curve.setting, Path(curve.data).name, curve.strategy, curve.seed


def missing(curve: Curve, done: Known) -> list[int]:
    """The n that a curve still lacks; a reference has one row."""
    have = {row.n for row in done.get(name_of(curve), [])}
    if curve.strategy == FULL:
        return [] if have else [1]
    return [n for n in (0, *curve.steps) if n not in have]


def report(out: Path) -> Path:
    """Remake figures, tables and summary from a folder's results.

    Returns:
        The page to open.

    Raises:
        BenchError: there are no results.
    """
    from model import report as pages

    if not (out / "results.csv").is_file():
        raise BenchError(f"{out} has no results.csv: run firstrow bench run --out {out} first")
    try:
        pages.write(out)
    except results.ResultsError as error:
        raise BenchError(str(error)) from error
    return out / "report.html"


def render(folder: Path) -> None:
    """Render a source and a target field, the sets of this project's own benchmark that need no download."""
    for style, (train, test) in RENDERED.items():
        write_folder(folder / f"field-{style}", train, test, style, seed=1)


def commit() -> str:
    """The commit of the code, with a plus where it was changed since; the version where there is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or version("firstrow")


def bar(console: Console) -> Progress:
    """A progress bar with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


def cores() -> int:
    """Processes by default: one for a GPU, else as many as there are cores."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
