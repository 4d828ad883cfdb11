"""Threads of each worker that look around every second, also while their worker is busy: nothing stays undone.

One starts rounds whose pause is over or whose jobs were lost, and has all projects compared with Label Studio when
Redis has lost its memory. One looks at a few counters of each project: they tell of an event that was lost; it alone
waits for Label Studio. One has the worker known to Redis. Of several workers one looks at a time.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis import RedisError

from backend.context import Context, connect
from backend.enqueue import DEFAULT, GPU, Board
from backend.errors import FirstRowError, LabelStudioError
from backend.labelstudio import Row
from backend.settings import Settings
from backend.sync import differs

log = logging.getLogger(__name__)

#: Seconds between two looks at Redis, and between two looks whether rounds were lost.
TICK, RESCUE = 1.0, 5.0
#: Seconds between two looks at a project's counters in Label Studio; where nothing moves each is later by a quarter.
SOON, LATE = 3.0, 8.0
#: ... but looking takes at most this share of Label Studio's time (and of ours), also of one that is down or slow.
SHARE, LATEST = 0.05, 60.0
#: Tasks that were changed last, of which each look reads a row; and where all of these have changed since the last one.
FEW, MANY = 20, 500
#: Seconds to connect for it, and to wait for an answer; nothing is asked twice, there is another look soon.
TIMEOUT = (5.0, 15.0)

#: Key of the jobs that `return_lost` found missing at its last look.
MISSING = "firstrow:missing"


@dataclass(frozen=True)
class Counters:
    """What one request tells of a project.

    Attributes:
        tasks: how many there are.
        annotations: how many there are, of all tasks.
        newest: when a task was last changed, or its annotations; Label Studio's time.
    """

    tasks: int
    annotations: int
    newest: str

    def to_text(self) -> str:
        """One line, to compare."""
        return f"{self.tasks} {self.annotations} {self.newest}"


class Watch:
    """Looks around until told to end.

    Args:
        settings: of the worker.
        sign_in: has the worker known to Redis.
    """

    def __init__(self, settings: Settings, sign_in: Callable[[], None]) -> None:
        self.ctx, self.sign_in = connect(settings, timeout=TIMEOUT, tries=0), sign_in
        self.board, self.done = self.ctx.board, threading.Event()
        duties = (self.look, self.look_at_counters, self._sign_in)
        self.threads = [threading.Thread(target=self._run, args=(duty,), daemon=True) for duty in duties]
        self.fresh, self.rescue_at = True, 0.0

    def start(self) -> None:
        """Have every known project compared with Label Studio once, then look around in threads."""
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """Stop looking."""
        self.done.set()
        for thread in self.threads:
            thread.join(5)

    def _run(self, duty: Callable[[], None]) -> None:
        while not self.done.is_set():
            try:
                duty()
            except RedisError as error:
                log.warning("Redis does not answer: %s", error)
            except Exception as error:  # whatever it is, the next look may do better
                log.warning("looking around failed: %s: %s", type(error).__name__, error)
            self.done.wait(TICK)

    def _sign_in(self) -> None:
        with suppress(RedisError):  # the watch says so
            self.sign_in()

    def look(self) -> None:
        """Look at everything once, but for what Label Studio has to tell."""
        if self.board.forgot() and not self.fresh:
            log.warning("Redis has lost its memory: all projects are compared with Label Studio")
            self.fresh = True
        if self.fresh:
            recover(self.ctx)
            self.fresh = False
        if not self.board.turn("firstrow:watch", 0.9 * TICK):
            return
        projects = self._projects()
        for project in projects:
            self.board.retry_due(project)
            self.board.clean_due(project)
            self.board.fine_tune(project)
        if time.monotonic() > self.rescue_at:
            began = time.monotonic()
            return_lost(self.board)
            for project in projects:
                self.board.rescue(project)
            self.rescue_at = time.monotonic() + max(RESCUE, (time.monotonic() - began) / SHARE)

    def look_at_counters(self) -> None:
        """Look at the counters of all projects once."""
        if self.board.turn("firstrow:count", 0.9 * TICK):
            for project in self._projects():
                if not self.done.is_set():
                    self._count(project)

    def _projects(self) -> list[int]:
        return [project for project in self.board.projects() if not self.board.stopped(project)]

    def _count(self, project: int) -> None:
        """Look at a project's counters, if it is time to and no round of it runs."""
        if self.board.busy(project) or not self.board.time_to_count(project):
            return
        began = time.monotonic()
        try:
            moved = count(self.ctx, project)
            compare_config(self.ctx, project)
        except FirstRowError as error:
            log.info("project %d: its counters cannot be had: %s", project, error)
            if isinstance(error, LabelStudioError) and error.status in (403, 404):
                self.board.reconcile(project)  # it is gone, it seems: the reconcile forgets it
            self.board.count_later(project, LATEST, LATEST)
            return
        least = min(LATEST, (time.monotonic() - began) / SHARE)
        self.board.count_later(project, max(SOON, least), max(LATE, least), moved)


def return_lost(board: Board) -> list[str]:
    """Put back jobs that Redis handed to a machine which was dead by then: they wait, but in no queue.

    Returns:
        The ids of jobs found so twice in a row; at the first look a worker may just be taking one up.
    """
    listed = {job for name in (GPU, DEFAULT) for job in board.queue(name).job_ids} | set(board.in_hand())
    missing = {name: queue for name, queue in queued(board) if name not in listed}
    before: Any = board.redis.smembers(MISSING)
    lost = [job for job in missing if job.encode() in before]
    for job in lost:
        log.warning("%s: was lost with its machine; queued again", job)
        board.queue(missing[job]).push_job_id(job)
    board.redis.delete(MISSING)
    if fresh := missing.keys() - lost:
        board.redis.sadd(MISSING, *fresh)
    return lost


def queued(board: Board) -> Iterator[tuple[str, str]]:
    """Ids and queues of all jobs of all projects that wait for a worker, their reconciles among them."""
    for project in board.projects():
        yield from ((job["id"], job["queue"]) for job in board.jobs(project) if job["status"] == "queued")
        job = board.reconciling(project)
        if job is not None and job.get_status(refresh=False) == "queued":
            yield job.id, job.origin


def recover(ctx: Context) -> None:
    """Queue a comparison with Label Studio of every project that Redis or the store knows of.

    One that is not attached any more is forgotten by that comparison.
    """
    stored = {int(name) for name in ctx.store.folders("projects") if name.isdigit()}
    for project in sorted(stored | set(ctx.board.projects())):
        ctx.board.reconcile(project)


def count(ctx: Context, project: int) -> bool:
    """Compare the counters of a project with those of the last look, and ask for what is missing.

    Returns:
        Whether they had moved.
    """
    rows, counters = newest(ctx, project)
    settled = ctx.board.counters(project)
    if settled == counters.to_text():
        return False
    since = settled.rpartition(" ")[2]
    all_new = bool(settled) and min(_times(rows), default="") > since  # each order of ours changes ten
    if all_new and len(rows) < counters.tasks:
        rows, counters = newest(ctx, project, MANY)
    if ctx.board.busy(project):
        return True  # an event came while we asked; the next look compares
    index = ctx.project(project).index()
    changed = [row for row in rows if row["updated_at"] > since]
    lost = [row["id"] for row in changed if row["id"] not in index or differs(row, index[row["id"]])]
    explained = 0 < len(changed) < len(rows) or (bool(changed) and len(rows) == counters.tasks)
    ctx.board.set_counters(project, counters.to_text())
    if counters.tasks == len({*index, *lost}) and explained:
        if lost:
            log.warning("project %d: %d tasks changed, and no event told us", project, len(lost))
            ctx.board.changed(project, lost)
    else:
        ctx.board.reconcile(project)
    return True


def compare_config(ctx: Context, project: int) -> None:
    """Ask for a round if the label config, or what becomes of skipped tasks, has changed and no event told us.

    And for another look at the counters. Settings that no round can use are asked for once: a failed round has its own
    pauses. Where they are again what they were, the round that failed is tried again.
    """
    saved = ctx.store.read_json(ctx.project(project).key("config.json")) or {}
    answer = ctx.studio.some_settings(project, "label_config", "skip_queue")
    now = (answer["label_config"], answer["skip_queue"])
    changed = now != (saved.get("label_config"), saved.get("extra", {}).get("skips"))
    if ctx.board.busy(project) or not ctx.board.settings_moved(project, hashlib.sha256(repr(now).encode()).hexdigest()):
        return
    if changed or ctx.board.wished(project):
        ctx.board.uncounted(project)
        ctx.board.request_round(project, "settings changed, and no event told us")


def newest(ctx: Context, project: int, most: int = FEW) -> tuple[list[Row], Counters]:
    """The tasks that were changed last, at most so many, and the counters; one request."""
    rows, tasks, annotations = ctx.studio.newest_tasks(project, most)
    return rows, Counters(tasks, annotations, max(_times(rows), default="-"))


def _times(rows: Iterable[Any]) -> Iterable[str]:
    return (str(row.get("updated_at", "")) for row in rows)
