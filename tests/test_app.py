"""Real gunicorn with several workers on a real Redis, asked as Label Studio asks."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from werkzeug.exceptions import ServiceUnavailable

from backend import attach
from backend.admission import LARGEST, REFUSED, WITH
from backend.app import Manager
from backend.coarse_answers import digest
from backend.connection import SECRET_HEADER
from backend.context import connect
from backend.embedded import Studio, free_port, start_serve
from backend.enqueue import Board
from backend.labelstudio import LabelStudio
from backend.plugin import CHUNK, NO_VERSION
from backend.project import Project, TaskRecord
from backend.secret import project_secret
from backend.settings import Settings
from backend.store import Store

MASTER = "s3cret-password"
SECRET = project_secret(MASTER, 22)
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
        "FIRSTROW_SECRET": MASTER,
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
    state = {
        "version": "seg-4",
        "clusters": "c1",
        "coarse": {str(t): [["Background", 0.9], ["Foreground", 0.7]] for t in (31, 32)},
    }
    served.store.write_json(here.key("state.json"), state)
    served.board.set_state(project, state)
    served.board.register(project)


def predict(served: Served, tasks: object, project: str = f"22.{STAMP}") -> requests.Response:
    """`/predict` as Label Studio asks."""
    params = {"login": None, "password": None, "context": None}
    body = {"tasks": tasks, "project": project, "label_config": CONFIG, "params": params}
    return served.post("/predict", body, SECRET)


def get(served: Served, path: str, secret: str | None = SECRET, **params: str) -> requests.Response:
    """GET with Basic auth, as Label Studio does."""
    auth = None if secret is None else ("firstrow", secret)
    return requests.get(served.url + path, params=params, auth=auth, timeout=5)


def test_a_project_is_not_remembered_before_label_studio_confirms_it(served: Served) -> None:
    body = {"project": f"22.{STAMP}", "schema": CONFIG, "hostname": "http://localhost:8080", "access_token": TOKEN}
    for secret in (None, SECRET):
        assert served.post("/setup", body, secret).json() == {"model_version": NO_VERSION}
    for number in range(1000, 1100):
        assert served.post("/setup", {"project": f"{number}.{STAMP}"}).ok
    assert served.board.projects() == []
    assert len(served.board.queue("default")) == 0


def test_setup_names_the_version_in_force(served: Served) -> None:
    fill(served)
    assert served.post("/setup", {"project": f"22.{STAMP}"}, SECRET).json() == {"model_version": "seg-4"}
    served.board.redis.flushdb()  # a Redis that lost everything
    assert served.post("/setup", {"project": f"22.{STAMP}"}, SECRET).json() == {"model_version": "seg-4"}


def test_without_a_secret_nothing_of_a_project_is_told(served: Served) -> None:
    fill(served)
    setup = {"project": f"22.{STAMP}"}
    predict = {**setup, "tasks": [{"id": 31}, {"id": 32}]}
    for _ in range(2):  # as Label Studio's own settings page connects, before `attach`
        assert served.post("/setup", setup).json() == {"model_version": NO_VERSION}
        assert served.post("/predict", predict).json() == {"results": [[], []], "model_version": NO_VERSION}
    assert served.post("/setup", setup, SECRET).ok  # as Label Studio does when `attach` connects
    for path, body in (("/setup", setup), ("/predict", predict)):
        assert served.post(path, body).status_code == 401
    for path in ("/versions", "/job_status", "/is_training", "/metrics"):
        assert get(served, path, None).status_code == 401


def test_the_secret_of_a_project_is_worth_nothing_beyond_it(served: Served) -> None:
    fill(served)
    other = project_secret(MASTER, 8)
    bodies = {
        "/webhook": EVENT,
        "/setup": {"project": f"22.{STAMP}"},
        "/predict": {"project": f"22.{STAMP}", "tasks": [{"id": 31}]},
        "/versions": {"project": f"22.{STAMP}"},
    }
    for path, body in bodies.items():
        for project in (22, "22", f"22.{STAMP}", {"id": 22}):
            assert served.post(path, {**body, "project": project}, other).status_code == 403, path
    assert served.board.take(22) == (set(), set())
    assert get(served, "/is_training", other, project="22").status_code == 403
    assert get(served, "/versions", other).json() == {"versions": [NO_VERSION]}
    job = served.post("/webhook", {"action": "START_TRAINING", "project": {"id": 22}}, SECRET).json()["job"]
    assert served.post("/job_status", {"job": job}, other).json() == {"job": job, "job_status": "unknown"}
    assert served.post("/job_status", {"job": job}, SECRET).json()["job_status"] == "queued"


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
    auth = ("firstrow", SECRET)

    def ask(path: str) -> int:
        return served.post(path, bodies[path], SECRET).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, paths)) == {200}
    for path, patience in (("/health", 1), ("/setup", 3), ("/versions", 3)):  # as long as Label Studio waits
        for _ in range(20):
            method = "POST" if path in bodies else "GET"
            assert requests.request(method, served.url + path, json=bodies.get(path), timeout=patience, auth=auth).ok


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


WRONG = ["", "wrong", "ÿ", MASTER, SECRET + "x", SECRET[:-1], "0" + SECRET, SECRET.replace("22-", "8-"), "9" * 5000]


@pytest.mark.parametrize("secret", [None, *WRONG])
def test_webhook_without_our_secret_is_refused(served: Served, secret: str | None) -> None:
    for path in ("/webhook", "/train"):
        answer = served.post(path, EVENT, secret)
        assert answer.status_code == 401
        assert "firstrow attach" in answer.json()["error"]
    assert served.board.take(22) == (set(), set())


@pytest.mark.parametrize(
    "junk", ["Basic", "Basic !", "Basic /w==", "Bearer x", "Digest a=b, c", "ÿ", "Basic eDp5", '"']
)
def test_junk_for_credentials_is_refused(served: Served, junk: str) -> None:
    for path in ("/webhook", "/setup", "/predict"):
        header = {"Authorization": junk.encode("latin-1")}
        assert requests.post(served.url + path, json=EVENT, headers=header, timeout=5).status_code == 401


def test_a_wrong_secret_is_refused_even_where_none_is_needed(served: Served) -> None:
    assert served.post("/setup", {"project": "22.1"}, "wrong").status_code == 401
    assert requests.get(served.url + "/health", headers={SECRET_HEADER: "wrong"}, timeout=5).ok


def test_start_training_and_its_job(served: Served) -> None:
    body = {"action": "START_TRAINING", "project": {"id": 22}}
    job = served.post("/webhook", body, SECRET).json()["job"]
    found = served.post("/job_status", {"job": job}, SECRET).json()
    assert (found["job"], found["job_status"], found["project"]) == (job, "queued", 22)
    assert served.board.begin(22)
    others: list[object] = ["none", "", "a b", {}, None]
    for other in others:
        assert served.post("/job_status", {"job": other}, SECRET).json()["job_status"] == "unknown"
    assert get(served, "/is_training", project="22.1").json() == {"is_training": True}


def test_versions_by_get_and_post(served: Served) -> None:
    assert get(served, "/versions").json() == {"versions": [NO_VERSION]}
    fill(served)
    assert get(served, "/versions").json() == {"versions": ["seg-4"]}
    assert served.post("/versions", {"project": f"22.{STAMP}"}, SECRET).json()["versions"] == ["seg-4"]


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
        ("/webhook", b"[" * 100_000, 400),
        ("/webhook", b'{"action": "START_TRAINING", "project": ' + b"9" * 5000 + b"}", 400),
        ("/webhook", b'{"action": "START_TRAINING", "project": -22}', 400),
        ("/webhook", b'{"action": "START_TRAINING", "project": 22.0}', 400),
        ("/predict", b'{"project": "22.1", "tasks": [1, "x"]}', 400),
        ("/predict", b'{"project": "22.1", "tasks": [' + b"{}," * 250_000 + b"{}]}", 400),
        ("/setup", b'{"project": "22.1", "schema": "' + b"x" * (9 << 20) + b'"}', 413),
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


def test_our_own_update_is_known_by_its_regions(served: Served) -> None:
    fill(served)
    regions = [{"id": "cl3", "value": {"rle": [1, 2, 3], "brushlabels": ["Bäume"]}, "score": 0.25}]
    annotation = {"id": 169, "task": 31, "completed_by": 1, "was_cancelled": True, "result": regions}
    body = {"action": "ANNOTATION_UPDATED", "project": {"id": 22}, "task": {"id": 31}, "annotation": annotation}
    served.board.expect_own_update(22, 169, digest(annotation), "2026-11-25T20:00:00Z")
    assert served.post("/webhook", body, SECRET).json()["job"] is None
    theirs = [*regions, {"id": "drawn"}]
    assert served.post("/webhook", {**body, "annotation": {**annotation, "result": theirs}}, SECRET).json()["job"]
    missed = served.board.missed_update(22, 169)
    assert missed is not None
    assert missed["result"] == theirs


def test_large_requests_are_taken(served: Served) -> None:
    masks = {"result": [{"value": {"rle": [255] * 8_000_000}}]}  # 30 MB
    answer = served.post("/webhook", {**EVENT, "annotation": {"id": 1, "task": 31, **masks}}, SECRET)
    assert answer.status_code == 201
    assert LARGEST >= 250 << 20


def test_few_requests_for_many_tasks_are_answered_at_once(tmp_path: Path, redis_url: str) -> None:
    manager = Manager(connect(Settings.read(settings(tmp_path, redis_url))))
    with manager._place(CHUNK + 1), manager._place(CHUNK + 1):
        with pytest.raises(ServiceUnavailable, match="ask again"), manager._place(CHUNK + 1):
            pass
        with manager._place(CHUNK), manager._place(1):  # as Label Studio asks for the task that it serves
            pass
    with manager._place(CHUNK + 1):
        pass


def test_what_is_too_large_is_refused_unread(served: Served) -> None:
    for path, secret, size, status in (
        ("/webhook", None, REFUSED + 1, 401),
        ("/webhook", "wrong", 200 << 20, 401),
        ("/predict", None, 200 << 20, 413),
        ("/webhook", SECRET, WITH["/webhook"] + 1, 413),
        ("/nothing", None, 1 << 60, 401),
    ):
        began = time.monotonic()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
        head += f"{SECRET_HEADER}: {secret}\r\n" if secret else ""
        with talk(served.url, head.encode() + b"\r\n") as answer:
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert time.monotonic() - began < 5


@contextmanager
def talk(url: str, sent: bytes) -> Iterator[bytes]:
    """What is answered to these bytes, until the other side closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        yield b"".join(iter(lambda: connection.recv(1 << 16), b""))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_redis_down(tmp_path: Path) -> None:
    given = settings(tmp_path, f"redis://127.0.0.1:{free_port()}")
    store = Store(given["FIRSTROW_STORE"])
    store.write_json(Project(store, 22).key("state.json"), {"version": "seg-4"})
    with start_serve(tmp_path, given) as url:
        served = Served(url, Board(given["REDIS_URL"]), store, tmp_path / "serve.log")
        assert requests.get(url + "/health", timeout=1).ok
        assert served.post("/setup", {"project": "22.1"}, SECRET).json() == {"model_version": "seg-4"}
        assert served.post("/setup", {"project": "23.1"}, project_secret(MASTER, 23)).json() == {
            "model_version": NO_VERSION
        }
        assert served.post("/setup", {"project": "22.1"}).json() == {"model_version": NO_VERSION}
        assert predict(served, [{"id": 1}]).json()["results"] == [[]]
        answer = served.post("/webhook", EVENT, SECRET)
        assert answer.status_code == 503
        assert "Redis" in answer.json()["error"]


def test_nothing_secret_is_logged_at_any_level(served: Served) -> None:
    served.post("/setup", {"project": "22.1", "access_token": TOKEN}, SECRET)
    served.post("/webhook", {**EVENT, "annotation": {"id": 1, "task": 31, "result": "somebody's work"}}, SECRET)
    served.post("/webhook", EVENT, "wrong-secret")
    log = served.log.read_text()
    assert "refused '/webhook'" in log
    for secret in (MASTER, SECRET, TOKEN, "somebody's work", "wrong-secret", "0" * 40):
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
        wait_for(lambda: project in board.projects())  # by /setup, confirmed by Label Studio
        board.taken(project)
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
