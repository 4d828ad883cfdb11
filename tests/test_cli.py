"""The firstrow command as a process: what people type, and one line for what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import Redis
from team import shown

from backend.context import connect
from backend.project import Project, TaskRecord
from backend.secret import project_secret
from backend.settings import Settings
from backend.store import Store


@pytest.fixture
def environment(redis_url: str, tmp_path: Path) -> dict[str, str]:
    """Settings with an empty Redis, and a Label Studio that does not answer."""
    with Redis.from_url(redis_url) as redis:
        redis.flushdb()
    return {
        "REDIS_URL": redis_url,
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "FIRSTROW_STORE": str(tmp_path / "store"),
    }


def firstrow(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "backend.cli", *arguments]
    paths = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return subprocess.run(command, env={**paths, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [["serve"], ["worker"], ["attach", "--project", "7"], ["status", "--project", "7"]])
def test_all_wrong_settings_are_named_at_once(command: list[str]) -> None:
    done = firstrow({"LABEL_STUDIO_URL": "localhost", "FIRSTROW_PROT": "1", "FIRSTROW_PORT": "x"}, *command)
    assert done.returncode == 1
    for name in ("LABEL_STUDIO_URL", "FIRSTROW_PROT", "FIRSTROW_PORT"):
        assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["attach"],
        ["attach", "--project", "seven"],
        ["attach", "--project", "7", "--group", "Vegetation"],
        ["attach", "--project", "7", "--group", "=Crop"],
        ["worker", "--queues", "cpu"],
        ["worker", "--queues", "gpu,gpu"],
        ["serve", "--workers", "0"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = firstrow({}, *arguments)
    assert done.returncode == 2
    assert "usage: firstrow" in done.stderr


def test_label_studio_that_does_not_answer_is_one_line(environment: dict[str, str]) -> None:
    for command in (["attach", "--dry-run"], ["detach"]):
        done = firstrow(environment, *command, "--project", "7")
        assert done.returncode == 1
        assert done.stderr.startswith("firstrow: ")
        assert "Traceback" not in done.stderr


def test_redis_that_does_not_answer_is_one_line(environment: dict[str, str]) -> None:
    done = firstrow({**environment, "REDIS_URL": "redis://127.0.0.1:1"}, "status", "--project", "7")
    assert done.returncode == 1
    assert done.stderr.startswith("firstrow: Redis does not answer")
    assert len(done.stderr.splitlines()) == 1


def test_each_project_has_a_secret_of_its_own(environment: dict[str, str]) -> None:
    for command in ("attach", "secret"):  # in another store than that of `serve` it would make one that nobody knows
        early = firstrow(environment, command, "--project", "7")
        assert (early.returncode, early.stdout) == (1, "")
    assert "no master-secret" in early.stderr
    Settings.read(environment).secret_value(make=True)
    first = firstrow(environment, "secret", "--project", "7")
    assert len(first.stdout.strip()) >= 32
    assert firstrow(environment, "secret", "--project", "7").stdout == first.stdout
    assert firstrow(environment, "secret", "--project", "8").stdout != first.stdout
    mine = firstrow({**environment, "FIRSTROW_SECRET": "mine"}, "secret", "--project", "7").stdout
    assert mine == project_secret("mine", 7) + "\n"


def test_status_as_json_and_as_tables(environment: dict[str, str]) -> None:
    settings = Settings.read(environment)
    board = connect(settings).board
    here = Project(Store(settings.store), 7)
    stages = {"new": 3, "coarse": 1, "returned": 0, "full": 2, "unusable": 0}
    state = {
        "round": 4,
        "phase": "full",
        "version": "seg-4",
        "model": "",
        "note": "Using another network.",
        "published": time.time(),
    }
    board.set_state(7, {**state, "stages": stages, "tasks": 4})
    place = {"task": 31, "ask": "full", "utility": 0.25, "parts": {"coarse_egl": 0.5, "novelty": 0.5}}
    why = {"why": "shows dark green pixels", "kind": 3}
    here.store.write_json(here.key("ranking.json"), [place, {**place, "task": 32, "utility": float("nan"), **why}])
    here.store.write_json(here.key("laps.json"), {"learn": 40, "rank": 20})
    now = time.time()
    tries = {33: now - 1, 34: now + 20 * 60 + 9, 35: now + 3 * 3600 + 9}
    faulty = {
        task: TaskRecord(task, "a.jpg", error="cannot be read: save it anew", next_try=at) for task, at in tries.items()
    }
    here.save_index({31: TaskRecord(31, "a.jpg", stage="other"), **faulty})
    board.request_round(7, "test")
    board.fail(7, "train", "no such weights: download them")
    done = firstrow(environment, "status", "--project", "7", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["round"], found["stages"], found["workers"]) == (4, stages, [])
    assert [p["task"] for p in found["head"]] == [31, 32]
    assert [job["step"] for job in found["jobs"]] == ["start_round"]
    assert found["error"]["message"] == "no such weights: download them"
    assert found["known"]
    assert found["missing"]  # Label Studio does not answer, so what is missing cannot be told
    text = shown(found)
    for words in (
        "Project 7 round 4, asks for full labels, 4 tasks in the queue, version seg-4, model no trained model yet",
        "task asks for utility because 1 31 full 0.25 coarse_egl 0.5, novelty 0.5 2 32 full - shows dark green pixels",
        "Milliseconds of the last round learn rank together 40 20 60",
        "Jobs of this round step queue status progress start_round default queued 0/0",
        "Unusable tasks (3 of 3) task why, and what to do next try 33 cannot be read: save it anew now",
        "34 cannot be read: save it anew in 20 min 35 cannot be read: save it anew in 3 h",
        "No worker is running: start `firstrow worker`.",
        "Using another network.",
        "Last error, in train: no such weights: download them",
        "1 tasks are annotated without a mask: Label Studio will not serve them again.",
        f"Missing: {found['missing'][0]}",
    ):
        assert words in text
    assert "A detach has stopped" not in text
    board.stop(7, 0)
    done = firstrow(environment, "status", "--project", "7")
    said = " ".join(done.stdout.split())
    assert "A detach has stopped this project: run it again until it ends, or `firstrow attach` to go on." in said


def test_status_of_a_project_nobody_knows(environment: dict[str, str]) -> None:
    done = firstrow(environment, "status", "--project", "8")
    assert done.returncode == 0
    assert "no round yet" in done.stdout
    said = " ".join(done.stdout.split())
    assert "This project is not attached: run `firstrow attach --project 8`." in said
    assert "A detach has stopped" not in said
