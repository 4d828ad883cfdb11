"""Faults of one task: told apart from those that concern all, noted with cause and remedy, tried again later."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from redis import RedisError
from rq.timeouts import BaseTimeoutException

from backend.errors import (
    ConfigError,
    FirstRowError,
    JobError,
    LabelStudioError,
    NotAskedError,
    NotAttached,
    RoundOver,
    SettingsError,
    StartAnew,
    StoreError,
)
from backend.labelstudio import LabelStudio
from backend.project import Index, TaskRecord

log = logging.getLogger(__name__)

#: Seconds before a task that failed is tried again, doubled each time up to a day.
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 86400.0
#: What is never the fault of the task at hand.
OF_ALL = (
    BaseTimeoutException,
    ConfigError,
    JobError,
    NotAttached,
    RedisError,
    RoundOver,
    SettingsError,
    StartAnew,
    StoreError,
)


def concerns_all(error: Exception, studio: LabelStudio) -> bool:
    """Whether an error that came up at one task would come up at every other.

    Of an error of Label Studio itself that is found out by asking it for something else.
    """
    if isinstance(error, LabelStudioError):
        return error.status in (401, 403) or not studio.http.answers()
    return isinstance(error, OF_ALL)


def noted(studio: LabelStudio, project: int, record: TaskRecord, error: Exception) -> TaskRecord:
    """The record, taking no part because of `error` until it is tried again.

    Raises:
        Exception: the error itself, where it concerns all tasks.
    """
    if concerns_all(error, studio):
        raise error
    foreseen = isinstance(error, FirstRowError)
    log.warning("project %d, task %d: %s", project, record.id, error, exc_info=None if foreseen else error)
    return with_error(record, error)


def with_error(record: TaskRecord, error: Exception) -> TaskRecord:
    """The record with an error, and the time at which it is tried again."""
    now = time.time()
    if isinstance(error, FirstRowError):
        reason = str(error)
    else:
        reason = (
            f"task {record.id} cannot be used ({type(error).__name__}: {str(error)[:300]}): the worker's log says more"
        )
    if isinstance(error, NotAskedError):  # no try of this picture
        return replace(record, error=reason, next_try=now + FIRST_PAUSE)
    # A task that was well for longer than the longest pause begins anew.
    tries = 1 if now > record.next_try + LONGEST_PAUSE else record.tries + 1
    return replace(record, error=reason, tries=tries, next_try=now + pause(tries))


def pause(tries: int) -> float:
    """Seconds between a task's failure of this number and the next try."""
    return min(FIRST_PAUSE * 2.0 ** min(tries - 1, 30), LONGEST_PAUSE)


def due(record: TaskRecord) -> bool:
    """Whether a task failed and its time has come to be tried again."""
    return bool(record.error) and time.time() >= record.next_try


def due_tasks(index: Index) -> set[int]:
    """Ids of the tasks that are `due`."""
    return {record.id for record in index.values() if due(record)}


def in_turn(index: Index, tasks: Iterable[int]) -> list[int]:
    """Those that failed least first, then by id: pictures for which a host is silent keep no others away."""
    return sorted(tasks, key=lambda task: (index[task].tries if task in index and index[task].error else 0, task))
