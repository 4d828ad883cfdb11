"""What goes wrong costs no more than itself: files, events, Redis, workers, a slow Label Studio; all parts are real."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import requests
from conftest import Backend, Backends
from numpy.typing import NDArray
from team import SEG, Team, wait_for

from backend.connection import credentials
from backend.embedded import Studio, backend_settings
from backend.enqueue import PUT_OFF
from backend.generations import take_name
from backend.labelstudio import LabelStudio
from backend.score import scored
from backend.settings import Settings
from backend.status import status
from backend.watch import LATE, LATEST, SOON, Watch

log = logging.getLogger(__name__)
Pictures = dict[Path, NDArray[np.uint8]]


@pytest.fixture(scope="module")
def team(
    studio: Studio, redis_url: str, tmp_path_factory: pytest.TempPathFactory, pictures: Pictures
) -> Iterator[Team]:
    """A project with coarse and full labels, and a backend of its own."""
    with Backends(studio, redis_url, tmp_path_factory.mktemp("harm")) as backends:
        yield labelled_team(backends.start(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:5]))


def labelled_team(backend: Backend, pictures: Pictures) -> Team:
    """A project with these pictures, of which a few are labelled."""
    team = Team(backend, pictures)
    team.attach()
    before = team.coarse()
    for _ in range(2):  # the second one is scored by the model that learnt the first: a learning curve
        team.segment(team.ranking()[0])
        before = team.wait(before)
    return team


def picture_of(team: Team) -> dict[str, Any]:
    """All that a round leaves, as far as it does not change from one round to the next."""
    project, store = team.project, team.project.store
    return {
        "index": {r.id: (r.stage, r.size, r.error, r.coarse) for r in project.index().values()},
        "votes": project.decided(team.config).tolist(),
        "trained": trained(team),
        "scored": scored(team.backend.context, project, team.config, project.index()),
        "labels": {key: store.read_map(key) is not None for key in store.list(project.key("labels"))},
        "coarse": {key: store.read_map(key) is not None for key in store.list(project.key("coarse"))},
        "maps": {Path(key).name: store.read_map(key) is not None for key in store.list(project.key("clusters"))},
        "answers": {key: answer_in(store.read_json(key)) for key in store.list(project.key("coarse-answers"))},
        "ranked": sorted(team.ranking()),
        "generations": bool(store.read_json(project.key("generations.json"))),
        "served": sorted((store.read_json(project.key("served.json")) or {}).get("tasks", [])),
        "shown": {task: len(answer(team, task)) > 0 for task in team.masks},
    }


def answer_in(record: Any) -> Any:
    """The answer that the store keeps of one that was set aside."""
    return record and (record["task"], record["annotation"])


def answer(team: Team, task: int) -> list[Any]:
    """What `/predict` answers for a task."""
    from backend.plugin import FirstRow

    return FirstRow(team.id, where=team.backend.context).predict([{"id": task, "project": team.id}])[0]


#: Kinds of files in a project's folder, a round for each group: none of a group is made from another one of it.
KINDS = [
    ["index.json", "number.json", "coarse-answers/"],
    ["codebook.json", "votes.json", "config.json"],
    ["state.json", "served.json", "ranking.json", "generations.json"],
    ["model.json", "curve.json", "features/"],
    ["head.npz", "masks.json"],
    ["pool.npz", "pixels/"],
    ["labels/", "clusters/"],
    ["coarse/", "predictions/"],
]


def harm(team: Team, kind: str, how: Callable[[bytes], bytes]) -> int:
    """Damage every file of a kind; how many there were."""
    store, prefix = team.project.store, team.project.key(kind)
    keys = [key for key in store.list(team.project.key()) if key.startswith(prefix)]
    for key in keys:
        store.write(key, how(store.read(key) or b""))
    return len(keys)


def recovered(team: Team, kinds: list[str], how: Callable[[bytes], bytes], train: bool = True) -> None:
    """Damage files, cause a round, and compare what is there then; with `train` a round that loads the network."""
    board = team.backend.context.board
    before, number = picture_of(team), team.backend.round(team.id)
    assert [kind for kind in kinds if not harm(team, kind, how)] == []
    board.request_round(team.id, "test", train=train)
    team.settle()
    after = picture_of(team)
    assert after == before, team.log()
    assert board.error(team.id) is None
    assert team.backend.round(team.id) > number
    served = team.studio.project(team.id)["model_version"]
    assert served == team.project.state()["queue"] == f"first-row-{team.backend.round(team.id)}"


@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
def test_half_a_file_is_made_whole_without_a_hand(team: Team, kinds: list[str]) -> None:
    recovered(team, kinds, lambda data: data[: len(data) // 2])


@pytest.mark.parametrize("how", [lambda data: b"", lambda data: bytes(len(data))], ids=["empty", "zeros"])
def test_empty_files_and_zeros_of_every_kind_at_once(team: Team, how: Callable[[bytes], bytes]) -> None:
    recovered(team, [kind for kinds in KINDS for kind in kinds], how)


@contextmanager
def unheard(team: Team) -> Iterator[None]:
    """No event of the project reaches us meanwhile."""
    hooks = team.studio.webhooks(team.id)
    try:
        for hook in hooks:
            team.studio.patch_webhook(hook["id"], is_active=False, url=hook["url"])
        yield
    finally:
        for hook in hooks:
            team.studio.patch_webhook(hook["id"], is_active=True, url=hook["url"])


def seconds_until_noticed(team: Team, change: Callable[[Team], object]) -> float:
    """Change something; how long it takes until a round begins."""
    board, began = team.backend.context.board, time.monotonic()
    change(team)
    wait_for(lambda: board.busy(team.id), 60, team.log)
    return time.monotonic() - began


def soon() -> float:
    """Seconds within which a lost event must be made good: 15 on a quiet machine."""
    return 15 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_a_lost_event_is_made_good_within_seconds(team: Team, pictures: Pictures) -> None:
    team.settle()
    tasks = set(team.masks)

    def add(team: Team) -> None:
        tasks.update(team.studio.upload(team.id, [next(iter(pictures))]))

    def remove(team: Team) -> None:
        team.studio.http.call("DELETE", f"/api/tasks/{(added := max(tasks))}/")
        tasks.remove(added)

    with unheard(team):
        for change in (segment, redraw, erase, add, remove):
            before, began = team.backend.round(team.id), time.monotonic()
            noticed = seconds_until_noticed(team, change)
            assert noticed < soon()
            team.backend.wait(team.id, before)
            log.info(
                "%s: noticed after %.1f s, an order after %.1f", change.__name__, noticed, time.monotonic() - began
            )
            team.settle()
            assert set(team.project.index()) == tasks


def segment(team: Team) -> None:
    """Annotate the first task."""
    team.segment(team.ranking()[0])


def full_annotation(team: Team) -> dict[str, Any]:
    """The newest full annotation."""
    done = max(r.annotation for r in team.project.index().values() if r.stage == "full")
    task = next(r.id for r in team.project.index().values() if r.annotation == done)
    rows = team.studio.task(task, team.id)["annotations"]
    return next(dict(row) for row in rows if row["id"] == done)


def redraw(team: Team) -> None:
    """Change an annotation: every region gets another class."""
    annotation, names = full_annotation(team), team.config.fine.labels
    for region in annotation["result"]:
        kind = region["type"]
        region["value"][kind] = [names[(names.index(name) + 1) % len(names)] for name in region["value"][kind]]
    team.studio.update_annotation(annotation["id"], annotation["result"])


def erase(team: Team) -> None:
    """Delete an annotation."""
    team.studio.delete_annotation(full_annotation(team)["id"])


def test_lost_changes_of_the_label_config_are_noticed_and_what_came_after_a_failed_round(team: Team) -> None:
    team.settle()
    board, config = team.backend.context.board, team.studio.project(team.id)["label_config"]
    end, more = config.rindex("</View>"), '<PolygonLabels name="more" toName="photo"><Label value="x"/></PolygonLabels>'
    task = team.ranking()[0]

    def repair(team: Team) -> None:
        team.studio.patch_project(team.id, label_config=config)
        team.segment(task)

    with unheard(team):
        unusable = config[:end] + more + config[end:]
        changed = seconds_until_noticed(team, lambda team: team.studio.patch_project(team.id, label_config=unusable))
        assert changed < soon()
        log.info("label config: noticed after %.1f s", changed)
        wait_for(lambda: not board.busy(team.id), 60, team.log)
        assert "several controls for masks" in (board.error(team.id) or {})["message"]
        assert board.wished(team.id)
        assert seconds_until_noticed(team, repair) < soon()
        team.settle()
        assert team.project.index()[task].stage == "full"
    assert board.error(team.id) is None


def test_redis_that_loses_everything_in_mid_round_costs_seconds(team: Team) -> None:
    team.settle()
    board, before = team.backend.context.board, team.backend.round(team.id)
    segment(team)
    wait_for(lambda: any(job["status"] == "started" for job in board.jobs(team.id)), 30)
    board.redis.flushdb()
    began = time.monotonic()
    for path in ("/setup", "/predict"):
        url = team.backend.context.settings.url + path
        said = requests.post(url, json={"project": team.id, "tasks": []}, timeout=9)
        assert said.status_code == 401, "it has a secret still"
    assert status(team.backend.context, team.id)["workers"], "a worker that works is there for `status`"
    team.backend.wait(team.id, before, 60)
    took = time.monotonic() - began
    log.info("next order %.1f s after Redis was emptied", took)
    assert took < 30
    team.settle()
    assert [r.stage for r in team.project.index().values()].count("full") == len(trained(team))


def trained(team: Team) -> dict[str, str]:
    """The labels that the model in force has learnt from."""
    name = "model.json" if team.backend.context.settings.learner == "instant" else "network.json"
    return dict((team.project.store.read_json(team.project.key(name)) or {}).get("trained", {}))


#: Steps of a round in which much has to be read.
LARGE_ROUND = ["fit_codebook", "prepare", "plan_round"]


@pytest.mark.parametrize(
    ("step", "delay"),
    [("start_round", 0.0), ("start_round", 0.3), ("start_round", 0.6), *((s, 0.0) for s in LARGE_ROUND)],
)
def test_a_worker_killed_in_a_step_costs_only_that_step(team: Team, step: str, delay: float) -> None:
    killed(team, step, delay)


def killed(team: Team, step: str, delay: float) -> None:
    """Kill the worker in a step of a round that follows a label, and see that nothing is lost."""
    team.settle()
    board, before = team.backend.context.board, team.backend.round(team.id)
    task = next(iter(team.masks))
    for _ in range(5):  # a step may be too quick to be caught
        if step in LARGE_ROUND:
            team.project.store.delete(team.project.key("pool.npz"))
        wanted = label_anew(team, task)
        if kill_in(team, step, delay):
            break
        team.settle()
        before = team.backend.round(team.id)
    else:
        raise AssertionError(f"{step} was never caught")
    began = time.monotonic()
    team.backend.context.board.clear_error(team.id)
    wait_for(lambda: team.backend.round(team.id) > before, 90, lambda: (board.jobs(team.id), team.log()))
    team.settle()
    log.info("%s + %.1f s: next order %.1f s after the kill", step, delay, time.monotonic() - began)
    assert team.project.index()[task].annotation == wanted
    assert str(task) in trained(team)
    assert board.error(team.id) is None


def label_anew(team: Team, task: int) -> int:
    """Annotate a task in full, or draw it again if it has a full annotation; the annotation's id."""
    full = list(team.studio.task(task, team.id)["annotations"])
    result = team.annotator().full_result(task)
    if full:
        return int(team.studio.update_annotation(full[0]["id"], result)["id"])
    return int(team.studio.create_annotation(task, result)["id"])


def kill_in(team: Team, step: str, delay: float, seconds: float = 60) -> bool:
    """Kill the worker when it has run a step for a while; False if it was never caught in the act."""
    board, until = team.backend.context.board, time.monotonic() + seconds
    (child,) = worker_children(team.backend)
    prefix = "round" if step == "start_round" else step
    while time.monotonic() < until:
        if any(job.startswith(f"{prefix}-{team.id}-") for job in board.running(team.id)):
            time.sleep(delay)
            if not board.running(team.id):
                return False
            child.kill()
            return True
        if not board.busy(team.id) and not board.wished(team.id) and time.monotonic() > until - seconds + 5:
            return False
    return False


def worker_children(backend: Backend) -> list[psutil.Process]:
    """The workers' processes of a backend below their supervisors; other tests' backends may run, too."""
    store, workers = backend.environment["FIRSTROW_STORE"], []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "backend.worker" in process.cmdline() and process.environ().get("FIRSTROW_STORE") == store:
                workers.append(process)
    return workers


class Slow(BaseHTTPRequestHandler):
    """Passes requests on to Label Studio, and each answer back after a while."""

    target: ClassVar[str] = ""
    delay: ClassVar[float] = 0.0
    asked: ClassVar[list[str]] = []
    refused: ClassVar[str] = ""
    #: Called with each request, before it is passed on.
    seen: ClassVar[Callable[[str], object] | None] = None

    def answer(self) -> None:
        """Pass one request on."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"{self.command} {self.path}")
        if (seen := type(self).seen) is not None:
            seen(self.asked[-1])
        if self.refused and self.asked[-1].startswith(self.refused):
            self.send_error(502)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        url = self.target + self.path
        given = requests.request(self.command, url, data=body, headers=headers, timeout=60, allow_redirects=False)
        time.sleep(self.delay)
        self.send_response(given.status_code)
        for name in ("Content-Type", "Location"):
            if name in given.headers:
                self.send_header(name, given.headers[name])
        self.send_header("Content-Length", str(len(given.content)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(given.content)

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815  (names of http.server)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def test_a_name_that_label_studio_loses_is_given_again(slow: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    slow.settle()
    queue, patch = slow.project.state()["queue"], LabelStudio.patch_ml
    (backend,) = slow.studio.ml_backends(slow.id)

    def lose() -> None:
        """What is left when Label Studio saves an ML backend as it was."""
        patch(slow.studio, backend["id"], **credentials(slow.backend.context.settings, slow.id), title="first-row-0")
        slow.studio.patch_project(slow.id, model_version=queue)

    def patch_and_lose(studio: LabelStudio, number: int, **fields: object) -> None:
        monkeypatch.undo()  # the next one is not lost
        patch(studio, number, **fields)
        lose()

    with slow.without_rounds():
        lose()
        monkeypatch.setattr(LabelStudio, "patch_ml", patch_and_lose)
        take_name(slow.backend.context, slow.project)
        assert (title(slow), slow.studio.version_in_force(slow.id)) == (queue, queue)


class Late(Slow):
    """One that is always slow."""

    delay = 0.3
    asked: ClassVar[list[str]] = []


@contextmanager
def serve(studio: Studio, kind: type[Slow]) -> Iterator[str]:
    """Have Label Studio be such a slow one; its address."""
    kind.target = studio.url
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def slow(
    studio: Studio, redis_url: str, tmp_path_factory: pytest.TempPathFactory, pictures: Pictures
) -> Iterator[Team]:
    """A project whose backend finds Label Studio as slow, and as unwilling, as `Slow` says; we ourselves do not."""
    with (
        serve(studio, Slow) as url,
        Backends(studio, redis_url, tmp_path_factory.mktemp("slow")) as backends,
    ):
        backend = backends.start(FIRSTROW_COARSE_TASKS="0", LABEL_STUDIO_URL=url)
        backend.context = replace(backend.context, studio=LabelStudio(studio.url, studio.token))
        team = Team(backend, dict(list(pictures.items())[:7]))
        team.attach()
        yield team


def test_orders_come_though_every_answer_takes_two_seconds(slow: Team) -> None:
    slow.settle()
    before, began = slow.backend.round(slow.id), time.monotonic()
    Slow.asked.clear()
    Slow.delay = 2.0
    segment(slow)
    slow.backend.wait(slow.id, before, 240)
    Slow.delay = 0.0
    log.info("next order after %.1f s and %d requests of 2 s", time.monotonic() - began, len(Slow.asked))
    assert slow.backend.context.board.error(slow.id) is None
    served = slow.studio.next_task(slow.id)
    assert served is not None
    assert served["id"] == slow.ranking()[0]


def test_what_is_stopped_changes_nothing_more(slow: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    board, told, stop_at, stopped = slow.backend.context.board, list[str](), list[str](), list[int]()

    def tell(request: str) -> None:
        """Note a request of a job, and stop the project at the one where it is to be stopped."""
        if board.running(slow.id):
            told.append(re.sub(r"\d+", "", request))
            if told[-2:] == stop_at and not stopped:
                board.stop(slow.id, 0)
                stopped.append(len(told))

    monkeypatch.setattr(Slow, "seen", staticmethod(tell))
    slow.settle()
    before = slow.backend.round(slow.id)
    redraw(slow)
    slow.backend.wait(slow.id, before)
    slow.settle()
    threes = zip(told, told[1:], told[2:], strict=False)
    last_looks = {(one, look) for one, look, then in threes if look.startswith("GET") and not then.startswith("GET")}
    assert len(last_looks) >= 3, told
    for looks in sorted(last_looks):
        told.clear()
        stopped.clear()
        stop_at[:] = looks
        while not stopped:  # a look at the counters may come between
            redraw(slow)
            wait_for(lambda: stopped or board.busy(slow.id), 60, slow.log)
            wait_for(lambda: not board.running(slow.id) and (stopped or not board.busy(slow.id)), 60, slow.log)
        assert [request for request in told[stopped[0] :] if not request.startswith("GET")] == [], looks
        log.info("stopped after %s, then %s", looks, told[stopped[0] :])
        board.register(slow.id)
        board.request_round(slow.id, "goes on")
        slow.settle()


def test_looks_at_the_counters_take_a_twentieth_of_label_studios_time(
    studio: Studio, label_studio: LabelStudio, database_url: str, tmp_path: Path
) -> None:
    project = int(label_studio.create_project("counted", SEG.format(tag="BrushLabels"))["id"])
    given = {**backend_settings(tmp_path, database_url, studio), "FIRSTROW_SECRET": "this test"}

    def look(url: str) -> tuple[float, float]:
        """Look once, now: the pause until the next look, and the seconds that looking took."""
        watch = Watch(Settings.read({**given, "LABEL_STUDIO_URL": url}), lambda: None)
        watch.board.register(project)
        watch.board.redis.delete("firstrow:count", f"firstrow:{project}:counting", f"firstrow:{project}:busy")
        began = time.monotonic()
        watch.look_at_counters()
        took = time.monotonic() - began
        return float(watch.board.redis.get(f"firstrow:{project}:pause") or 0), took

    with serve(studio, Late) as late:
        pause, took = look(late)
        asked = len(Late.asked)
        assert 20 * Late.delay * asked <= pause <= 20 * took
    before, _ = look(studio.url)  # once more, for no round has read the label config
    pause, took = look(studio.url)
    assert min(1.25 * before, LATE) <= pause <= max(1.25 * before, 20 * took), "nothing has moved"
    label_studio.import_tasks(project, [{"picture": "/a"}])
    pause, took = look(studio.url)
    assert SOON <= pause <= max(SOON, 20 * took), "something has"
    assert look("http://127.0.0.1:9")[0] == LATEST, "nobody answers"
    label_studio.delete_project(project)


def test_a_round_that_cannot_be_served_leaves_the_old_one_and_is_tried_again(slow: Team) -> None:
    slow.settle(240)
    board, before = slow.backend.context.board, slow.project.state()
    Slow.refused = f"PATCH /api/projects/{slow.id}/"
    segment(slow)
    wait_for(lambda: (board.error(slow.id) or {}).get("step") == "start_round", 60, slow.log)
    assert slow.project.state() == before
    assert board.state(slow.id)["round"] == before["round"]
    assert slow.studio.project(slow.id)["model_version"] == before["queue"]
    Slow.refused = ""
    slow.settle()
    state = slow.project.state()
    assert state["round"] >= before["round"] + 2, "the number of the round that failed is not used again"
    assert slow.studio.project(slow.id)["model_version"] == state["queue"]
    assert board.error(slow.id) is None


def test_a_lost_event_is_made_good_while_a_failed_round_waits_for_its_next_try(slow: Team) -> None:
    slow.settle(240)
    board = slow.backend.context.board
    Slow.refused = f"PATCH /api/projects/{slow.id}/"
    segment(slow)
    wait_for(
        lambda: (board.error(slow.id) or {}).get("step") == "start_round" and not board.busy(slow.id), 60, slow.log
    )
    board.redis.set(f"firstrow:{slow.id}:retry", time.time() + 300)
    Slow.refused = ""
    task, before = slow.ranking()[-1], slow.backend.round(slow.id)
    with unheard(slow):
        slow.segment(task)
        board.redis.delete(f"firstrow:{slow.id}:counting")  # a look that was slow, on a busy machine, has a long pause
        wait_for(lambda: slow.project.index()[task].stage == "full", soon(), slow.log)
        slow.backend.wait(slow.id, before, 60)
        slow.settle()


def test_a_worker_killed_in_a_reconcile_costs_only_that(slow: Team) -> None:
    slow.settle(240)
    board, task = slow.backend.context.board, slow.ranking()[-1]
    board.redis.set(f"firstrow:{slow.id}:counting", "this test", ex=600)  # the counters tell nothing
    (child,) = worker_children(slow.backend)
    with unheard(slow):
        slow.segment(task)
        Slow.delay = 1.0
        board.reconcile(slow.id)
        wait_for(lambda: any(job.startswith("reconcile-") for job in board.running(slow.id)), 60, slow.log)
        child.kill()
        child.wait()
        Slow.delay = 0.0
        assert slow.project.index()[task].stage != "full", "it was not found before"
        wait_for(lambda: slow.project.index()[task].stage == "full", 60, slow.log)
    board.redis.delete(f"firstrow:{slow.id}:counting")
    slow.settle()
    assert board.error(slow.id) is None


def test_cleaning_up_that_fails_fails_no_round(slow: Team) -> None:
    slow.settle()
    before = slow.backend.round(slow.id)
    Slow.refused = "PATCH /api/ml/"
    segment(slow)
    slow.backend.wait(slow.id, before, 60)
    wait_for(lambda: "cleaning up is put off" in slow.log(), 60, slow.log)
    Slow.refused = ""
    assert slow.backend.context.board.error(slow.id) is None
    assert not slow.backend.context.board.wished(slow.id)
    queue = slow.project.state()["queue"]
    assert title(slow) != queue
    wait_for(lambda: title(slow) == queue, PUT_OFF[0] + 60, slow.log)


def title(team: Team) -> str:
    """The name that our ML backend has in Label Studio."""
    (backend,) = team.studio.ml_backends(team.id)
    return str(backend["title"])
