"""The network in the background: trained beside the rounds, compared with the head, shown once it is ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import Backend
from numpy.typing import NDArray
from team import Team, wait_for

from backend import fine_tuning
from backend.comparison import LEAST_PAIRS, PAIRS, compare, comparison, tuned_in_force
from backend.embedded import start_worker
from backend.enqueue import DEFAULT, GPU
from backend.fine_tuning import RESTING, fine_tune, is_wanted
from backend.learn import stored_network
from backend.project import Project
from backend.regions import to_mask
from backend.status import status
from backend.store import Store
from model.classes import Classes

Pictures = dict[Path, NDArray[np.uint8]]
CLASSES = Classes(("soil", "crop"), ("Soil", "Plant"), ((0,), (1,)))


def test_the_network_is_trained_beside_the_rounds_and_shown_once_it_is_ahead(
    make_backend: Callable[..., Backend], pictures: Pictures
) -> None:
    team = Team(make_backend(FIRSTROW_COARSE_TASKS="0", FIRSTROW_FINE_TUNE="on", FIRSTROW_TRAIN_STEPS="1"), pictures)
    last, project, ctx = team.attach(), team.project, team.backend.context
    team.segment(team.ranking()[0])
    last = team.wait(last)
    wait_for(lambda: comparison(project) and not unseen(team), 60, team.log)
    first = comparison(project)
    assert (first["trained"], "pairs" in first) == (1, False)
    assert ctx.board.state(team.id)["masks"] == "head"
    picked = team.ranking()[0]
    guess = project.prediction(first["version"], picked, team.config.classes.fine)
    assert guess is not None
    team.segment(picked)
    last = team.wait(last)
    row = project.store.read_json(project.key("curve.json"))[-1]
    assert (row["task"], row["network"]["model"], row["network"]["trained_on"]) == (picked, first["version"], 1)
    assert row["network"]["miou"] == pytest.approx(miou(guess[0], team.masks[picked]), abs=0.02), "from what it said"
    assert status(ctx, team.id)["fine_tuning"]["pairs"] == 1
    wait_for(lambda: comparison(project)["trained"] == 2 and not unseen(team), 60, team.log)
    assert ctx.board.state(team.id)["masks"] == "head", "one label proves nothing"

    before = [{**row, "network": {**row["network"], "miou": row["miou"] + 0.1}} for _ in range(LEAST_PAIRS)]
    project.store.write_json(project.key("curve.json"), [{**r, "task": -n} for n, r in enumerate(before)])
    team.segment(team.ranking()[0])
    last = team.wait(last)
    wait_for(
        lambda: ctx.board.state(team.id)["masks"] == comparison(project)["version"] and not unseen(team), 60, team.log
    )
    team.settle()
    assert status(ctx, team.id)["fine_tuning"]["ahead"]
    served = team.studio.next_task(team.id)
    assert served is not None
    shown = project.prediction(comparison(project)["version"], served["id"], team.config.classes.fine)
    heads = project.prediction("head", served["id"], team.config.classes.fine)
    assert shown is not None
    assert heads is not None
    assert (shown[0] != heads[0]).any()
    names = team.config.classes.fine
    height, width = shown[0].shape
    drawn = to_mask(served["predictions"][-1]["result"], team.config.fine, (width, height), names)
    agrees = [float((drawn == mask[0])[drawn < len(names)].mean()) for mask in (shown, heads)]
    assert agrees[0] > agrees[1], "people see the network's mask"
    assert ctx.board.error(team.id) is None


def unseen(team: Team) -> object:
    return fine_tuning.unseen(team.project, team.project.index(), team.config.classes)


def miou(seen: NDArray[np.uint8], true: NDArray[np.uint8]) -> float:
    """Over the classes that one of the two has."""
    true = cv2.resize(true, seen.shape[::-1], interpolation=cv2.INTER_NEAREST)
    shares = [((seen == c) & (true == c)).sum() / ((seen == c) | (true == c)).sum() for c in np.unique([*true.flat])]
    return float(np.mean(shares))


def test_a_training_rests_while_jobs_wait_and_goes_on_where_it_was(
    make_backend: Callable[..., Backend], pictures: Pictures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fine_tuning, "FEWEST", 600)
    backend = make_backend(False, FIRSTROW_COARSE_TASKS="0", FIRSTROW_FINE_TUNE="on", FIRSTROW_TRAIN_STEPS="1")
    team, ctx = Team(backend, pictures), backend.context
    with start_worker(tmp_path, {**backend.environment, "FIRSTROW_FINE_TUNE": "off"}):
        before = team.attach()
        team.segment(team.ranking()[0])
        team.wait(before)
        team.settle()
    assert comparison(team.project) == {}
    board, config = ctx.board, team.project.config()
    for queue in (GPU, DEFAULT):
        board.queue(queue).empty()
    assert is_wanted(ctx, team.project, team.project.index(), config)
    fine_tune(ctx, team.project)
    whole = stored_network(team.project, comparison(team.project)["version"], config.classes)
    assert whole is not None
    assert not unseen(team)

    team.project.store.delete(team.project.key("network.json"))
    board.enqueue("clean", team.id)
    steps = 0
    while "version" not in comparison(team.project):
        assert board.waiting()
        fine_tune(ctx, team.project)
        steps += 1
        assert board.redis.exists(f"firstrow:{team.id}:fine_tuning"), "it is to go on"
        assert len(RESTING) == ("version" not in comparison(team.project))
    assert steps == 6, "a step at a time"
    again = stored_network(team.project, comparison(team.project)["version"], config.classes)
    assert again is not None
    for name, values in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], values)

    for queue in (GPU, DEFAULT):
        board.queue(queue).empty()
    index = {task: replace(record, image="/data/upload/none.jpg") for task, record in team.project.index().items()}
    team.project.save_index(index)
    team.project.store.delete(team.project.key("network.json"))
    assert is_wanted(ctx, team.project, index, config)
    fine_tune(ctx, team.project)
    assert " is not used, the model in force stays: task " in (board.error(team.id) or {})["message"]
    assert not is_wanted(ctx, team.project, index, config), "what came to nothing waits for more labels"


def test_one_job_of_a_project_at_a_time_and_only_when_nothing_waits(make_backend: Callable[..., Backend]) -> None:
    board = make_backend(False).context.board
    board.register(7)
    board.fine_tune(7)
    assert board.queue(GPU).job_ids == [], "nobody asked for it"
    board.want_fine_tuning(7)
    waiting = board.enqueue("clean", 7)
    board.fine_tune(7)
    assert board.queue(GPU).job_ids == []
    board.queue(DEFAULT).remove(waiting)
    board.fine_tune(7)
    assert board.queue(GPU).job_ids == ["fine_tune-7-1"]
    board.want_fine_tuning(7)
    board.queue(GPU).empty()
    board.fine_tune(7)
    assert board.queue(GPU).job_ids == ["fine_tune-7-1"], "the one before has ended"
    board.queue(GPU).empty()
    board.want_fine_tuning(7)
    assert board.stop(7, 1)
    board.fine_tune(7)
    assert board.queue(GPU).job_ids == []


@pytest.mark.parametrize(
    ("gains", "ahead"),
    [
        ([0.1] * LEAST_PAIRS, True),
        ([0.1] * (LEAST_PAIRS - 1), False),
        ([-0.1] * LEAST_PAIRS, False),
        ([0.3, -0.29] * LEAST_PAIRS, False),
        ([0.1, 0.05] * LEAST_PAIRS, True),
        ([0.5] * PAIRS + [-0.1] * PAIRS, False),
    ],
)
def test_the_network_is_ahead_by_more_than_chance(gains: list[float], ahead: bool, tmp_path: Path) -> None:
    project = Project(Store(str(tmp_path)), 7)
    curve: list[dict[str, Any]] = [{"miou": 0.5}]
    curve += [{"miou": 0.5, "network": {"miou": 0.5 + gain}} for gain in gains]
    compare(project, curve)
    project.store.write_json(
        project.key("network.json"), {"version": "network-3", "trained": {}, "classes": ["crop", "soil"]}
    )
    assert tuned_in_force(project, CLASSES) == ("network-3" if ahead else "")
    assert tuned_in_force(project, Classes(("soil", "weed"), ("Soil", "Plant"), ((0,), (1,)))) == ""
