"""The class under both contracts: label-studio-ml 1.0.9's own manager, and the calls that 2.x's server makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_studio_ml.model import LabelStudioMLManager

from backend.context import Context, connect
from backend.plugin import CHUNK, NO_VERSION, Answer, FirstRow
from backend.project import TaskRecord
from backend.settings import Settings

EVENT = {"project": {"id": 22, "label_config": "<View/>"}, "annotation": {"id": 5, "task": 31}, "task": {"id": 31}}


@pytest.fixture
def where(redis_url: str, tmp_path: Path) -> Iterator[Context]:
    """Doors to an empty Redis and an empty store."""
    settings = {"LABEL_STUDIO_API_KEY": "0" * 40, "REDIS_URL": redis_url, "FIRSTROW_STORE": str(tmp_path)}
    found = connect(Settings.read(settings))
    found.board.redis.flushdb()
    yield found
    found.board.redis.close()


def test_the_forms_of_1_0_9(where: Context) -> None:
    LabelStudioMLManager.initialize(FirstRow, where=where)
    model = LabelStudioMLManager.model_class(
        label_config="<View/>", train_output={"job_id": "7"}, hostname="http://x", access_token="a", where=where
    )
    assert model.predict([{"id": 31, "project": 22}], login=None, password=None, context=None) == [[]]
    done = model.process_event("ANNOTATION_CREATED", EVENT, "123", {"workdir": "work"})
    assert done == {"job": where.board.busy(22)}
    assert where.board.take(22) == ({31}, set())
    # upstream waits for ANNOTATION_DELETED, which Label Studio never sends; we for what it does send
    assert model.process_event("ANNOTATIONS_DELETED", {"project": {"id": 22}, "annotations": [{"id": 9}]}, "1", {})
    assert where.board.take(22)[1] == {9}


def test_the_forms_of_2(where: Context) -> None:
    model = FirstRow("22", label_config="<View/>", where=where)
    model.setup()
    assert model.get("model_version") == model.model_version == NO_VERSION
    where.board.set_state(22, {"version": "seg-2"})
    assert model.get("model_version") == "seg-2"
    assert FirstRow(project_id="22.1795", label_config="<View/>", where=where).model_version == "seg-2"
    assert model.predict([{"id": 31}], context={"result": []}, login=None) == [[]]
    assert model.fit("START_TRAINING", {"project": {"id": 22}}) == {"job": where.board.busy(22)}
    assert model.fit("LABEL_LINK_CREATED", {}) == {"job": None}


def test_it_keeps_no_state(where: Context) -> None:
    model = FirstRow("22", where=where)
    before = dict(vars(model)), {k: v for k, v in vars(FirstRow).items() if not k.startswith("_abc")}
    model.predict([{"id": 31}])
    model.fit("ANNOTATION_CREATED", EVENT)
    assert (dict(vars(model)), {k: v for k, v in vars(FirstRow).items() if not k.startswith("_abc")}) == before


@pytest.mark.parametrize("number", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_one_list_per_task(where: Context, number: int) -> None:
    assert FirstRow(22, where=where).predict([{"id": i} for i in range(number)]) == [[]] * number


def test_a_task_of_no_project_gets_nothing(where: Context) -> None:
    assert FirstRow(where=where).predict([{"id": 1}, None, {"id": 2, "project": "x"}]) == [[], [], []]


@pytest.fixture
def filled(where: Context) -> Context:
    """A project whose order is in force, with three chunks of tasks that have a cluster map each."""
    here = where.project(22)
    here.save_config(CONFIG, {})
    here.save_index({t: TaskRecord(t, image="a.jpg", size=(32, 24)) for t in range(1, 3 * CHUNK + 1)})
    halves = np.repeat(np.array([[0, 1]], np.uint8), 12, axis=1).repeat(24, axis=0)
    for task in range(1, 3 * CHUNK + 1):
        here.store.write_map(here.cluster_key("c1", task), halves)
    coarse = {str(task): [["Background", 0.9], ["Foreground", 0.7]] for task in range(1, 3 * CHUNK + 1)}
    where.board.set_state(22, {"version": "seg-4", "clusters": "c1", "coarse": coarse})
    return where


CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="coarse" toName="image"><Label value="Background"/><Label value="Foreground"/><Label value="Mixed"/>
</BrushLabels><BrushLabels name="seg" toName="image"><Label value="Soil"/><Label value="Crop"/></BrushLabels></View>"""
TASKS = [{"id": task} for task in range(1, 3 * CHUNK + 1)]


def test_a_whole_project_in_one_request_ends_in_time(filled: Context) -> None:
    class OneChunk(FirstRow):
        seconds = 0.0  # the time is up at once

    answers = OneChunk(22, where=filled).predict(TASKS)
    assert [len(answer) for answer in answers] == [0] * 3 * CHUNK
    assert [len(answer) for answer in FirstRow(22, where=filled).predict(TASKS)] == [1] * 3 * CHUNK


def test_an_answer_stays_below_its_size(filled: Context) -> None:
    class Small(FirstRow):
        room = 1

    answers = Small(22, where=filled).predict(TASKS)
    assert [len(answer) for answer in answers] == [1] * CHUNK + [0] * 2 * CHUNK


def test_a_task_is_answered_once_and_unknown_ones_cost_nothing(filled: Context) -> None:
    class Counted(FirstRow):
        def _prelabels(self, tasks: Sequence[Any]) -> Answer:
            asked.extend(task["id"] for task in tasks)
            return super()._prelabels(tasks)

    asked: list[int] = []
    junk = [{"id": 10**6 + number} for number in range(100_000)]
    odd: list[Any] = [
        {"id": float("inf")},
        {"id": float("nan")},
        {"id": "x"},
        {"id": "3"},
        {},
        None,
        7,
        {"id": 10**400},
    ]
    answers = Counted(22, where=filled).predict([{"id": 2}, *junk, {"id": 2}, *odd, {"id": 1}])
    assert asked == [2, "3", 1]
    assert [place for place, answer in enumerate(answers) if answer] == [0, 100_005, 100_010]
