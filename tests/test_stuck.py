"""Clients that send slowly, or not at all, or do not take their answers, cost nobody else anything."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests

from backend.connection import SECRET_HEADER
from backend.embedded import free_port, start_serve
from backend.enqueue import Board
from backend.project import Project, TaskRecord
from backend.secret import project_secret
from backend.store import Store
from backend.web_worker import COMFORTABLE, HEAD_SECONDS, THREADS

MASTER = "s3cret-password"
SECRET = project_secret(MASTER, 22)
#: Of each kind; four times as many as there are threads in all.
CLIENTS = 64
#: More than two processes keep; fewer than the files that a process may open by default.
CROWD = 2 * COMFORTABLE + 100
HEAD = b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
KEY = f"{SECRET_HEADER}: {SECRET}\r\n".encode()
#: What each kind of client sends at first, and what it goes on sending, a piece at a time.
KINDS = {
    "nothing": (b"", b""),
    "no body": (HEAD + b"Content-Length: 1000\r\n\r\n", b""),
    "no body with the secret": (HEAD + KEY + b"Content-Length: 10000000\r\n\r\n", b""),
    "head, a byte at a time": (b"P", b"O"),
    "body, a byte at a time": (HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
    "body with the secret, a byte at a time": (HEAD + KEY + b"Content-Length: 1000\r\n\r\n", b" "),
}
EVENT = {"action": "ANNOTATION_CREATED", "project": {"id": 22}, "task": {"id": 31}}


CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="coarse" toName="image"><Label value="Background"/><Label value="Foreground"/><Label value="Mixed"/>
</BrushLabels><BrushLabels name="seg" toName="image"><Label value="Soil"/><Label value="Crop"/></BrushLabels></View>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the store and the log are."""
    return tmp_path_factory.mktemp("stuck")


@pytest.fixture(scope="module")
def url(folder: Path, redis_url: str) -> Iterator[str]:
    """A web process with its usual number of processes."""
    with start_serve(folder, settings(folder, free_port(), f"{redis_url}/99")) as url:
        yield url


def settings(folder: Path, port: int, redis_url: str) -> dict[str, str]:
    return {
        "REDIS_URL": redis_url,
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "FIRSTROW_PORT": str(port),
        "FIRSTROW_URL": f"http://127.0.0.1:{port}",
        "FIRSTROW_STORE": str(folder / "store"),
        "FIRSTROW_SECRET": MASTER,
    }


@contextmanager
def clients(url: str, begin: bytes, number: int = CLIENTS) -> Iterator[list[socket.socket]]:
    """Connections that have sent a beginning."""
    host, port = url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(number)]
        for connection in made:
            connection.sendall(begin)
        yield made


def answers(url: str) -> float:
    """Ask what Label Studio asks most; returns the seconds that the slower of the two took."""
    began = time.monotonic()
    assert requests.get(f"{url}/health", timeout=10).ok
    between = time.monotonic()
    assert requests.post(f"{url}/webhook", json=EVENT, headers={SECRET_HEADER: SECRET}, timeout=10).status_code == 201
    return max(between - began, time.monotonic() - between)


@pytest.mark.parametrize("kind", KINDS)
def test_others_are_answered(url: str, kind: str) -> None:
    begin, more = KINDS[kind]
    with clients(url, begin) as stuck:
        for _ in range(10):
            for connection in stuck if more else ():
                connection.sendall(more)
            assert answers(url) < 5


def test_more_connections_than_fit_make_room_for_others(url: str) -> None:
    with clients(url, b"P", CROWD):
        for _ in range(10):
            assert answers(url) < 10


def test_a_head_that_does_not_come_is_not_waited_for(url: str) -> None:
    with (
        clients(url, b"POST /webhook HTTP/1.1\r\n", 8) as stuck,
        clients(url, HEAD + b"Content-Length: 9\r\n\r\n", 8) as more,
    ):
        began = time.monotonic()
        for connection in (*stuck, *more):
            connection.settimeout(HEAD_SECONDS + 20)
            assert connection.recv(1) == b""
        assert time.monotonic() - began > HEAD_SECONDS / 2


def test_body_after_a_refusal_is_not_another_request(url: str) -> None:
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with clients(url, HEAD + b"Content-Length: 900000\r\n\r\n" + inner, 1) as [connection]:
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
    ],
)
def test_junk_is_refused_in_short(url: str, junk: bytes) -> None:
    with clients(url, junk, 1) as [connection]:
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.0 431", b"HTTP/1.1 501")
    assert b"Traceback" not in answer
    assert answers(url) < 5


def test_chunks_without_end_are_cut_off(url: str) -> None:
    with clients(url, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", 1) as [connection]:
        with pytest.raises(OSError):  # noqa: PT011  (reset, or broken pipe)
            send_chunks(connection)
        assert answers(url) < 5


def send_chunks(connection: socket.socket) -> None:
    """Send 330 MB without saying so before."""
    for _ in range(10_000):
        connection.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")


def test_answers_that_nobody_takes_occupy_no_thread(url: str, redis_url: str, folder: Path) -> None:
    here = Project(Store(str(folder / "store")), 22)
    here.save_config(CONFIG, {})
    here.save_index({31: TaskRecord(31, image="a.jpg", size=(640, 640))})
    speckled = np.random.default_rng(0).integers(0, 2, (640, 640), np.uint8)  # megabytes of runs
    here.store.write_map(here.cluster_key("c1", 31), speckled)
    state = {"version": "seg-4", "clusters": "c1", "coarse": {"31": [[0, 0.9], [1, 0.7]]}}
    Board(f"{redis_url}/99").set_state(22, state)
    body = b'{"project": "22.1", "tasks": [{"id": 31}]}'
    head = HEAD.replace(b"/webhook", b"/predict") + KEY
    with clients(url, head + b"Content-Length: %d\r\n\r\n" % len(body) + body, 2 * THREADS + 8) as waiting:
        assert len(waiting[0].recv(1)) == 1
        time.sleep(1)  # most of them have been answered by now, into files
        assert answers(url) < 10
        assert answers(url) < 10
