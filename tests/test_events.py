"""Every payload that Label Studio 1.23 sends, as recorded from it, cut to what matters; and broken ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from backend.coarse_answers import digest
from backend.enqueue import Board
from backend.events import Event, EventError, handle, parse, project_id

PROJECT = {
    "id": 22,
    "title": "field",
    "label_config": "<View/>",
    "skip_queue": "REQUEUE_FOR_OTHERS",
    "sampling": "Uncertainty sampling",
}
ANNOTATION = {"id": 169, "task": 31, "project": 22, "completed_by": 1, "was_cancelled": False, "result": []}
TASK = {"id": 31, "data": {"image": "/data/upload/22/a.jpg"}, "project": 22}
UPDATED = Event("ANNOTATION_UPDATED", 22, (31,), annotation=ANNOTATION)


@pytest.fixture
def board(redis_url: str) -> Iterator[Board]:
    """An empty board."""
    board = Board(redis_url)
    board.redis.flushdb()
    yield board
    board.redis.close()


def payload(action: str, **more: Any) -> dict[str, Any]:
    """A webhook body."""
    return {"action": action, "project": PROJECT, **more}


@pytest.mark.parametrize(
    ("body", "event"),
    [
        (payload("ANNOTATION_CREATED", annotation=ANNOTATION, task=TASK), Event("ANNOTATION_CREATED", 22, (31,))),
        (payload("ANNOTATION_UPDATED", annotation=ANNOTATION, task=TASK), UPDATED),
        (payload("ANNOTATION_UPDATED", annotation=ANNOTATION), UPDATED),
        (
            payload("ANNOTATION_CREATED", annotation={**ANNOTATION, "was_cancelled": True}, task=TASK),
            Event("ANNOTATION_CREATED", 22, (31,)),
        ),
        (
            payload("ANNOTATIONS_CREATED", annotation=[ANNOTATION, {**ANNOTATION, "task": 30}]),
            Event("ANNOTATIONS_CREATED", 22, (30, 31)),
        ),
        (
            payload("ANNOTATIONS_CREATED", annotation=[ANNOTATION, ANNOTATION], task=[TASK, TASK]),
            Event("ANNOTATIONS_CREATED", 22, (31,)),
        ),
        (
            payload("ANNOTATIONS_DELETED", annotations=[{"id": 170}, {"id": 169}]),
            Event("ANNOTATIONS_DELETED", 22, deleted=(169, 170)),
        ),
        (payload("TASKS_CREATED", tasks=[TASK, {**TASK, "id": 32}]), Event("TASKS_CREATED", 22, (31, 32))),
        (payload("TASKS_DELETED", tasks=[{"id": 31}]), Event("TASKS_DELETED", 22, (31,))),
        (payload("PROJECT_UPDATED"), Event("PROJECT_UPDATED", 22, meaning="REQUEUE_FOR_OTHERS <View/>")),
        (payload("START_TRAINING"), Event("START_TRAINING", 22)),
        ({"action": "LABEL_LINK_CREATED", "label_link": [{"id": 1}]}, None),
        ({"action": "PROJECT_CREATED", "project": PROJECT}, None),
    ],
)
def test_payloads(body: dict[str, Any], event: Event | None) -> None:
    assert parse(body) == event


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ([], "action"),
        (None, "action"),
        ({"project": PROJECT}, "action"),
        ({"action": 7}, "action"),
        ({"action": "TASKS_CREATED", "tasks": [TASK]}, "no project"),
        ({"action": "TASKS_CREATED", "project": {"title": "x"}, "tasks": [TASK]}, "names no project"),
        ({"action": "TASKS_CREATED", "project": True, "tasks": [TASK]}, "names no project"),
        (payload("TASKS_CREATED"), "id is missing"),
        (payload("TASKS_CREATED", tasks=[{"data": {}}]), "id is missing"),
        (payload("TASKS_CREATED", tasks=[{"id": [1]}]), "id is missing"),
        (payload("TASKS_CREATED", tasks=[{"id": "31"}, {"id": 2}]), "id is missing"),
        (payload("ANNOTATION_CREATED"), "id is missing"),
        (payload("ANNOTATION_CREATED", annotation={"id": 169}), "id is missing"),
        (payload("ANNOTATIONS_DELETED", annotation={"id": 169}), "id is missing"),
        ({"action": "PROJECT_UPDATED", "project": {"id": 22}}, "no label config"),
        ({"action": "PROJECT_UPDATED", "project": 22}, "no label config"),
    ],
)
def test_broken_payloads_are_named(body: object, word: str) -> None:
    with pytest.raises(EventError, match=word):
        parse(body)


@pytest.mark.parametrize("given", [22, "22", "22.1795345419", {"id": 22}])
def test_project_ids(given: object) -> None:
    assert project_id(given) == 22


@pytest.mark.parametrize("given", [None, "", "x.1", "-1", "\u0661", 1.5e300, True, {}, []])
def test_what_is_no_project(given: object) -> None:
    with pytest.raises(EventError, match="names no project"):
        project_id(given)


def test_a_change_is_remembered_and_asks_for_a_round(board: Board) -> None:
    first = handle(Event("ANNOTATION_CREATED", 22, (31,)), board)
    assert handle(Event("ANNOTATION_UPDATED", 22, (31, 32)), board) == first  # the running round, another follows
    assert board.take(22) == ({31, 32}, set())
    assert [job.id for job in board.queue("default").jobs] == [first]


def test_our_own_updates_are_not_events_and_a_persons_is_kept(board: Board) -> None:
    board.expect_own_update(22, 169, digest(ANNOTATION), "2026-11-25T20:00:00Z")
    assert handle(UPDATED, board) is None
    assert board.take(22) == (set(), set())

    def saved(result: object, at: str) -> Event:
        row = {**ANNOTATION, "result": result, "updated_at": f"2026-11-25T20:00:0{at}Z"}
        return Event("ANNOTATION_UPDATED", 22, (31,), annotation=row)

    def kept() -> object:
        return (board.missed_update(22, 169) or {}).get("result")

    assert handle(saved([{"id": "drawn"}], "1.5"), board)
    assert board.take(22) == ({31}, set())
    assert kept() == [{"id": "drawn"}]
    assert handle(saved(b"[]", "1.7"), board) is None, "as the web process has it"
    assert handle(Event("ANNOTATION_UPDATED", 22, (31,), annotation={"id": 169, "task": 31}), board)
    assert handle(saved([{"id": "old"}], "1.4"), board)
    assert kept() == [{"id": "drawn"}], "the last one is kept"
    board.own_update_is_done(22, 169, "2026-11-25T20:00:01.7Z")
    assert handle(saved([], "1.7"), board) is None
    assert handle(saved([], "1.8"), board), "somebody saved the same again"
    board.forget_missed_update(22, 169)
    assert kept() is None
    other = Event("ANNOTATION_UPDATED", 23, (31,), annotation={**ANNOTATION, "result": [{"id": "forged"}]})
    assert handle(other, board)
    assert board.missed_update(23, 169) is None, "nothing of another project's annotations is believed"
    assert kept() is None


def test_an_empty_list_changes_nothing(board: Board) -> None:
    assert handle(parse(payload("TASKS_CREATED", tasks=[])) or Event("", 0), board) is None
    assert board.busy(22) is None


def test_a_project_update_counts_once_per_label_config(board: Board) -> None:
    updated = Event("PROJECT_UPDATED", 22, meaning="REQUEUE_FOR_OTHERS <View/>")
    assert handle(updated, board)
    board.begin(22)
    assert handle(updated, board) is None  # its title, its sampling, our own PATCH of the model version
    assert not board.wished(22)
    assert handle(Event("PROJECT_UPDATED", 22, meaning="REQUEUE_FOR_OTHERS <View><Image/></View>"), board)
    assert board.wished(22)


def test_start_training_asks_for_a_training(board: Board) -> None:
    job = handle(Event("START_TRAINING", 22), board)
    assert job == board.busy(22)
    assert board.begin(22)


def test_many_events_ask_for_one_round(board: Board) -> None:
    for task in range(200):
        handle(Event("ANNOTATION_CREATED", 22, (task,)), board)
    assert len(board.jobs(22)) == 1
    assert len(board.take(22)[0]) == 200
