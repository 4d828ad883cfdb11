"""Images of tasks: uploads, local files, cloud storage and the web, from a real Label Studio and a small web server."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from backend.errors import ImageFetchError, LabelStudioError
from backend.images import FOLDERS, ImageCache, check_host, fetch, prune, served_path, write
from backend.labelstudio import LabelStudio

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
    _, size = cache().get(project, task, "s3://bucket/field/d.png")
    assert size == (64, 48)
    path, authorization = site.seen[-1]
    assert "X-Amz-Signature" in path or "Signature=" in path
    assert authorization is None  # our key stays with Label Studio
    with pytest.raises(ImageFetchError, match="answers 404"):
        cache().get(project, task, "s3://bucket/field/gone.png")
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
