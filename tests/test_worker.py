"""A real Redis, a real worker process, and jobs that end, fail, outlive their timeout or are killed half-way."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import RedisError
from rq import Retry
from rq.job import Job

from backend import supervisor, watch, worker
from backend.children import child
from backend.context import connect
from backend.embedded import start_redis, start_worker
from backend.enqueue import Board
from backend.settings import Settings

#: What the jobs of these tests do; each leaves a line `<job> <pid>` in the file it is given when it starts.
JOBS = """
    import ctypes, os, signal, time
    from pathlib import Path

    def note(file):
        with open(file, "a") as out:
            out.write(f"{os.getpid()}\\n")

    def quick(project, file):
        note(file)

    def slow(project, file, seconds, go_on):
        note(file)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not Path(go_on).exists():
            time.sleep(0.01)
            if signal.getsignal(signal.SIGTERM).__name__ == "request_force_stop":
                Path(f"{file}-told").touch()  # the first signal has arrived: the next one forces

    def fails(project, file):
        note(file)
        raise ValueError("no such weights")

    def crashes_once(project, file):
        note(file)
        if len(Path(file).read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
"""

#: A worker that runs the jobs above and no others: the one of production runs none of them.
WORKER = """
    import sys
    from backend import worker

    names = ("quick", "slow", "fails", "crashes_once")
    sys.exit(worker.main(allowed={f"testjobs.{name}": None for name in names}))
"""

#: A worker that is told to stop while it starts and tidies up, where rq takes every exception for a passing fault.
TIDYING = """
    import os, signal, sys
    from backend import worker

    tidy = worker.ResidentWorker.clean_registries

    def told_to_stop(self):
        os.kill(os.getpid(), signal.SIGTERM)
        tidy(self)

    worker.ResidentWorker.clean_registries = told_to_stop
    sys.exit(worker.main())
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A Redis server of this test's own: workers killed by the last one must not take this one's jobs."""
    with start_redis(tmp_path) as url:
        yield url


@pytest.fixture
def board(redis_url: str) -> Iterator[Board]:
    """An empty board."""
    board = Board(redis_url)
    yield board
    board.redis.close()


@pytest.fixture
def start(redis_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts workers that know the jobs above, or `firstrow worker` itself."""
    (tmp_path / "testjobs.py").write_text(textwrap.dedent(JOBS))
    (tmp_path / "testworker.py").write_text(textwrap.dedent(WORKER))
    numbers = itertools.count()
    with ExitStack() as stack:

        def begin(queues: str = "gpu,default", entry: str = "testworker") -> subprocess.Popen[bytes]:
            folder = tmp_path / f"worker{next(numbers)}"
            folder.mkdir()
            settings = {
                "REDIS_URL": redis_url,
                "LABEL_STUDIO_URL": "http://127.0.0.1:9",
                "LABEL_STUDIO_API_KEY": "0" * 40,
                "FIRSTROW_STORE": str(tmp_path / "store"),
                "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
            }
            program = f"from backend import supervisor; supervisor.run({queues.split(',')}, {entry!r})"
            logs = "import logging; logging.basicConfig(level=logging.INFO); "
            command = [sys.executable, "-c", logs + program]
            if entry == "backend.worker":
                return stack.enter_context(start_worker(folder, settings, queues))
            name = f"worker-{queues.replace(',', '-')}"
            return stack.enter_context(child(name, command, folder, settings)).process

        yield begin


def log_of(tmp_path: Path) -> str:
    """What the first worker of a test has logged."""
    return (tmp_path / "worker0" / "worker-gpu-default.log").read_text()


def until(met: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := met():
                return value
        except RedisError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"not met within {seconds} s")


def put(board: Board, step: str, *args: object, timeout: int = 300, retries: int = 2, queue: str = "gpu") -> Job:
    """Queue one of the jobs above."""
    return board.queue(queue).enqueue(
        f"testjobs.{step}",
        args=(7, *map(str, args[:1]), *args[1:]),
        job_timeout=timeout,
        retry=Retry(max=retries) if retries else None,
        meta={"project": 7, "step": step},
        description=f"{step} project 7",
    )


def pids(file: Path) -> list[int]:
    """Processes in which a job has started, in order."""
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_jobs_share_one_process_and_leave_log_lines(board: Board, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    jobs = [put(board, "quick", file, queue=queue) for queue in ("default", "gpu")]
    start()
    until(lambda: all(job.get_status() == "finished" for job in jobs))
    assert len(set(pids(file))) == 1
    for job in jobs:
        until(lambda job=job: f"quick project 7 ({job.id}): done after" in log_of(tmp_path))
        assert f"quick project 7 ({job.id}): started" in log_of(tmp_path)
    log = log_of(tmp_path)
    # the gpu queue comes first, though its job was queued last
    assert log.index(jobs[1].id) < log.index(jobs[0].id)


def test_failure_leaves_its_reason_for_status(board: Board, start: Start, tmp_path: Path) -> None:
    job = put(board, "fails", tmp_path / "pids", retries=0)
    start()
    until(lambda: job.get_status() == "failed")
    error = until(lambda: board.error(7))
    assert (error["step"], error["message"]) == ("fails", "ValueError: no such weights")


def test_job_timeout_ends_a_job_but_not_the_worker(board: Board, start: Start, tmp_path: Path) -> None:
    job = put(board, "slow", tmp_path / "slow", 60, "-", timeout=1, retries=0)
    after = put(board, "quick", tmp_path / "quick")
    start()
    until(lambda: after.get_status() == "finished")
    assert job.get_status() == "failed"
    assert "JobTimeoutException" in (board.error(7) or {})["message"]
    assert pids(tmp_path / "slow") == pids(tmp_path / "quick")


def test_crash_restarts_the_worker_and_its_job_at_once(board: Board, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    job = put(board, "crashes_once", file)
    parent = start()
    until(lambda: job.get_status() == "finished")
    assert len(set(pids(file))) == 2
    assert parent.poll() is None
    assert "worker was killed by SIGSEGV" in log_of(tmp_path)
    assert "its worker died" in (board.error(7) or {})["message"]


def test_killed_machine_is_found_silent_and_its_job_is_tried_again(board: Board, start: Start, tmp_path: Path) -> None:
    file, go_on = tmp_path / "pids", tmp_path / "go_on"
    job = put(board, "slow", file, 600, str(go_on), timeout=3600)
    first = start()
    child = until(lambda: pids(file))[0]
    key = job.started_job_registry.key
    entry, silent = running(board, job)
    assert silent - time.time() <= worker.SILENCE  # not the job's hour
    first.kill()
    until(lambda: not alive(child))  # the child dies with its parent, also by SIGKILL
    board.redis.zadd(key, {entry: time.time() - 1})  # as if SILENCE had passed
    go_on.touch()
    start()
    until(lambda: job.get_status() == "finished")
    assert len(pids(file)) == 2


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts back the signal handlers that a worker in this process replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_heartbeat_goes_on_during_a_long_job(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[float] = []

    class Counted(worker.ResidentWorker):
        beat = 0.05

        def maintain_heartbeats(self, job: Job, execution: Any) -> None:
            super().maintain_heartbeats(job, execution)
            if len(beats) == 3:
                return  # the job may end at any moment now
            entry, silent = running(board, job)
            beats.append(silent - time.time())
            board.redis.zadd(job.started_job_registry.key, {entry: time.time() + 1})  # the next beat must move it
            if len(beats) == 3:
                (tmp_path / "go_on").touch()

    (tmp_path / "testjobs.py").write_text(textwrap.dedent(JOBS))
    monkeypatch.syspath_prepend(tmp_path)
    job = put(board, "slow", tmp_path / "pids", 60, str(tmp_path / "go_on"))
    Counted(board, ["gpu"], "counted", 300, {"testjobs.slow": None}).work(burst=True, logging_level="WARNING")
    assert job.get_status() == "finished"
    assert len(beats) == 3
    assert all(worker.SILENCE - 2 < ahead <= worker.SILENCE for ahead in beats)


def test_first_signal_lets_the_job_end(board: Board, start: Start, tmp_path: Path) -> None:
    file, go_on = tmp_path / "pids", tmp_path / "go_on"
    job, waiting = put(board, "slow", file, 600, str(go_on)), put(board, "quick", tmp_path / "quick")
    parent = start()
    child = until(lambda: pids(file))[0]
    parent.terminate()
    until((tmp_path / "pids-told").exists)
    assert parent.poll() is None
    go_on.touch()
    assert parent.wait(30) == 0
    assert job.get_status() == "finished"
    assert waiting.get_status() == "queued"
    assert not alive(child)


def test_second_signal_puts_the_job_back_at_once(board: Board, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    job = put(board, "slow", file, 600, "-")
    parent = start()
    child = until(lambda: pids(file))[0]
    parent.send_signal(signal.SIGINT)
    until(lambda: "stops after its job" in log_of(tmp_path))
    parent.send_signal(signal.SIGINT)
    assert parent.wait(supervisor.MERCY + 10) == 0
    assert job.get_status() == "queued"
    assert not alive(child)


#: What somebody who can write to Redis may put there: function, arguments, further fields of the job.
PLANTED: list[tuple[str, list[Any], dict[str, str]]] = [
    ("os.system", ["touch {evil}"], {}),
    ("subprocess.getoutput", ["touch {evil}"], {}),
    ("testjobs.quick", [7, "{evil}"], {}),
    ("backend.jobs.run", [7], {}),
    ("backend.jobs.publish.__globals__", [7, 1], {}),
    ("backend.jobs.publish", ["7", 1], {}),
    ("backend.jobs.reconcile", [7, 8], {}),
    ("backend.jobs.reconcile", [-7], {}),
    ("backend.jobs.reconcile", [True], {}),
    ("backend.jobs.reconcile", [7], {"success_callback_name": "testjobs.evil"}),
    ("backend.jobs.nothing", [7], {"failure_callback_name": "testjobs.evil"}),
    ("backend.jobs.nothing", [7], {"stopped_callback_name": "testjobs.evil"}),
    ("backend.jobs.nothing", [7], {"webhooks": '[{"url": "http://127.0.0.1:9/", "job_status": "failed"}]'}),
    ("backend.jobs.reconcile", [7], {"timeout": "forever"}),
    ("backend.jobs.nothing", [7], {"data": "not json"}),
    ("backend.jobs.nothing", [7], {"retries_left": "1000000"}),
    ("backend.jobs.reconcile", [7], {"data": '["backend.jobs.reconcile", {"an": "instance"}, [7], {}]'}),
    ("backend.jobs.reconcile", [7], {"data": '["backend.jobs.reconcile", null, [7], {"more": 1}]'}),
]


def plant(board: Board, number: int, evil: Path) -> str:
    """Put one of `PLANTED` into the queue, byte by byte; the job's id."""
    function, args, more = PLANTED[number]
    args = [arg.format(evil=evil) if isinstance(arg, str) else arg for arg in args]
    name = f"planted-7-{number}"
    fields = {
        "data": json.dumps([function, None, args, {}]),
        "origin": "gpu",
        "status": "queued",
        "created_at": "2026-01-01T00:00:00.000000Z",
        "description": "planted",
        **more,
    }
    board.redis.hset(f"rq:job:{name}", mapping=fields)
    board.redis.rpush("rq:queue:gpu", name)
    return name


def test_a_job_that_is_none_of_ours_is_refused_and_the_worker_goes_on(
    board: Board, start: Start, tmp_path: Path
) -> None:
    evil = tmp_path / "evil"
    planted = [plant(board, number, evil) for number in range(len(PLANTED))]
    after = board.queue("gpu").enqueue("backend.jobs.reconcile", "seven", job_id="planted-7-last")
    parent = start(entry="backend.worker")
    until(lambda: after.get_status() == "failed")
    log = log_of(tmp_path)
    for name, row in zip(planted, PLANTED, strict=True):
        assert f"job {name} was refused" in log, row
        job = board.job(name)
        assert job is None or job.get_status() == "failed", row
    assert not evil.exists()
    assert "another starts in" not in log, "the worker lives on"
    assert parent.poll() is None
    assert "Traceback" not in log


def test_several_workers_queue_one_reconcile(board: Board, start: Start) -> None:
    board.register(7)
    for _ in range(2):
        start("gpu")  # nobody runs what is in the other queue
    until(lambda: [w["state"] for w in worker.alive(board)] == ["idle", "idle"])
    assert [job.func_name for job in board.queue("default").jobs] == ["backend.jobs.reconcile"]


def test_job_handed_to_a_dead_machine_is_put_back(board: Board) -> None:
    board.register(7)
    lost, waiting = board.enqueue("start_round", 7, "a"), board.enqueue("start_round", 7, "b")
    assert board.redis.lpop(board.queue("default").key) == lost.id.encode()  # as a worker does that dies right then
    assert watch.return_lost(board) == []
    assert watch.return_lost(board) == [lost.id]
    assert board.queue("default").job_ids == [waiting.id, lost.id]
    assert watch.return_lost(board) == []


def test_reconcile_handed_to_a_dead_machine_is_put_back(board: Board) -> None:
    board.reconcile(7)
    lost = board.redis.lpop(board.queue("default").key)
    board.reconcile(7)
    assert board.queue("default").job_ids == []
    assert watch.return_lost(board) == []
    assert watch.return_lost(board) == [bytes(lost).decode()]  # type: ignore[arg-type]
    board.reconcile(7)
    assert board.queue("default").job_ids == [bytes(lost).decode()]  # type: ignore[arg-type]


def test_a_silent_label_studio_holds_nothing_up_but_the_counting(board: Board, redis_url: str, tmp_path: Path) -> None:
    board.register(7)
    times: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = {"LABEL_STUDIO_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "LABEL_STUDIO_API_KEY": "0" * 40}
        ours = {"REDIS_URL": redis_url, "FIRSTROW_STORE": str(tmp_path / "store")}
        settings = Settings.read({**given, **ours})
        connect(settings).store.write_json("projects/7/config.json", {})
        watching = watch.Watch(settings, lambda: times.append(time.monotonic()))
        watching.start()
        asked, _ = silent.accept()
        with asked:
            silent.settimeout(0)
            before = len(times)
            board.redis.set("firstrow:7:retry", time.time() - 1)
            until(lambda: board.busy(7), 10)
            board.redis.flushdb()
            until(lambda: board.reconciling(7), 10)
            until(lambda: len(times) >= before + 3)
            with pytest.raises(BlockingIOError):  # nobody asks while an answer is awaited
                silent.accept()
        until(lambda: board.redis.exists("firstrow:7:pause"))
        with pytest.raises(BlockingIOError):  # ... nor again, when there is none
            silent.accept()
    watching.end()


def test_no_worker_signs_in_after_its_good_bye(board: Board) -> None:
    leaving, done = worker.ResidentWorker(board, ["gpu"], "leaving", 900), threading.Event()

    def sign_in() -> None:
        while not done.is_set():
            leaving.sign_in()

    threads = [threading.Thread(target=sign_in) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            leaving.register_birth()
            assert worker.alive(board)
            leaving.register_death()
            time.sleep(0.01)
            assert worker.alive(board) == []
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_worker_that_is_told_to_stop_while_it_tidies_up_stops(board: Board, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "tidying.py").write_text(textwrap.dedent(TIDYING))
    given = {"REDIS_URL": redis_url, "LABEL_STUDIO_URL": "http://127.0.0.1:9", "LABEL_STUDIO_API_KEY": "0" * 40}
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    environment = {**os.environ, **given, "FIRSTROW_STORE": str(tmp_path / "store"), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tidying", "--queues", "gpu", "--name", "tidying", "--parent", str(os.getpid())]
    with child("tidying", command, tmp_path, environment) as running:
        assert running.process.wait(60) == 0
    assert worker.alive(board) == []


def test_settings_of_the_allocator_reach_the_worker_and_the_operator_wins() -> None:
    ours = supervisor.child_environment({"OMP_NUM_THREADS": "3", "HOME": "/home/x"})
    assert ours["OMP_NUM_THREADS"] == "3"
    assert (ours["OMP_WAIT_POLICY"], ours["HOME"]) == ("passive", "/home/x")
    code = "import json, os; print(json.dumps(os.environ['MALLOC_MMAP_THRESHOLD_']))"
    said = subprocess.run([sys.executable, "-c", code], env=ours, capture_output=True, check=True).stdout
    assert int(json.loads(said)) > 1 << 24


@pytest.mark.parametrize(
    ("text", "most"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("?", None)]
)
def test_processors_keep_to_the_container_quota(tmp_path: Path, text: str, most: int | None) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    usable = len(os.sched_getaffinity(0))
    assert supervisor.processors(quota) == min(usable, most or usable)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def running(board: Board, job: Job) -> tuple[str, float]:
    """The entry of a running job, and the time at which its worker counts as dead unless it is heard."""
    rows: Any = board.redis.zrange(job.started_job_registry.key, 0, -1, withscores=True)
    return rows[0][0].decode(), rows[0][1]
