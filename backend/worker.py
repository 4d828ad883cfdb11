"""Runs jobs: a resident rq worker, so that a network is loaded once and not per job.

A job whose worker died is taken up again: at once when supervisor.py restarted the worker, within `SILENCE + TICK`
seconds by any other one. A thread (watch.py) looks around meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from redis import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import AbandonedJobError, StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker_registration import REDIS_WORKER_KEYS, register

from backend.enqueue import DEFAULT, GPU, Board
from backend.errors import FirstRowError
from backend.guard import ALLOWED, GuardedJob, Kinds, guarded
from backend.settings import Settings
from backend.watch import Watch

log = logging.getLogger("backend.worker")  # run as a module, its __name__ is another

#: Seconds: between heartbeats of a running job; without one a job counts as abandoned; between looks around.
BEAT, SILENCE, TICK = 10, 60, 15
QUEUES = (GPU, DEFAULT)
#: When Python looks for garbage that refers to itself. Looking through all that torch is takes a third of a second, and
#: by Python's own thresholds each index of 10,000 tasks that is read makes it look.
GARBAGE = (200_000, 20, 50)


class ResidentWorker(SimpleWorker):
    """An rq worker that runs jobs in its own process and says from a thread that it is alive.

    Args:
        board: where failures are left and the periodic reconcile is decided.
        queues: names, in order of preference.
        name: the same for each life of one worker, so that it finds what it left behind.
        reconcile: seconds between comparisons with Label Studio.
        allowed: the functions that may be called, with the kinds of their arguments.
    """

    #: Seconds between heartbeats.
    beat: float = BEAT

    def __init__(
        self,
        board: Board,
        queues: Sequence[str],
        name: str,
        reconcile: int,
        allowed: Mapping[str, Kinds] = ALLOWED,
    ) -> None:
        jobs = guarded(allowed)
        super().__init__(
            [board.queue(queue, jobs) for queue in queues],
            name=name,
            connection=board.redis,
            job_class=jobs,
            serializer=JSONSerializer,
            worker_ttl=2 * TICK,
            maintenance_interval=TICK,
            job_monitoring_interval=TICK,
            exception_handlers=[self.leave_reason],
        )
        self.board, self.reconcile = board, reconcile
        self.born, self.forced, self.registering = False, False, threading.Lock()
        self.waits = False  # for a job: the one time when the wish to stop may end what it interrupts

    def dequeue_job_and_maintain_ttl(self, *args: Any, **more: Any) -> Any:
        """Take the next job, after projects were given their turns."""
        for queue in self.queues:
            self.board.interleave(queue.name)
        while True:
            try:
                return self._next(*args, **more)
            except (RedisError, StopRequested):
                raise
            except Exception as error:  # whatever there is in Redis, it does not end the worker
                name = getattr(error, "job_id", "")
                log.error("job %s was refused, it cannot be read: %s: %s", name, type(error).__name__, error)
                self.connection.delete(Job.key_for(name))

    def _next(self, *args: Any, **more: Any) -> Any:
        self.waits = True
        try:
            if self._stop_requested:
                raise StopRequested
            return super().dequeue_job_and_maintain_ttl(*args, **more)
        finally:
            self.waits = False

    def _shutdown(self) -> None:
        # rq asks Redis whether a job runs, and if not, raises in whatever the signal interrupted: some of that is
        # its own starting and tidying up, which takes any exception for a passing fault and goes on for ever.
        self._stop_requested = True
        if self.waits:
            raise StopRequested

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run one job, with a line in the log as it starts and ends."""
        name, start = f"{job.description} ({job.id})", time.monotonic()
        log.info("%s: started", name)
        execution = self.prepare_execution(job)
        with self._beating(job, execution):
            good = self.perform_job(job, queue, execution)
            if not good:
                gc.collect()  # what failed is held by its traceback, and may hold a network
            if not self.board.waiting():
                give_back_memory()
        self.set_state("idle")
        log.info("%s: %s after %.1f s", name, "done" if good else "failed", time.monotonic() - start)

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """Have a job that is none of ours fail before anything of it is looked at.

        Raises:
            Refused: it is none of ours.
        """
        if isinstance(job, GuardedJob):
            job.check()
        super().prepare_job_execution(job, remove_from_intermediate_queue)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds after which a silent worker counts as dead; rq's would be the job's timeout."""
        return SILENCE

    def handle_exception(self, job: Job, *exc_info: Any) -> None:
        """Log a failure, with a traceback only where nobody foresaw it, and leave its reason for `status`."""
        error = exc_info[1]
        unforeseen = not isinstance(error, FirstRowError)
        log.error("%s (%s): %s", job.description, job.id, _reason(error), exc_info=exc_info if unforeseen else None)
        self.leave_reason(job, *exc_info)

    def leave_reason(self, job: Job, kind: type[BaseException], error: BaseException, trace: object) -> bool:
        """Leave the reason of a failure where `status` looks; also called for a job whose worker died."""
        project = job.meta.get("project")
        if isinstance(project, int):
            died = isinstance(error, AbandonedJobError) and job.should_retry
            self.board.fail(project, str(job.meta.get("step", "")), _reason(error), passing=died)
        return True

    def run_maintenance_tasks(self) -> None:
        """Every `TICK` seconds between jobs: take up abandoned jobs, and have the periodic reconcile queued.

        Raises:
            StopRequested: the wish to stop came meanwhile.
        """
        waited, self.waits = self.waits, False
        try:
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]  # rq
        except RedisError:
            raise
        except Exception as error:
            log.error("a job in Redis cannot be read: %s: %s", type(error).__name__, error)
        self.board.trim_failures()
        if self.board.due(self.reconcile):
            for project in self.board.projects():
                self.board.reconcile(project)
        self.waits = waited
        if waited and self._stop_requested:
            raise StopRequested

    def request_force_stop(self, signum: int, frame: FrameType | None) -> None:
        """The second signal: rq's own version ignores it within a second of the first. A third one changes nothing."""
        if not self.forced:
            self.forced = True
            raise SystemExit("stopped at once")

    def sign_in(self) -> None:
        """Have Redis know that this worker is there, again if it has forgotten; `status` looks there."""
        with self.registering:
            known = self.connection.sismember(REDIS_WORKER_KEYS, self.key) and self.connection.exists(self.key)
            if known or not self.born:
                return
            with self.connection.pipeline() as pipe:
                pipe.hset(self.key, mapping=self.serialize())
                register(self, pipe)
                pipe.expire(self.key, self.worker_ttl + SILENCE)
                pipe.execute()

    def register_birth(self) -> None:
        """From now on `sign_in` may do it: rq refuses to begin where it finds a worker of that name."""
        self._install_signal_handlers()  # type: ignore[no-untyped-call]  # rq's do it later: a signal would just kill us
        super().register_birth()  # type: ignore[no-untyped-call]  # rq
        self.born = True

    def register_death(self) -> None:
        """From now on `sign_in` must not."""
        self.born = False
        free = self.registering.acquire(timeout=SILENCE)  # not while it signs in
        super().register_death()  # type: ignore[no-untyped-call]  # rq
        if free:
            self.registering.release()

    def take_up(self) -> None:
        """Have the jobs taken up that this worker's last life left behind, without waiting for their silence."""
        for execution in self.get_current_executions(refresh=True):
            for queue in self.queues:
                registry = queue.started_job_registry
                self.connection.zadd(registry.key, {execution.composite_key: 1}, xx=True)
        for queue in self.queues:
            queue.started_job_registry.cleanup(exception_handlers=self._exc_handlers)
        self.connection.delete(self.key, self.executions_key)

    @contextmanager
    def _beating(self, job: Job, execution: Execution) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._beat, args=(job, execution, done), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _beat(self, job: Job, execution: Execution, done: threading.Event) -> None:
        while not done.wait(self.beat):
            try:
                self.maintain_heartbeats(job, execution)
            except RedisError as error:
                log.warning("%s: no heartbeat, Redis does not answer: %s", job.id, error)


def _reason(error: BaseException | None) -> str:
    kind = type(error).__name__
    if isinstance(error, AbandonedJobError):
        return "its worker died (memory, a crash, a restart); the job is tried again, at most twice"
    return str(error) if isinstance(error, FirstRowError) else f"{kind}: {error}"


def work(queues: Sequence[str], name: str, settings: Settings, allowed: Mapping[str, Kinds] = ALLOWED) -> int:
    """Work until told to stop.

    Args:
        queues: names, in order of preference.
        name: of the worker.
        settings: of this process.
        allowed: the functions that jobs may call.

    Returns:
        The exit status: 0 when asked to stop, 1 when Redis or rq gave up.
    """
    gc.set_threshold(*GARBAGE)
    Board.serves = tuple(queues)
    worker = ResidentWorker(Board(settings.redis_url), queues, name, settings.reconcile_seconds, allowed)
    worker.take_up()
    watch = Watch(settings, worker.sign_in)
    watch.start()
    log.info("worker %s: listens on %s", name, ", ".join(queues))
    try:
        worker.work(logging_level="WARNING")
    finally:
        watch.end()
    return 0 if worker._shutdown_requested_date else 1


def alive(board: Board) -> list[dict[str, Any]]:
    """Workers that gave a sign of life lately: name, queues, state."""
    return [
        {"name": worker.name, "queues": worker.queue_names(), "state": worker.get_state()}
        for worker in SimpleWorker.all(connection=board.redis)
    ]


def give_back_memory() -> None:
    """Have glibc return what a job needed and freed; during a job it keeps all of it (supervisor.py)."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def die_with(parent: int) -> None:
    """Have the system kill this process when its parent dies, however that dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise SystemExit("the parent has died")


def main(arguments: Sequence[str] | None = None, allowed: Mapping[str, Kinds] = ALLOWED) -> int:
    """`python -m backend.worker`, the child; people use `firstrow worker`.

    Args:
        arguments: of the command line.
        allowed: the functions that jobs may call; a test's own entry passes its own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m backend.worker")
    parser.add_argument("--queues", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent", type=int, required=True)
    given = parser.parse_args(arguments)
    die_with(given.parent)
    settings = Settings.read()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return work(given.queues.split(","), given.name, settings, allowed)
    except RedisError as error:
        log.error("Redis does not answer: %s; start it or set REDIS_URL", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
