"""Images of tasks: uploads, local files, cloud storage and the web, from a real Label Studio and a small web server."""

from __future__ import annotations

import io
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backend.download import Download
from backend.errors import ImageFetchError, LabelStudioError
from backend.faults import due, in_turn, with_error
from backend.images import FOLDERS, PATIENCE, ImageCache, check_host, fetch, prune, served_path, write
from backend.labelstudio import LabelStudio
from backend.project import TaskRecord

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="seg" toName="image"><Label value="Soil"/></BrushLabels>
</View>"""
Answer = tuple[int, dict[str, str], bytes]


class Site:
    """A small web server: `pages` maps a path (without query) to its answer; `seen` lists what was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, Answer] = {}
        self.seen: list[tuple[str, str | None]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append((self.path, self.headers.get("Authorization")))
                status, headers, body = site.pages.get(self.path.partition("?")[0], (404, {}, b""))
                if not status:  # hangs up
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815  (the name that http.server looks for)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.stop()


@pytest.fixture
def door(label_studio: LabelStudio) -> LabelStudio:
    return label_studio


@pytest.fixture
def project(door: LabelStudio) -> Iterator[int]:
    made = door.create_project("images", CONFIG)["id"]
    yield made
    door.delete_project(made)


@pytest.fixture
def cache(door: LabelStudio, tmp_path: Path) -> Callable[..., ImageCache]:
    def make(*hosts: str, limit: int = 10**9, size: int = 32) -> ImageCache:
        return ImageCache(tmp_path / "cache", limit, door, size, hosts)

    return make


def picture(width: int = 64, height: int = 48, seed: int = 0, **how: Any) -> bytes:
    """A smooth picture, so that JPEG changes it little."""
    y, x = np.mgrid[:height, :width]
    bands = [(x * 3 + seed) % 256, (y * 4) % 256, (x + y + seed) % 256]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(bands, -1).astype(np.uint8)).save(buffer, how.pop("format", "PNG"), **how)
    return buffer.getvalue()


def test_upload(door: LabelStudio, project: int, cache: Callable[..., ImageCache], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    [task] = door.upload(project, [tmp_path / "a.png"])
    value = door.task(task, project)["data"]["image"]
    first, size = cache().get(project, task, value)
    assert (first.shape, first.dtype, size) == ((24, 32, 3), np.uint8, (64, 48))
    revoked = LabelStudio(door.url, "revoked")
    again, size = ImageCache(tmp_path / "cache", 10**9, revoked, 32).get(project, task, value)  # the stored copy
    assert size == (64, 48)
    np.testing.assert_array_equal(first, again)
    with pytest.raises(LabelStudioError, match="refuses our key"):  # not a fault of the image
        ImageCache(tmp_path / "other", 10**9, revoked, 32).get(project, task, value)


def test_rotated_photograph(site: Site, cache: Callable[..., ImageCache]) -> None:
    turned = Image.Exif()
    turned[274] = 6
    site.pages["/a.jpg"] = (200, {}, picture(64, 48, format="JPEG", exif=turned))
    image, size = cache(site.host).get(1, 1, f"http://{site.host}/a.jpg")
    assert (image.shape, size) == ((32, 24, 3), (48, 64))


def test_local_files(door: LabelStudio, project: int, cache: Callable[..., ImageCache], services_folder: Path) -> None:
    folder = services_folder / "sub"
    folder.mkdir(exist_ok=True)
    (folder / "b c.png").write_bytes(picture())
    storage = {"project": project, "path": str(folder), "use_blob_urls": True, "title": "local"}
    made = door.http.call("POST", "/api/storages/localfiles/", body=storage)
    door.http.call("POST", f"/api/storages/localfiles/{made['id']}/sync", body={})
    [task] = door.tasks(project)
    assert task["data"]["image"].startswith("/data/local-files/?d=")
    assert cache().get(project, task["id"], task["data"]["image"])[1] == (64, 48)
    with pytest.raises(ImageFetchError, match=f"task {task['id']}, image '/data/local-files/.d=sub/no.png'"):
        cache().get(project, task["id"], "/data/local-files/?d=sub/no.png")


def test_a_file_that_label_studio_answers_with_500_is_that_files_fault(
    door: LabelStudio, project: int, cache: Callable[..., ImageCache]
) -> None:
    with pytest.raises(ImageFetchError, match=r"task 7, image '/data/local-files/\?d=a%2F.*answers 500 when asked"):
        cache().get(project, 7, "/data/local-files/?d=a%2F..%2F..%2Fx.png")
    with pytest.raises(LabelStudioError, match="does not answer"):  # nobody is there at all: no file's fault
        fetch(LabelStudio("http://127.0.0.1:1", "key"), 7, "/data/upload/1/a.png")


def test_cloud_storage(door: LabelStudio, project: int, site: Site, cache: Callable[..., ImageCache]) -> None:
    site.pages["/bucket"] = site.pages["/bucket/"] = (200, {"Content-Type": "application/xml"}, LISTING)
    site.pages["/bucket/field/d.png"] = (200, {}, picture())
    storage = {
        "project": project,
        "bucket": "bucket",
        "s3_endpoint": f"http://{site.host}",
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "region_name": "us-east-1",
        "use_blob_urls": True,
        "presign": True,
    }
    door.http.call("POST", "/api/storages/s3/", body=storage)
    [task] = door.import_tasks(project, [{"image": "s3://bucket/field/d.png"}])
    assert door.task(task, project)["data"]["image"] == "s3://bucket/field/d.png"
    with pytest.raises(ImageFetchError, match="put the address itself into FIRSTROW_ALLOWED_HOSTS"):
        cache().get(project, task, "s3://bucket/field/d.png")
    assert not [path for path, _ in site.seen if path.startswith("/bucket/field")]
    _, size = cache(site.host).get(project, task, "s3://bucket/field/d.png")
    assert size == (64, 48)
    path, authorization = site.seen[-1]
    assert "X-Amz-Signature" in path or "Signature=" in path
    assert authorization is None  # our key stays with Label Studio
    with pytest.raises(ImageFetchError, match="answers 404") as caught:
        cache(site.host).get(project, task, "s3://bucket/field/gone.png")
    assert "Signature" not in str(caught.value)
    with pytest.raises(ImageFetchError, match="answers 404"):
        cache().get(project, task, "gs://nowhere/d.png")


LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
    b"<KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    b"<Contents><Key>field/d.png</Key><Size>1</Size></Contents></ListBucketResult>"
)


def test_web_hosts_must_be_allowed(site: Site, cache: Callable[..., ImageCache]) -> None:
    site.pages["/a%20b.png"] = (200, {}, picture())
    value = f"http://{site.host}/a b.png"
    with pytest.raises(ImageFetchError, match=f"host '{site.host}' is not allowed: add it to FIRSTROW_ALLOWED_HOSTS"):
        cache("example.com").get(1, 7, value)
    assert site.seen == []
    assert cache("127.0.0.1").get(1, 7, value)[1] == (64, 48)  # a host without a port allows every port


def test_redirects_stay_among_allowed_hosts(site: Site, door: LabelStudio) -> None:
    inner = Site()
    try:
        inner.pages["/secret"] = (200, {}, b"inner")
        site.pages["/a"] = (302, {"Location": f"http://{inner.host}/secret"}, b"")
        with pytest.raises(ImageFetchError, match=f"host '{inner.host}' is not allowed"):
            fetch(door, 1, f"http://{site.host}/a", {site.host})
        assert inner.seen == []
        assert fetch(door, 1, f"http://{site.host}/a", {site.host, inner.host}) == b"inner"
    finally:
        inner.stop()
    site.pages["/loop"] = (302, {"Location": "/loop"}, b"")
    with pytest.raises(ImageFetchError, match="more than 3 redirects"):
        fetch(door, 1, f"http://{site.host}/loop", {site.host})


@pytest.mark.parametrize(
    ("host", "address", "hosts", "good"),
    [
        ("cdn.example.com", "1.1.1.1", (), True),
        ("cdn.example.com", "2606:4700::1111", (), True),
        ("minio.local", "10.1.2.3", (), False),
        ("minio.local", "10.1.2.3", ("minio.local:9000",), True),
        ("minio.local", "10.1.2.3", ("minio.local:9001",), False),
        ("minio.local", "10.1.2.3", ("minio.local",), True),
        ("minio.local", "127.0.0.1", ("minio.local",), False),
        ("minio.local", "127.0.0.1", ("minio.local", "127.0.0.1:9000"), True),
        ("localhost", "127.0.0.1", ("localhost",), True),
        ("minio.local", "169.254.169.254", ("minio.local",), False),
        ("169.254.169.254", "169.254.169.254", ("169.254.169.254",), True),
        ("minio.local", "fe80::1%eth0", ("minio.local",), False),
        ("minio.local", "::1", ("minio.local",), False),
        ("minio.local", "::ffff:127.0.0.1", ("minio.local",), False),
        ("cdn.example.com", "::ffff:10.0.0.1", (), False),
        ("cdn.example.com", "64:ff9b::10.0.0.1", (), False),
        ("cdn.example.com", "2002:7f00:1::", (), False),
        ("cdn.example.com", "0.0.0.0", ("cdn.example.com",), False),
        ("cdn.example.com", "100.64.0.1", (), False),
        ("[::1]", "::1", ("[::1]:9000",), True),
    ],
)
def test_which_addresses_may_be_reached(host: str, address: str, hosts: tuple[str, ...], good: bool) -> None:
    download = Download(hosts)
    if good:
        download.check(host, 9000, address)
    else:
        with pytest.raises(ImageFetchError, match="FIRSTROW_ALLOWED_HOSTS"):
            download.check(host, 9000, address)


def test_a_name_that_turns_to_an_inner_address_reaches_nothing(
    site: Site, door: LabelStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, real, asked = site.server.server_port, socket.getaddrinfo, []

    def rebinding(host: str, *args: Any, **more: Any) -> Any:  # a name server of an attacker: public at first
        if host != "evil.example.com":
            return real(host, *args, **more)
        asked.append(host)
        place = ("8.8.8.8" if len(asked) == 1 else "127.0.0.1", port)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place)]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert socket.getaddrinfo("evil.example.com", port)[0][4][0] == "8.8.8.8"
    site.pages["/a.png"] = (200, {}, picture())
    with pytest.raises(ImageFetchError, match=r"has the address 127\.0\.0\.1"):
        fetch(door, 1, f"http://evil.example.com:{port}/a.png", {f"evil.example.com:{port}"})
    assert site.seen == []


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_a_trickle_is_cut_off(start: bytes, door: LabelStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.download.SLOWEST", 1.0)
    with trickling(start) as port:
        began = time.monotonic()
        with pytest.raises(ImageFetchError, match="did not send the whole file within 1 s"):
            fetch(door, 1, f"http://127.0.0.1:{port}/a.png", {"127.0.0.1"})
        assert time.monotonic() - began < 8  # the trickle lasts 20 s


def test_a_trickle_of_label_studio_is_cut_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.download.SLOWEST", 1.0)
    with trickling(b"HTTP/1.1 200 OK\r\n\r\n") as port:  # its end is that of the connection
        began = time.monotonic()
        with pytest.raises(ImageFetchError, match="within 1 s"):
            fetch(LabelStudio(f"http://127.0.0.1:{port}", "key"), 1, "/data/upload/1/a.png")
        assert time.monotonic() - began < 8


def test_a_host_that_does_not_answer_costs_time_a_few_times(
    door: LabelStudio, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.download.SLOWEST", 0.3)
    monkeypatch.setattr("backend.images.REST", 1.0)
    site.pages["/a.png"] = (200, {}, picture())
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        for _ in range(PATIENCE):
            with pytest.raises(ImageFetchError, match="within"):
                fetch(door, 1, f"http://{host}/a.png", {host})
        for _ in range(100):
            with pytest.raises(ImageFetchError, match="did not answer several times in a row"):
                fetch(door, 1, f"http://{host}/a.png", {host})
        assert fetch(door, 1, f"http://{site.host}/a.png", {site.host}) == picture(), "other hosts are asked"
        time.sleep(1.1)
        with pytest.raises(ImageFetchError, match="within"):
            fetch(door, 1, f"http://{host}/a.png", {host})


def test_pictures_that_are_not_asked_for_have_not_failed(door: LabelStudio, cache: Callable[..., ImageCache]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        index = {}
        for task in range(1, PATIENCE + 3):
            with pytest.raises(ImageFetchError) as error:
                cache(host).get(1, task, f"http://{host}/{task}.png")
            index[task] = with_error(TaskRecord(task), error.value)
    assert [record.tries for record in index.values()] == [1] * PATIENCE + [0, 0]
    assert not any(due(record) for record in index.values())
    assert in_turn(index, index) == [PATIENCE + 1, PATIENCE + 2, *range(1, PATIENCE + 1)]


def test_a_host_that_hangs_up_on_a_few_pictures_is_asked_for_the_others(door: LabelStudio, site: Site) -> None:
    site.pages["/a.png"] = (200, {}, picture())
    site.pages["/bad.png"] = (0, {}, b"")
    for _ in range(PATIENCE + 1):
        with pytest.raises(ImageFetchError, match="hung up"):
            fetch(door, 1, f"http://{site.host}/bad.png", {site.host})
    assert fetch(door, 1, f"http://{site.host}/a.png", {site.host}) == picture()


@contextmanager
def trickling(start: bytes) -> Iterator[int]:
    """A server that sends `start`, then a byte each tenth of a second for 20 s."""
    ended = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            peer.recv(4096)
            peer.sendall(start)
            for _ in range(200):
                if ended.wait(0.1):
                    return
                peer.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        ended.set()
        thread.join()


def test_keys_in_an_address_are_printed_nowhere(
    site: Site, cache: Callable[..., ImageCache], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = []
    site.pages["/on"] = (302, {"Location": f"http://me:hunter2@{site.host}/gone?sig=hunter2"}, b"")
    site.pages["/bad.png"] = (200, {}, b"no picture")
    for address in (
        f"http://{site.host}/gone?sig=hunter2",
        f"http://me:hunter2@{site.host}/gone",
        f"http://{site.host}/on?sig=hunter2",
        f"http://{site.host}/bad.png?sig=hunter2#hunter2",
        "http://127.0.0.1:1/a.png?sig=hunter2",
        "http://elsewhere.example.com/a.png?sig=hunter2",
        "http://me:hunter2@elsewhere.example.com/a.png",
        "http://[hunter2/a.png?sig=hunter2",
        "/data/upload/1/a.png?token=hunter2",
    ):
        with pytest.raises(ImageFetchError) as caught:
            cache(site.host, "127.0.0.1:1").get(1, 7, address)
        texts.append("".join(traceback.format_exception(caught.value)))
    assert "hunter2" not in "\n".join(texts) + caplog.text
    assert f"task 7, image 'http://{site.host}/gone'" in texts[0]


@pytest.mark.parametrize(
    "value", ["http://[::1/x", "http://a b/x", "http://x:99999/", "\ud800", "http://\ud800/", "//["]
)
def test_addresses_that_nobody_understands(value: str, site: Site, cache: Callable[..., ImageCache]) -> None:
    with pytest.raises(ImageFetchError):
        cache(site.host).get(1, 7, value)


def test_a_damaged_copy_is_made_anew(site: Site, cache: Callable[..., ImageCache], tmp_path: Path) -> None:
    site.pages["/a.png"] = (200, {}, picture())
    first, _ = cache(site.host).get(1, 1, f"http://{site.host}/a.png")
    [copy] = (tmp_path / "cache").rglob("*.jpg")
    for rest in (0, 30, copy.stat().st_size // 2):
        copy.write_bytes(copy.read_bytes()[:rest])
        np.testing.assert_array_equal(cache(site.host).get(1, 1, f"http://{site.host}/a.png")[0], first)


def test_a_cache_that_cannot_be_written_costs_time_only(site: Site, door: LabelStudio, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no folder")
    site.pages["/a.png"] = (200, {}, picture())
    broken = ImageCache(tmp_path / "file" / "cache", 10**9, door, 32, [site.host])
    assert broken.get(1, 1, f"http://{site.host}/a.png")[1] == (64, 48)


def test_our_own_address_in_a_task_goes_with_our_key(door: LabelStudio, project: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    [task] = door.upload(project, [tmp_path / "a.png"])
    value = door.task(task, project)["data"]["image"]
    assert fetch(door, task, door.url + value) == picture()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "photo.jpg",
        "data:image/png;base64,AAAA",
        "/api/current-user/token",
        "/data/../api/current-user/token",
        "/data/upload/%2e%2e/%2e%2e/api/current-user/token",
        "/data/upload/%252e%252e/x",
        "//example.com/a.png",
        "ftp://example.com/a.png",
    ],
)
def test_other_addresses_are_refused(value: str) -> None:
    nobody = LabelStudio("http://127.0.0.1:1", "key")  # would fail otherwise: nothing listens there
    with pytest.raises(ImageFetchError):
        fetch(nobody, 1, value)


@pytest.mark.parametrize(
    "url", ["http://a.com@b.com/x", "http://b.com\\@a.com/x", "http://a.com.b.com/x", "gopher://a.com/x"]
)
def test_hosts_are_compared_whole(url: str) -> None:
    check_host("https://a.com:8443/x", {"a.com:8443"})
    with pytest.raises(ImageFetchError):
        check_host(url, {"a.com"})


def test_label_studio_below_a_path() -> None:
    below = LabelStudio("http://example.com/studio", "key")
    assert served_path(below, "/studio/data/upload/1/a.png") == "/data/upload/1/a.png"
    assert served_path(below, "/data/upload/1/a.png") == "/data/upload/1/a.png"


def test_too_big_and_unreadable(site: Site, cache: Callable[..., ImageCache], monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/text.jpg"] = (200, {}, b"no picture")
    with pytest.raises(ImageFetchError, match="task 9, image 'http"):
        cache(site.host).get(1, 9, f"http://{site.host}/text.jpg")
    monkeypatch.setattr("backend.images.LIMIT", 1_000_000)
    site.pages["/big.jpg"] = (200, {}, bytes(2_000_000))
    with pytest.raises(ImageFetchError, match="sends more than 1 MB"):
        cache(site.host).get(1, 9, f"http://{site.host}/big.jpg")


def test_cache_is_bounded_and_drops_the_longest_unused(
    site: Site, cache: Callable[..., ImageCache], tmp_path: Path
) -> None:
    limit = 40_000
    small = cache(site.host, limit=limit)
    for n in range(300):
        site.pages[f"/{n}.png"] = (200, {}, picture(seed=n))
        small.get(1, n, f"http://{site.host}/{n}.png")
    kept = list((tmp_path / "cache").rglob("*.jpg"))
    most = max(file.stat().st_size for file in kept)
    assert 0 < sum(file.stat().st_size for file in kept) <= limit + FOLDERS * most  # one copy each may stay
    assert len(kept) < 300


def test_pruning_keeps_what_was_used_last(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.jpg" for n in range(4)]
    for age, file in enumerate(reversed(files)):
        write(file, bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    prune(files[0], 250)
    assert sorted(tmp_path.iterdir()) == [files[0], files[3]]  # the one just written, and the one used last


def test_many_readers_at_once(site: Site, cache: Callable[..., ImageCache]) -> None:
    site.pages["/a.png"] = (200, {}, picture())
    found: list[Any] = []
    jobs = [
        threading.Thread(target=lambda: found.append(cache(site.host).get(1, 1, f"http://{site.host}/a.png")[0]))
        for _ in range(8)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(found) == 8
    for image in found[1:]:
        np.testing.assert_array_equal(image, found[0])
