"""Real gunicorn with several workers on a real Redis, asked as Label Studio asks."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from backend import attach
from backend.app import LARGEST
from backend.connection import SECRET_HEADER
from backend.embedded import Studio, free_port, start_serve
from backend.enqueue import Board
from backend.labelstudio import LabelStudio
from backend.plugin import NO_VERSION
from backend.project import Project, TaskRecord
from backend.settings import Settings
from backend.store import Store

SECRET = "s3cret-password"
TOKEN = "a" * 40
CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="coarse" toName="image"><Label value="Background"/><Label value="Foreground"/><Label value="Mixed"/>
</BrushLabels><BrushLabels name="seg" toName="image"><Label value="Soil"/><Label value="Crop"/></BrushLabels></View>"""
STAMP = "1795345419"


@dataclass(frozen=True)
class Served:
    """A running web process."""

    url: str
    board: Board
    store: Store
    log: Path

    def post(self, path: str, body: object, secret: str | None = None, **more: Any) -> requests.Response:
        """POST as Label Studio does."""
        headers = {} if secret is None else {SECRET_HEADER: secret}
        return requests.post(self.url + path, json=body, headers=headers, timeout=20, **more)


def settings(folder: Path, redis_url: str) -> dict[str, str]:
    """Of a web process that logs all it can."""
    port = str(free_port())
    return {
        "REDIS_URL": redis_url,
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "FIRSTROW_PORT": port,
        "FIRSTROW_URL": f"http://127.0.0.1:{port}",
        "FIRSTROW_STORE": str(folder / "store"),
        "FIRSTROW_SECRET": SECRET,
        "LOG_LEVEL": "DEBUG",
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Served]:
    """The web process of this file."""
    folder = tmp_path_factory.mktemp("serve")
    with start_serve(folder, settings(folder, redis_url)) as url:
        yield Served(url, Board(redis_url), Store(str(folder / "store")), folder / "serve.log")


@pytest.fixture
def served(running: Served) -> Served:
    """The web process, its Redis and store empty."""
    running.board.redis.flushdb()
    running.store.delete_prefix("projects")
    return running


def fill(served: Served, project: int = 22) -> None:
    """What workers leave of a project with two tasks in the coarse stage."""
    here = Project(served.store, project)
    here.save_config(CONFIG, {})
    here.save_index({t: TaskRecord(t, image="a.jpg", size=(32, 24)) for t in (31, 32)})
    halves = np.repeat(np.array([[0, 1]], np.uint8), 12, axis=1).repeat(24, axis=0)
    for task in (31, 32):
        served.store.write_map(here.cluster_key("c1", task), halves)
    state = {"version": "seg-4", "clusters": "c1", "coarse": {str(t): [[0, 0.9], [1, 0.7]] for t in (31, 32)}}
    served.store.write_json(here.key("state.json"), state)
    served.board.set_state(project, state)
    served.board.register(project)


def predict(served: Served, tasks: object, project: str = f"22.{STAMP}") -> requests.Response:
    """`/predict` as Label Studio asks."""
    params = {"login": None, "password": None, "context": None}
    return served.post("/predict", {"tasks": tasks, "project": project, "label_config": CONFIG, "params": params})


def test_first_setup_of_a_project_has_it_looked_at(served: Served) -> None:
    body = {"project": f"22.{STAMP}", "schema": CONFIG, "hostname": "http://localhost:8080", "access_token": TOKEN}
    assert served.post("/setup", body).json() == {"model_version": NO_VERSION}
    assert served.board.projects() == [22]
    assert [job.args for job in served.board.queue("default").jobs] == [[22]]
    assert served.post("/setup", body).ok
    assert len(served.board.queue("default")) == 1
    assert "firstrow attach --project 22" in served.log.read_text()


def test_setup_names_the_version_in_force(served: Served) -> None:
    fill(served)
    assert served.post("/setup", {"project": f"22.{STAMP}"}).json() == {"model_version": "seg-4"}
    served.board.redis.flushdb()  # a Redis that lost everything
    assert served.post("/setup", {"project": f"22.{STAMP}"}).json() == {"model_version": "seg-4"}


def test_predict_serves_what_is_stored_and_nothing_for_bad_tasks(served: Served) -> None:
    fill(served)
    tasks: list[Any] = [{"id": 31}, {"id": 999}, {"data": {}}, None, {"id": "x"}, {"id": None}, {"id": 32}]
    answer = predict(served, tasks)
    assert answer.ok
    results = answer.json()["results"]
    assert [len(result) for result in results] == [1, 0, 0, 0, 0, 0, 1]
    labels = [region["value"]["brushlabels"] for region in results[0][0]["result"]]
    assert sorted(labels) == [["Background"], ["Foreground"]]
    assert "model_version" not in results[0][0]  # another one than /setup's would be stored again at each opening


def test_predict_before_anything_is_ready(served: Served) -> None:
    assert predict(served, [{"id": 31}, {"id": 32}]).json()["results"] == [[], []]
    assert predict(served, []).json()["results"] == []


def test_a_broken_store_costs_prelabels_only(served: Served) -> None:
    fill(served)
    Project(served.store, 22)
    served.store.write(Project(served.store, 22).cluster_key("c1", 31), b"no PNG")
    assert [len(result) for result in predict(served, [{"id": 31}, {"id": 32}]).json()["results"]] == [0, 1]


def test_all_workers_answer_without_a_setup_and_quickly(served: Served) -> None:
    fill(served)
    paths = ["/predict", "/setup"] * 24
    bodies = {"/predict": {"tasks": [{"id": 31}], "project": f"22.{STAMP}"}, "/setup": {"project": f"22.{STAMP}"}}

    def ask(path: str) -> int:
        return served.post(path, bodies[path]).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, paths)) == {200}
    for path, patience in (("/health", 1), ("/setup", 3), ("/versions", 3)):  # as long as Label Studio waits
        for _ in range(20):
            method = "POST" if path in bodies else "GET"
            assert requests.request(method, served.url + path, json=bodies.get(path), timeout=patience).ok


EVENT = {
    "action": "ANNOTATION_CREATED",
    "project": {"id": 22, "label_config": CONFIG},
    "annotation": {"id": 169, "task": 31},
    "task": {"id": 31},
}


def test_webhook_remembers_and_answers_a_job(served: Served) -> None:
    answer = served.post("/webhook", EVENT, SECRET)
    assert (answer.status_code, answer.json()) == (201, {"job": served.board.busy(22)})
    assert str(served.board.busy(22)).startswith("round-22-")
    assert served.board.take(22) == ({31}, set())
    assert served.post("/webhook", {"action": "LABEL_LINK_CREATED"}, SECRET).json() == {"job": None}


def test_webhook_takes_basic_auth_too(served: Served) -> None:
    given = base64.b64encode(f"firstrow:{SECRET}".encode()).decode()
    header = {"Authorization": f"Basic {given}"}
    assert requests.post(served.url + "/webhook", json=EVENT, headers=header, timeout=5).status_code == 201


@pytest.mark.parametrize("secret", [None, "", "wrong", "ÿ", SECRET + "x", SECRET[:-1]])
def test_webhook_without_our_secret_is_refused(served: Served, secret: str | None) -> None:
    for path in ("/webhook", "/train"):
        answer = served.post(path, EVENT, secret)
        assert answer.status_code == 401
        assert "firstrow attach" in answer.json()["error"]
    assert served.board.take(22) == (set(), set())


def test_a_wrong_secret_is_refused_even_where_none_is_needed(served: Served) -> None:
    assert served.post("/setup", {"project": "22.1"}, "wrong").status_code == 401
    assert requests.get(served.url + "/health", headers={SECRET_HEADER: "wrong"}, timeout=5).ok


def test_start_training_and_its_job(served: Served) -> None:
    body = {"action": "START_TRAINING", "project": {"id": 22}}
    job = served.post("/webhook", body, SECRET).json()["job"]
    found = served.post("/job_status", {"job": job}).json()
    assert (found["job"], found["job_status"], found["project"]) == (job, "queued", 22)
    assert served.board.begin(22)
    others: list[object] = ["none", "", "a b", {}, None]
    for other in others:
        assert served.post("/job_status", {"job": other}).json()["job_status"] == "unknown"
    training = requests.get(served.url + "/is_training", params={"project": "22.1"}, timeout=5)
    assert training.json() == {"is_training": True}


def test_versions_by_get_and_post(served: Served) -> None:
    assert requests.get(served.url + "/versions", timeout=5).json() == {"versions": []}
    fill(served)
    assert requests.get(served.url + "/versions", timeout=5).json() == {"versions": ["seg-4"]}
    assert served.post("/versions", {"project": f"22.{STAMP}"}).json()["versions"] == ["seg-4"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/setup", b"{}", 400),
        ("/setup", b'{"project": "field"}', 400),
        ("/setup", b"[1]", 400),
        ("/setup", b"{", 400),
        ("/predict", b'{"project": "22.1"}', 400),
        ("/predict", b'{"project": "22.1", "tasks": {"id": 1}}', 400),
        ("/predict", b'{"tasks": []}', 400),
        ("/webhook", b"{}", 400),
        ("/webhook", b'{"action": 7}', 400),
        ("/webhook", b'{"action": "TASKS_CREATED"}', 400),
        ("/webhook", b"\xff\xfe", 400),
        ("/train", b"{}", 400),
        ("/nothing", b"{}", 404),
        ("/health", b"{}", 405),
    ],
)
def test_faults_are_short_json(served: Served, path: str, body: bytes, status: int) -> None:
    header = {"Content-Type": "application/json", SECRET_HEADER: SECRET}
    answer = requests.post(served.url + path, data=body, headers=header, timeout=5)
    assert answer.status_code == status
    assert isinstance(answer.json(), dict)
    assert "Traceback" not in answer.text
    assert len(answer.text) < 300


def test_other_content_types_are_named(served: Served) -> None:
    answer = requests.post(served.url + "/setup", data=b"x", timeout=5)
    assert (answer.status_code, list(answer.json())) == (415, ["error"])


def test_large_requests_are_taken(served: Served) -> None:
    masks = {"result": [{"value": {"rle": [255] * 8_000_000}}]}  # 30 MB
    answer = served.post("/webhook", {**EVENT, "annotation": {"id": 1, "task": 31, **masks}}, SECRET)
    assert answer.status_code == 201
    assert LARGEST >= 250 << 20


def test_redis_down(tmp_path: Path) -> None:
    given = settings(tmp_path, f"redis://127.0.0.1:{free_port()}")
    store = Store(given["FIRSTROW_STORE"])
    store.write_json(Project(store, 22).key("state.json"), {"version": "seg-4"})
    with start_serve(tmp_path, given) as url:
        served = Served(url, Board(given["REDIS_URL"]), store, tmp_path / "serve.log")
        assert requests.get(url + "/health", timeout=1).ok
        assert served.post("/setup", {"project": "22.1"}).json() == {"model_version": "seg-4"}
        assert served.post("/setup", {"project": "23.1"}).json() == {"model_version": NO_VERSION}
        assert predict(served, [{"id": 1}]).json()["results"] == [[]]
        answer = served.post("/webhook", EVENT, SECRET)
        assert answer.status_code == 503
        assert "Redis" in answer.json()["error"]


def test_nothing_secret_is_logged_at_any_level(served: Served) -> None:
    served.post("/setup", {"project": "22.1", "access_token": TOKEN}, SECRET)
    served.post("/webhook", {**EVENT, "annotation": {"id": 1, "task": 31, "result": "somebody's work"}}, SECRET)
    served.post("/webhook", EVENT, "wrong-secret")
    log = served.log.read_text()
    assert "refused /webhook" in log
    for secret in (SECRET, TOKEN, "somebody's work", "wrong-secret", "0" * 40):
        assert secret not in log


def test_web_process_does_not_load_torch() -> None:
    code = "import backend.app, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_label_studio_itself_reaches_us(
    studio: Studio, label_studio: LabelStudio, tmp_path: Path, redis_url: str
) -> None:
    given = {**settings(tmp_path, redis_url), "LABEL_STUDIO_URL": studio.url, "LABEL_STUDIO_API_KEY": studio.token}
    board, header = Board(redis_url), {"Authorization": f"Token {studio.token}"}
    board.redis.flushdb()
    project = int(label_studio.create_project(title="field", label_config=CONFIG)["id"])
    with start_serve(tmp_path, given):
        attach.apply(attach.plan(label_studio, project, Settings.read(given)))
        assert project in board.projects()  # by /setup
        # While attach works, its own changes come without the secret, which it sets last; it reconciles afterwards.
        before = (tmp_path / "serve.log").read_text().count("refused")
        board.begin(project)
        tasks = f"{studio.url}/api/projects/{project}/import?return_task_ids=true"
        made = requests.post(tasks, json=[{"image": "https://x.test/a.jpg"}], headers=header, timeout=30)
        task = made.json()["task_ids"][0]
        assert board.take(project)[0] == {task}
        board.taken(project)
        url = f"{studio.url}/api/tasks/{task}/annotations/"
        annotation = requests.post(url, json={"result": []}, headers=header, timeout=30).json()["id"]
        assert board.take(project)[0] == {task}
        requests.delete(f"{studio.url}/api/annotations/{annotation}/", headers=header, timeout=30)
        assert board.take(project)[1] == {annotation}
        board.begin(project)
        backend = label_studio.ml_backends(project)[0]["id"]
        assert requests.post(f"{studio.url}/api/ml/{backend}/train", json={}, headers=header, timeout=30).ok
        assert board.begin(project)  # a training was asked for
    assert (tmp_path / "serve.log").read_text().count("refused") == before
