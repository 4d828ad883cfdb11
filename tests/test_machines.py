"""Workers on machines that share only Redis and the store: processes that share no folder, and an S3 server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest
from conftest import Backend
from moto.server import ThreadedMotoServer
from numpy.typing import NDArray
from rq import Queue
from rq.job import Job
from team import GROUPS, Team, cannot_be_shown, wait_for

from backend import generations, jobs, publish, spares
from backend.attach import apply, plan
from backend.context import context
from backend.embedded import start_worker
from backend.enqueue import DEFAULT, GPU, Board
from backend.features import held, load_fit
from backend.generations import KEEP_ORDERS, PAGE, gather, remove
from backend.project import TaskRecord
from backend.rank import Place
from backend.worker import ResidentWorker

CONFIG = """<View><Image name="image" value="$image"/><BrushLabels name="fine" toName="image">
<Label value="Soil"/><Label value="Crop"/></BrushLabels></View>"""
TASKS = 130


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """Settings of a store on an S3 server."""
    monkeypatch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(port=0)
    server.start()
    _, port = server.get_host_and_port()
    keys = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="firstrow")
    yield keys
    server.stop()
    monkeypatch.undo()


def project_of(backend: Backend, pictures: dict[Path, object], tasks: int) -> int:
    """A project of many tasks with a few images, attached."""
    studio = backend.context.studio
    project = int(studio.create_project("many", CONFIG)["id"])
    uploaded = studio.upload(project, list(pictures))
    values = [next(iter(studio.task(task, project)["data"].values())) for task in uploaded]
    more = itertools.islice(itertools.cycle(values), tasks - len(uploaded))
    studio.import_tasks(project, [{"image": value} for value in more])
    apply(plan(studio, project, backend.context.settings))
    return project


def test_workers_share_the_shards_of_a_round_over_s3(
    make_backend: Callable[..., Backend], pictures: dict[Path, object], bucket: dict[str, str], tmp_path: Path
) -> None:
    workers, store = 3, {**bucket, "FIRSTROW_STORE": "s3://firstrow/shared"}
    backend = make_backend(False, FIRSTROW_COARSE_TASKS="0", FIRSTROW_IMAGE_SIZE="64", **store)
    project = project_of(backend, pictures, TASKS)
    with ExitStack() as stack:
        folders = [tmp_path / f"machine-{number}" for number in range(workers)]
        processes = []
        for folder in folders:
            folder.mkdir()
            alone = {**backend.environment, "FIRSTROW_CACHE": str(folder / "cache")}
            processes.append(stack.enter_context(start_worker(folder, alone)))
        board = Board(backend.environment["REDIS_URL"])
        wait_for(lambda: len(board.redis.smembers("rq:workers")) == workers, 120)
        backend.context.board.request_round(project, "test")
        # One dies in the middle of a shard.
        wait_for(lambda: any("prepare" in log and "started" in log for log in texts(folders[:1])), 120)
        for child in psutil.Process(processes[0].pid).children():
            child.kill()
        backend.wait(project)
        here = backend.context.project(project)
        fit = load_fit(here)
        assert fit is not None
        assert len(held(backend.context, here, fit, here.index()).places) == TASKS
        assert len(here.store.read_json(here.key("ranking.json"))) == TASKS
        busy = [text for text in texts(folders) if f"prepare project {project}" in text]
        assert len(busy) >= 2, "more than one worker took part"
        assert not (backend.folder / "store" / "projects").exists()
        loads = [text.count("network loaded") for text in texts(folders)]
        assert max(loads) <= 2, "once per life of a worker, not per shard"


def texts(folders: list[Path]) -> list[str]:
    """The workers' logs."""
    return ["".join(log.read_text() for log in folder.glob("*.log")) for folder in folders]


def test_projects_take_turns(database_url: str) -> None:
    board = Board(database_url)
    for project, count in ((1, 4), (2, 2), (3, 1)):
        token = board.request_round(project, "test")
        assert token is not None
        number = board.number(project, token, 0)
        for shard in range(count):
            board.enqueue("score", project, number, shard)
    board.interleave(GPU)
    order = [job.meta["project"] for job in board.queue(GPU).jobs]
    assert order == [1, 2, 3, 1, 2, 1, 1]
    assert [job.args[2] for job in board.queue(GPU).jobs if job.meta["project"] == 1] == [0, 1, 2, 3]


def test_a_large_order_changes_at_its_head_and_goes_gently(
    make_backend: Callable[..., Backend], pictures: dict[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "SMALL", 10)
    monkeypatch.setattr(generations, "AT_ONCE", 40)
    backend = make_backend(False, FIRSTROW_COARSE_TASKS="0")
    ctx, tasks = backend.context, 70
    project = ctx.project(project_of(backend, pictures, tasks))
    publish_order, ids = publish.publish_order, [int(row["id"]) for row in ctx.studio.tasks(project.id)]
    config = refreshed(backend, project.id)
    index = {task: TaskRecord(task, "a.jpg") for task in ids}
    project.save_index(index)
    publish_order(ctx, project, index, config, places(ids), 1)
    assert served(backend, project.id) == ids[0]
    again = [*reversed(ids[50:60]), *ids[:50], *ids[60:]]
    state = publish_order(ctx, project, index, config, places(again), 2)
    assert state["queue"] == "first-row-1", "the order in force stays, its head changes"
    assert served(backend, project.id) == again[0]
    assert ctx.studio.versions(project.id)["first-row-1"] == tasks + 10
    publish_order(ctx, project, index, config, places(ids), 3)
    assert served(backend, project.id) == ids[0]
    project.store.delete(project.key("served.json"))
    assert publish_order(ctx, project, index, config, places(again), 90)["queue"] == "first-row-90"

    bad = ids[1]
    cannot_be_shown(ctx.studio, bad)
    entry: dict[str, object] = {}
    ctx.board.enqueue("clean", project.id)
    size = ctx.studio.versions(project.id)["first-row-1"]
    assert not remove(ctx, project, "first-row-1", size, entry), "a job that waits goes first"
    assert 0 < ctx.studio.versions(project.id)["first-row-1"] < size, "but not for ever"
    assert bad in ctx.board.take(project.id)[0], "a round looks at it, and names it in `status`"
    for queue in (GPU, DEFAULT):  # attach and events left jobs too, and there is no worker
        ctx.board.queue(queue).empty()
    assert remove(ctx, project, "first-row-1", size, entry)
    assert "first-row-1" not in ctx.studio.versions(project.id)
    assert served(backend, project.id) == again[0]

    studio, names = ctx.studio, ("seg-2", "seg-3", "seg-77")  # two of ours that people may have open, one of a team
    made = [studio.create_prediction(task, [], name, 0.5) for task, name in zip(ids, names, strict=False)]
    for _ in range(2):
        then = time.time() - KEEP_ORDERS - 60
        recent = {n: {**entry, "published": then} for n, entry in generations.history(project).items()}
        project.store.write_json(project.key("generations.json"), recent)
        generations.clean_versions(ctx, project)
    kept = [{p["id"]: p["model_version"] for p in studio.predictions(task)} for task in ids[:3]]
    assert [rows.get(number) for rows, number in zip(kept, made, strict=True)] == ["seg-2", "seg-2", "seg-77"]
    assert not generations.unfinished(project)
    ctx.board.enqueue("clean", project.id)
    known: dict[str, dict[str, object]] = {"77": {}}
    assert not gather(ctx, project, "seg-77", ids, known), "a job that waits goes first"
    assert known["77"]["gathered"] == sorted(ids)[PAGE - 1], "but not for ever"


def test_a_task_that_nobody_picks_gathers_no_prediction_for_each_order(
    make_backend: Callable[..., Backend], pictures: dict[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "MOST", 3)
    monkeypatch.setattr(generations, "MOST_ORDERS", 2)
    backend = make_backend(False, FIRSTROW_COARSE_TASKS="0")
    ctx = backend.context
    project = ctx.project(project_of(backend, pictures, 10))
    ids = [int(row["id"]) for row in ctx.studio.tasks(project.id)]
    config, index = refreshed(backend, project.id), {task: TaskRecord(task, "a.jpg") for task in ids}
    project.save_index(index)

    def order(number: int, ranked: list[int]) -> dict[int, dict[int, str]]:
        """Publish an order and clean up; the predictions of each task, with their versions."""
        publish.publish_order(ctx, project, index, config, places(ranked), number)
        for queue in (GPU, DEFAULT):  # cleaning up gives way to jobs that wait
            ctx.board.queue(queue).empty()
        generations.clean_versions(ctx, project)
        assert served(backend, project.id) == ranked[0]
        return {task: {p["id"]: p["model_version"] for p in ctx.studio.predictions(task)} for task in ids}

    seen: set[int] = set()
    sizes = []
    for number in range(1, 13):
        there = order(number, ids[number % 10 :] + ids[: number % 10])
        before, seen = seen, {prediction for rows in there.values() for prediction in rows}
        assert before <= seen, "any of them may be open"
        assert all(list(rows.values()).count(f"first-row-{number}") == 1 for rows in there.values())
        sizes.append(len(seen))
    assert sizes[-1] == sizes[-5], f"each order added some: {sizes}"

    ctx.studio.delete_prediction(next(iter(there[ids[0]])))  # by somebody else: it gets a new one
    known = order(13, ids)

    fresh = ctx.studio.create_prediction(ids[1], [], "first-row-14", 0.5)  # what a publish has sent when it dies
    spares.move(ctx, project, [{"task": task, "model_version": "first-row-14"} for task in ids], "first-row-14")
    assert ctx.studio.versions(project.id)["first-row-14"] > 1
    after = order(14, ids)
    assert {p for rows in known.values() for p in rows} <= {p for rows in after.values() for p in rows} - {fresh}


def refreshed(backend: Backend, project: int) -> object:
    from backend.sync import refresh_config

    return refresh_config(backend.context, backend.context.project(project))


def places(ids: list[int]) -> list[Place]:
    return [Place(task, "full", 0.0, {}) for task in ids]


def served(backend: Backend, project: int) -> int:
    """The first task of Label Studio's order, without being given it: the lowest score of the version in force."""
    studio = backend.context.studio
    version = studio.project(project)["model_version"]
    found: dict[int, float] = {}
    for task in studio.full_tasks(project, [int(row["id"]) for row in studio.tasks(project)], set()):
        scores = [p["score"] for p in task["predictions"] if p["model_version"] == version]
        if scores:
            found[int(task["id"])] = min(scores)
    return min(found, key=lambda task: found[task])


@pytest.mark.parametrize("strategy", ["first-row", "badge"])
def test_a_large_pool_is_scored_in_shards_and_ranked_as_at_once(
    make_backend: Callable[..., Backend],
    pictures: dict[Path, NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    backend = make_backend(False, FIRSTROW_COARSE_TASKS="0", FIRSTROW_STRATEGY=strategy)
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
    context.cache_clear()
    team, board, steps = Team(backend, pictures), backend.context.board, list[str]()

    class Here(ResidentWorker):
        """One in this process, whose limits a test can set; it notes what it did."""

        def execute_job(self, job: Job, queue: Queue) -> None:
            super().execute_job(job, queue)
            steps.append(job.meta["step"])
            if job.meta["step"] == "score":
                lost, none = (team.project.key("prepared", job.meta["round"], f"scores-{n}.npz") for n in (1, 0))
                team.project.store.delete(lost)
                team.project.store.write_arrays(none, {"tasks": np.zeros(0, np.int64)})  # its features were lost

    def work() -> dict[str, Any]:
        """Work until nothing is left; the order."""
        steps.clear()
        Here(board, [GPU, DEFAULT], "here", 300).work(burst=True, logging_level="WARNING")
        assert board.error(team.id) is None
        rows = team.project.store.read_json(team.project.key("ranking.json"))
        return {row["task"]: {**row, "utility": pytest.approx(row["utility"], rel=1e-5)} for row in rows}

    apply(plan(team.studio, team.id, backend.context.settings, GROUPS))
    board.request_round(team.id, "attached")
    work()
    first = team.ranking()[0]
    team.segment(first)
    wait_for(lambda: board.busy(team.id))
    work()
    assert team.project.index()[first].stage == "full"
    board.request_round(team.id, "by hand", train=True)
    at_once = work()
    assert "score" not in steps
    monkeypatch.setattr(jobs, "LARGE", 3)
    monkeypatch.setattr(jobs, "LARGE_SHARD", 2)
    board.request_round(team.id, "by hand", train=True)
    in_shards = work()
    context.cache_clear()
    assert steps.count("score") == -(-len(team.masks) // 2)
    assert steps[-2:] == ["publish", "clean"]
    assert list(in_shards) == list(at_once)
    assert in_shards == at_once
    assert served(backend, team.id) == next(iter(at_once))
    assert {"look", "learn", "rank", "publish"} <= team.project.store.read_json(team.project.key("laps.json")).keys()
