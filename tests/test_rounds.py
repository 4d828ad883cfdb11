"""Rounds on a real Redis: whose turn it is, numbers, stopping, trying again. No worker runs: jobs are looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from backend import enqueue
from backend.enqueue import PAUSES, STOPPED, Board
from backend.errors import RoundOver
from backend.server import look_around
from backend.watch import LATE, SOON


@pytest.fixture
def board(database_url: str) -> Iterator[Board]:
    """An empty board."""
    board = Board(database_url)
    yield board
    board.redis.close()


def begun(board: Board, project: int = 7, least: int = 0) -> tuple[str, int]:
    """A round that has its number: the id of its first job, and the number."""
    token = board.request_round(project, "test")
    assert token is not None
    board.begin(project)
    return token, board.number(project, token, least)


def test_numbers_are_never_given_twice(board: Board) -> None:
    token, first = begun(board, least=4)
    assert first == 5
    assert board.release(7, token)
    _, second = begun(board)
    assert second == 6, "the round that died used up its number"
    assert board.number(7, str(board.busy(7)), 0) == 7, "also when the job that took it runs again"


def test_numbers_of_any_length_that_others_chose(board: Board) -> None:
    _, number = begun(board, least=10**9)
    assert number == 10**9 + 1
    assert board.enqueue("publish", 7, number).id == f"publish-7-{number}"
    assert board.finish(7, number)
    board.redis.set("firstrow:7:count", "1e+18")  # as an earlier release left it
    assert begun(board, least=4)[1] == 5


def test_a_round_that_was_overtaken_neither_frees_nor_queues(board: Board) -> None:
    token, late = begun(board)
    board.redis.flushdb()
    _, owner = begun(board, least=late)
    assert owner > late
    assert not board.finish(7, late)
    assert not board.release(7, token)
    board.abandon(7, "publish", late, heals=True)
    assert board.busy(7) is not None
    for step in ("plan_round", "publish"):
        with pytest.raises(RoundOver):
            board.enqueue(step, 7, late)
    with pytest.raises(RoundOver):
        board.number(7, token, late)
    assert board.finish(7, owner)
    assert board.busy(7) is None


def test_a_step_that_is_queued_again_is_there_once(board: Board) -> None:
    _, number = begun(board)
    ids = [board.enqueue("score", 7, number, shard).id for shard in (0, 1, 1, 0)]
    assert len(set(ids)) == 2
    assert sorted(board.queue("gpu").job_ids) == sorted(set(ids))


def test_a_stopped_project_starts_nothing_and_its_jobs_are_gone(board: Board) -> None:
    _, number = begun(board)
    shards = [board.enqueue("score", 7, number, shard) for shard in range(2)]
    board.enqueue("publish", 7, number, after=shards)
    board.enqueue("clean", 7)
    board.reconcile(7)
    other, _ = begun(board, project=71)
    assert board.stop(7, seconds=5)
    assert [job for name in ("gpu", "default") for job in board.queue(name).job_ids] == [other]
    assert board.queue("default").deferred_job_registry.get_job_ids() == []
    assert board.changed(7, [1]) is None
    board.reconcile(7)
    assert board.queue("default").job_ids == [other]
    with pytest.raises(RoundOver, match="stopped"):
        board.go_on(7)
    board.go_on(71)
    assert board.redis.ttl("firstrow:7:stopped") == -1, "however long a detach takes"
    board.forget(7)
    assert board.stopped(7), "a late event after detach starts nothing"
    assert 0 < board.redis.ttl("firstrow:7:stopped") <= STOPPED
    board.register(7)
    assert board.request_round(7, "attached again") is not None


def test_stop_waits_for_what_runs(board: Board) -> None:
    job = board.enqueue("clean", 7)
    registry = board.queue("default").started_job_registry
    board.queue("default").remove(job)
    board.redis.zadd(registry.key, {f"{job.id}:1": time.time() + 60})
    assert board.running(7) == [job.id]
    assert not board.stop(7, seconds=0.2)
    threading.Timer(0.3, board.redis.delete, [registry.key]).start()
    assert board.stop(7, seconds=20)
    board.redis.zadd(registry.key, {f"{job.id}:1": time.time() - 1})
    assert board.in_hand() == [job.id]
    assert board.stop(7, seconds=0.2), "its worker is dead"


def test_a_failed_round_is_tried_again_after_ever_longer_pauses(board: Board) -> None:
    for tries, pause in enumerate(PAUSES, 1):
        _, number = begun(board)
        board.abandon(7, "publish", number, heals=True)
        assert board.busy(7) is None
        assert board.wished(7)
        assert not board.retry_due(7)
        when = float(board.redis.get("firstrow:7:retry") or 0)
        assert when - time.time() == pytest.approx(pause, abs=2)
        board.redis.set("firstrow:7:retry", time.time() - 1)
        assert board.retry_due(7), tries
        assert not board.retry_due(7), "by one worker alone"
        assert board.release(7, str(board.busy(7)))
    _, number = begun(board)
    assert board.finish(7, number)
    _, number = begun(board)
    board.abandon(7, "publish", number, heals=True)
    assert float(board.redis.get("firstrow:7:retry") or 0) - time.time() == pytest.approx(PAUSES[0], abs=2)


def test_a_fault_that_needs_a_person_is_not_tried_again(board: Board) -> None:
    _, number = begun(board)
    board.abandon(7, "plan_round", number, heals=False)
    assert board.busy(7) is None
    assert board.wished(7), "the next reconcile looks again"
    assert board.redis.get("firstrow:7:retry") is None


def test_a_round_without_jobs_is_found_at_the_second_look(board: Board) -> None:
    token, _ = begun(board)
    job = board.job(token)
    assert job is not None
    job.delete()
    assert not board.rescue(7)
    assert board.rescue(7)
    assert board.busy(7) not in (None, token)


def test_a_reconcile_is_queued_once_and_again_when_its_job_is_gone(board: Board) -> None:
    board.reconcile(7)
    board.reconcile(7)
    (name,) = board.queue("default").job_ids
    job = board.job(name)
    assert job is not None
    job.delete()
    board.reconcile(7)
    assert len(board.queue("default").job_ids) == 1


def test_failed_jobs_are_kept_up_to_a_number(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enqueue, "MOST_FAILURES", 3)
    registry = board.queue("default").failed_job_registry
    for number in range(5):
        job = board.enqueue("clean", 7)
        registry.add(job, ttl=100 + number)
    board.trim_failures()
    kept = [job.decode() for job in board.redis.zrange(registry.key, 0, -1)]
    assert len(kept) == 3
    assert kept[-1] == job.id
    assert all(board.job(name) for name in kept)
    assert len(list(board.redis.scan_iter(match="rq:job:*"))) == 3


def test_an_error_that_has_passed_is_gone_when_its_round_ends_well(board: Board) -> None:
    for passing in (True, False):
        _, number = begun(board)
        board.fail(7, "train", "its worker died", passing=passing)
        assert board.finish(7, number)
        assert (board.error(7) is None) is passing


def test_a_round_is_tried_again_once_whatever_of_it_failed(board: Board) -> None:
    begun(board)
    for _ in range(3):
        board.retry_later(7)
    assert board.redis.get("firstrow:7:tries") == b"1"


def test_looks_at_counters_come_later_each_time_while_nothing_moves(board: Board) -> None:
    pauses = [3, 3.75, 4.6875, 5.859375, 7.32421875, 8, 8]

    def seconds() -> float:
        """How long nobody looks now; it begins to run as it is written."""
        assert not board.time_to_count(7), "it is not time yet"
        pause = float(board.redis.get("firstrow:7:pause") or 0)
        assert 0 <= pause - board.redis.pttl("firstrow:7:counting") / 1000 < 2
        return pause

    for _ in range(2):
        for number, pause in enumerate(pauses):
            board.count_later(7, SOON, LATE, moved=number == 0)
            assert seconds() == pause
    board.count_later(7, 12, 12, moved=False)  # Label Studio was slow
    assert seconds() == 12
    board.count_later(7, SOON, LATE, moved=False)
    assert seconds() == LATE
    board.redis.delete("firstrow:7:counting")
    assert board.time_to_count(7)
    assert not board.time_to_count(7), "one looks at a time"


def test_a_start_of_serve_has_every_project_compared(board: Board, database_url: str) -> None:
    board.register(7)
    look_around(Board(database_url))
    assert [job.func_name for job in board.queue("default").jobs] == ["backend.jobs.reconcile"]
    look_around(Board("redis://127.0.0.1:1"))  # without Redis it starts all the same
