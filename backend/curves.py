"""Runs learning curves over the cores of this machine, or over rq workers; rows come as they are there."""

from __future__ import annotations

import multiprocessing
import queue as queues
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import torch
from threadpoolctl import threadpool_limits

from backend.enqueue import Board
from model.benchmark import Curve, run
from model.network import device
from model.results import Row

#: Seconds between looks at processes and jobs.
LOOK = 1.0

Asked = Sequence[tuple[Curve, Sequence[Row]]]
Found = Iterator[Row | str]


def over_processes(workers: int) -> Callable[[Asked], Found]:
    """Runs curves in processes of this machine, one thread each on the CPU."""

    def rows(asked: Asked) -> Found:
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager:
            inbox: Any = manager.Queue()
            with ProcessPoolExecutor(workers, context, initializer=ready) as pool:
                yield from collected([(c, pool.submit(work, c, d, inbox.put)) for c, d in asked], inbox)

    return rows


def collected(futures: Sequence[tuple[Curve, Future[None]]], inbox: Any) -> Found:
    """Rows as they come, then the faults of curves that failed."""
    left = dict(enumerate(futures))
    while left:
        ended = [number for number, (_, future) in left.items() if future.done()]
        yield from emptied(inbox, LOOK if not ended else 0.0)
        for number in ended:
            curve, future = left.pop(number)
            if error := future.exception():
                yield fault(curve, error)
    yield from emptied(inbox, 0.0)


def emptied(inbox: Any, wait: float) -> Iterator[Row]:
    """What is in the inbox; waits for a first row."""
    try:
        while True:
            yield inbox.get(timeout=wait) if wait else inbox.get_nowait()
            wait = 0.0
    except queues.Empty:
        return


def fault(curve: Curve, error: BaseException) -> str:
    """One line about a curve that failed."""
    what = "its process died (memory?)" if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
    return f"{Path(curve.data).name}, {curve.strategy}, seed {curve.seed}: {what}"


def ready() -> None:
    """Before a process's first curve: it has one core, for torch, numpy and OpenCV alike."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    cv2.setNumThreads(1)


def work(curve: Curve, done: Sequence[Row], emit: Callable[[Row], object]) -> None:
    """Run one curve and hand out each row as soon as it is there."""
    for row in run(curve, done, device()):
        emit(row)


def over_workers(board: Board, out: Path) -> Callable[[Asked], Found]:
    """Runs curves on rq workers, which must see data and results folder under the same paths."""

    def rows(asked: Asked) -> Found:
        name = str(out.resolve())
        jobs = [board.enqueue_curve(name, c.to_json(), [row.to_csv() for row in d]) for c, d in asked]
        for cells in board.curve_rows(name, jobs, LOOK):
            yield cells if isinstance(cells, str) else Row.from_csv(cells)

    return rows


def curve_job(name: str, curve: dict[str, Any], done: list[dict[str, Any]]) -> None:
    """The job of one curve on an rq worker; rows go back through Redis."""
    from backend.context import connect
    from backend.settings import Settings

    board = connect(Settings.read()).board
    rows = [Row.from_csv({key: str(value) for key, value in cells.items()}) for cells in done]
    work(Curve.from_json(curve), rows, lambda row: board.put_row(name, {k: str(v) for k, v in row.to_csv().items()}))
