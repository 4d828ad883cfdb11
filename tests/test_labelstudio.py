"""Every call that we make, on a real Label Studio."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import requests
from PIL import Image

from backend.embedded import Studio
from backend.errors import LabelStudioError, RoundOver
from backend.labelstudio import LabelStudio
from backend.transport import TRIES, Transport, asking, lifetime

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="seg" toName="image"><Label value="Soil"/><Label value="Crop"/></BrushLabels>
</View>"""
REGION = {
    "id": "r1",
    "from_name": "seg",
    "to_name": "image",
    "type": "brushlabels",
    "original_width": 4,
    "original_height": 2,
    "image_rotation": 0,
    "value": {"format": "rle", "rle": [0, 0, 0, 32], "brushlabels": ["Crop"]},
}


@pytest.fixture
def door(label_studio: LabelStudio) -> LabelStudio:
    return label_studio


@pytest.fixture
def project(door: LabelStudio) -> Iterator[int]:
    made = door.create_project("door", CONFIG, sampling="Uncertainty sampling")["id"]
    yield made
    door.delete_project(made)


@pytest.fixture
def tasks(door: LabelStudio, project: int) -> list[int]:
    return door.import_tasks(project, [{"image": f"/data/{n}.jpg"} for n in range(5)])


def test_release_and_user(door: LabelStudio) -> None:
    assert door.version().split(".")[0].isdigit()
    assert "@" in door.whoami()["email"]


def test_project_settings(door: LabelStudio, project: int) -> None:
    door.patch_project(project, sampling="Sequential sampling")
    assert door.project(project)["sampling"] == "Sequential sampling"
    assert door.project(project)["label_config"] == CONFIG


def test_listing_is_complete_and_light(door: LabelStudio, project: int) -> None:
    assert list(door.tasks(project)) == []
    many = door.import_tasks(project, [{"image": f"/data/{n}.jpg"} for n in range(1100)])
    rows = list(door.tasks(project))
    assert [row["id"] for row in rows] == many
    assert rows[7]["data"] == {"image": "/data/7.jpg"}
    assert rows[7]["total_annotations"] == 0
    assert "predictions" not in rows[7]


def test_upload_and_download(door: LabelStudio, project: int, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (4, 2), "green").save(file)
    [task] = door.upload(project, [file])
    path = door.task(task, project)["data"]["image"]
    assert path.startswith("/data/upload/")
    assert door.download(path, 10_000) == file.read_bytes()


def test_annotations_come_and_go(door: LabelStudio, project: int, tasks: list[int]) -> None:
    before = max(row["updated_at"] for row in door.tasks(project))
    made = door.create_annotation(tasks[1], [REGION], completed_by=door.whoami()["id"])
    [seen] = door.task(tasks[1], project)["annotations"]
    assert seen["result"][0]["value"]["rle"] == [0, 0, 0, 32]
    assert seen["completed_by"] == door.whoami()["id"]
    assert [row["id"] for row in door.changed_since(project, before)] == [tasks[1]]
    again = max(row["updated_at"] for row in door.tasks(project))
    door.update_annotation(made["id"], [])
    assert door.task(tasks[1], project)["annotations"][0]["result"] == []
    door.delete_annotation(made["id"])
    door.delete_annotation(made["id"])  # safe to repeat
    assert door.task(tasks[1], project)["annotations"] == []
    assert [row["id"] for row in door.changed_since(project, again)] == [tasks[1]]  # a deletion is a change


def test_order_of_next_task(door: LabelStudio, project: int, tasks: list[int]) -> None:
    order = [tasks[i] for i in (3, 0, 4, 2, 1)]
    rows = [{"task": t, "result": [], "score": n / 5, "model_version": "rank-1"} for n, t in enumerate(order)]
    assert door.import_predictions(project, rows) == 5
    door.patch_project(project, model_version="rank-1")
    served = []
    while task := door.next_task(project):
        served.append(task["id"])
        door.create_annotation(task["id"], [])
    assert served == order


def test_import_says_how_many_were_kept(door: LabelStudio, project: int, tasks: list[int]) -> None:
    rows = [
        {"task": t, "result": [], "score": s, "model_version": "rank-1"} for t, s in zip(tasks, (0, 7), strict=False)
    ]
    assert door.import_predictions(project, rows) == 1


def test_predictions_by_version(door: LabelStudio, project: int, tasks: list[int]) -> None:
    rows = [{"task": t, "result": [], "score": 0.5, "model_version": "rank-1"} for t in tasks]
    door.import_predictions(project, rows)
    copy = door.create_prediction(tasks[2], [REGION], "coarse-labels", score=0.25)
    assert door.versions(project) == {"rank-1": 5, "coarse-labels": 1}
    assert door.tasks_with_version(project, "coarse-labels") == {tasks[2]}
    assert door.tasks_with_version(project, "coarse") == set()
    assert {p["id"]: p["score"] for p in door.predictions(tasks[2])}[copy] == 0.25
    full = list(door.full_tasks(project, [tasks[2], tasks[0], 10**9]))
    assert {task["id"]: len(task["predictions"]) for task in full} == {tasks[2]: 2, tasks[0]: 1}
    door.delete_prediction(copy)
    door.delete_prediction(copy)
    assert door.versions(project) == {"rank-1": 5}


def test_deleting_a_version_keeps_the_one_in_force(door: LabelStudio, project: int, tasks: list[int]) -> None:
    for version in ("rank-1", "rank-2"):
        rows = [{"task": t, "result": [], "score": 0.5, "model_version": version} for t in tasks]
        door.import_predictions(project, rows)
    door.patch_project(project, model_version="rank-2")
    door.delete_version(project, "rank-1")
    assert door.versions(project) == {"rank-2": 5}
    assert door.project(project)["model_version"] == "rank-2"


def test_webhooks_and_tabs(door: LabelStudio, project: int) -> None:
    hook = door.create_webhook(project, "http://localhost:1/webhook", {"a": "b"})
    door.patch_webhook(hook["id"], url=hook["url"], headers={"c": "d"})
    assert [h["headers"] for h in door.webhooks(project)] == [{"c": "d"}]
    door.delete_webhook(hook["id"])
    assert door.webhooks(project) == []
    made = [door.create_view(project, {"title": t, "ordering": ["tasks:id"]})["id"] for t in ("one", "two")]
    door.order_views(project, made[::-1])
    assert [view["id"] for view in door.views(project)] == made[::-1]
    door.delete_view(made[0])
    assert [view["data"]["ordering"] for view in door.views(project)] == [["tasks:id"]]
    assert "predictions_score" in {column["id"] for column in door.columns(project)}


def test_what_is_gone_has_status_404(door: LabelStudio, project: int) -> None:
    with pytest.raises(LabelStudioError, match="task 999999999 of project") as error:
        door.task(999_999_999, project)
    assert error.value.status == 404
    with pytest.raises(LabelStudioError, match="answered GET /api/projects/999999999/ with 404") as error:
        door.project(999_999_999)
    assert error.value.status == 404


def test_faults_of_a_request_are_passed_on(door: LabelStudio, project: int) -> None:
    with pytest.raises(LabelStudioError, match="400: Couldn't find end of Start Tag Broken") as error:
        door.patch_project(project, label_config="<View><Broken")
    assert error.value.status == 400


def test_wrong_key_says_what_to_set(studio: Studio) -> None:
    with pytest.raises(LabelStudioError, match=r"refuses our key .* set LABEL_STUDIO_API_KEY") as error:
        LabelStudio(studio.url, "wrong").whoami()
    assert error.value.status == 401
    assert "wrong:" not in str(error.value)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(LabelStudioError, match=f"{url} does not answer .* set LABEL_STUDIO_URL") as error:
        LabelStudio(url, "key").version()
    assert error.value.status is None


class Shaky(BaseHTTPRequestHandler):
    """Answers with the statuses it is told to, one after the other, and 200 from then on; with none at 0."""

    statuses: ClassVar[list[int]] = []
    asked: ClassVar[list[str]] = []

    def answer(self) -> None:
        """Answer any request."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(self.command)
        status = self.statuses.pop(0) if self.statuses else 200
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Retry-After", "0")
        said = b'{"access": "a"}' if "token" in self.path else b"{}"
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815  (names of http.server)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def shaky() -> Iterator[Transport]:
    """A transport to a server that fails."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Shaky.asked.clear()
    yield Transport(f"http://127.0.0.1:{server.server_port}", "key")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "POST"])
def test_what_may_be_repeated_is(shaky: Transport, method: str, status: int) -> None:
    Shaky.statuses[:] = [status, status]
    repeated = method != "POST" or status == 429
    if repeated:
        assert shaky.call(method, "/x", body={}) == {}
    else:
        with pytest.raises(LabelStudioError, match=str(status)):
            shaky.call(method, "/x", body={})
    assert Shaky.asked == [method] * (3 if repeated else 1), "what makes something new is never sent twice"


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "POST"])
def test_whether_something_may_still_be_changed_is_asked_before_each_try(shaky: Transport, method: str) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(len(Shaky.asked))
        if len(asked) == 2:
            raise RoundOver("stopped")

    Shaky.statuses[:] = [429]
    if method == "GET":
        with asking(check):
            assert shaky.call(method, "/x") == {}
        assert asked == []
        return
    with asking(check), pytest.raises(RoundOver):
        shaky.call(method, "/x", body={})
    assert asked == [0, 1], "before the first and before the second"
    assert Shaky.asked == [method]
    shaky.call(method, "/x", body={})
    assert len(asked) == 2, "nobody else is asked"


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "POST"])
def test_a_lost_answer_is_asked_for_again_unless_something_new_was_made(shaky: Transport, method: str) -> None:
    Shaky.statuses[:] = [0]
    if method == "POST":
        with pytest.raises(LabelStudioError, match="does not answer"):
            shaky.call(method, "/x", body={})
    else:
        assert shaky.call(method, "/x", body={}) == {}
    assert Shaky.asked == [method] * (1 if method == "POST" else 2)


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE", "POST"])
def test_what_met_nobody_is_sent_again(method: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    servers: list[ThreadingHTTPServer] = []

    class Refused(logging.Handler):
        """Starts Label Studio as soon as a request has met nobody."""

        def emit(self, record: logging.LogRecord) -> None:
            """One try has failed."""
            servers.append(ThreadingHTTPServer(address, Shaky))
            threading.Thread(target=servers[0].serve_forever, daemon=True).start()

    tries, handler = logging.getLogger("urllib3.connectionpool"), Refused(logging.WARNING)
    caplog.set_level(logging.WARNING, tries.name)
    Shaky.statuses.clear()
    Shaky.asked.clear()
    tries.addHandler(handler)
    try:
        assert Transport(f"http://127.0.0.1:{address[1]}", "key").call(method, "/x", body={}) == {}
    finally:
        tries.removeHandler(handler)
        for server in servers:
            server.shutdown()
            server.server_close()
    assert (Shaky.asked, len(servers)) == ([method], 1)


def test_a_fault_that_stays_is_told(shaky: Transport) -> None:
    Shaky.statuses[:] = [500] * 50
    with pytest.raises(LabelStudioError, match="500") as error:
        shaky.call("PATCH", "/x", body={})
    assert error.value.status == 500
    assert len(Shaky.asked) == TRIES + 1


def test_a_token_is_asked_for_again(shaky: Transport) -> None:
    door = Transport(shaky.url, "eyJ.eyJ.x")
    Shaky.statuses[:] = [503, 500]
    assert door.credentials.header() == "Bearer a"
    assert Shaky.asked == ["POST"] * 3


@pytest.mark.parametrize("key", ["key", "eyJ.eyJ.x"])
def test_who_cannot_wait_asks_once_and_not_for_long(key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        door = Transport(f"http://127.0.0.1:{silent.getsockname()[1]}", key, timeout=(0.2, 0.2), tries=0)
        with pytest.raises(LabelStudioError, match="does not answer"):
            door.call("GET", "/x")
        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_a_page_instead_of_json(door: LabelStudio) -> None:
    with pytest.raises(LabelStudioError, match="is LABEL_STUDIO_URL the address of Label Studio itself"):
        door.http.call("GET", "/user/login/")


def test_personal_access_token(studio: Studio, door: LabelStudio) -> None:
    token = personal_access_token(studio)
    other = LabelStudio(studio.url, token)
    assert other.whoami()["id"] == door.whoami()["id"]
    first = other.http.credentials.access
    assert first != token
    assert lifetime(first) == pytest.approx(300, abs=1)
    other.http.credentials.renew_at = 0  # as after four minutes
    assert other.whoami()["id"] == door.whoami()["id"]
    assert other.http.credentials.access != first


def personal_access_token(studio: Studio) -> str:
    """Make one as a person does in the browser; Label Studio allows one at a time."""
    with requests.Session() as browser:
        browser.get(f"{studio.url}/user/login/", timeout=10)
        form = {
            "email": studio.username,
            "password": studio.password,
            "csrfmiddlewaretoken": browser.cookies["csrftoken"],
        }
        browser.post(f"{studio.url}/user/login/", data=form, headers={"Referer": studio.url}, timeout=10)
        head = {"X-CSRFToken": browser.cookies["csrftoken"], "Referer": studio.url}
        wanted = {"legacy_api_tokens_enabled": True, "api_tokens_enabled": True}
        browser.post(f"{studio.url}/api/jwt/settings", json=wanted, headers=head, timeout=10)
        return str(browser.post(f"{studio.url}/api/token/", headers=head, timeout=10).json()["token"])
