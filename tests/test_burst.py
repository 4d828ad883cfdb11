"""A burst of events, smaller than that of `python -m tests.burst`: each is answered in time, and none is lost."""

from __future__ import annotations

from pathlib import Path

from burst import MASTER, PROJECT, burst, settings

from backend.context import connect
from backend.embedded import start_serve
from backend.secret import project_secret
from backend.settings import Settings

#: Milliseconds after which Label Studio gives an event up; the longest wait seen is a twentieth of it.
GIVEN_UP = 1000


def test_no_event_of_a_burst_is_lost(database_url: str, tmp_path: Path) -> None:
    environment = settings(tmp_path, database_url)
    board = connect(Settings.read(environment)).board
    with start_serve(tmp_path, environment) as url:
        waits = burst(url, project_secret(MASTER, PROJECT), 200, 2)
    assert board.take(PROJECT) == (set(range(1, 201)), set())
    assert len(board.queue("default").job_ids) == 1, "one round for all of them"
    assert waits[-3] < GIVEN_UP
