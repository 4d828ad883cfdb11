"""Image of a task -> pixels at work resolution: fetched safely, kept as small copies in a bounded folder."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backend import download
from backend.decoder import LIMIT, Decoder, resident
from backend.download import shown, shown_host
from backend.errors import ImageFetchError, NotAskedError, SlowHostError
from backend.labelstudio import LabelStudio
from model.data import UNREADABLE, ImageError

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

#: Paths below which Label Studio serves files; no other path of it is asked for because a task says so.
SERVED = ("/data/upload/", "/data/local-files/", "/storage-data/", "/tasks/", "/projects/")
#: Cloud storage, for which Label Studio finds the bytes.
CLOUD = ("s3", "gs", "azure-blob")
#: The cache is split into this many folders, each with its share of the limit, so that pruning looks at few files.
FOLDERS = 64
#: Redirects followed between allowed hosts.
REDIRECTS = 3
#: A host that failed so many pictures in a row for want of an answer is left alone for so many seconds: dozens of
#: pictures that each wait to the end would use up the time of a whole job.
PATIENCE, REST = 3, 60.0
#: Failures in a row of hosts that did not answer, and until when they are left alone, of this process.
SILENT: dict[str, tuple[int, float]] = {}


class ImageCache:
    """Images of tasks at work resolution.

    What is handed out is always the stored copy (JPEG, quality 95, full colour resolution), so an image has the same
    pixels whether it was just fetched or not. A copy is found again by the task's value, not by the file's content:
    an image replaced under the same name is seen once its copy is pruned.

    Args:
        folder: for this work resolution alone; made when needed.
        limit_bytes: most bytes to keep; the longest unused copies go first.
        studio: where images are fetched.
        size: longer side of a copy in pixels; smaller images keep their size.
        allowed_hosts: `host` or `host:port` that images may be fetched from, besides Label Studio.
        decoder: the process that decodes them; by default the one of this process.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        studio: LabelStudio,
        size: int,
        allowed_hosts: Collection[str] = (),
        decoder: Decoder | None = None,
    ) -> None:
        self.folder, self.limit, self.studio, self.size = folder, limit_bytes, studio, size
        self.hosts, self.decoder = frozenset(host.lower() for host in allowed_hosts), decoder

    def get(self, project: int, task: int, value: str) -> tuple[Pixels, tuple[int, int]]:
        """The image of a task.

        Args:
            project: cloud storage is looked up in this project.
            task: as above; also named in errors.
            value: what the task's data has under the image key.

        Returns:
            (H, W, 3) RGB at work resolution, and width and height of the original, both turned upright.

        Raises:
            ImageFetchError: this image cannot be had or read; says which and why.
            LabelStudioError: Label Studio itself is in trouble.
        """
        path = self._path(project, value)
        stored = _read(path)
        try:
            return unpacked(stored or self._store(path, task, value))
        except UNREADABLE:  # written as the machine went down, say
            return unpacked(self._store(path, task, value))

    def _store(self, path: Path, task: int, value: str) -> bytes:
        try:
            data = fetch(self.studio, task, value, self.hosts)
            copy = (self.decoder or resident()).copy(data, self.size)
        except (ImageFetchError, ImageError) as error:
            kind = type(error) if isinstance(error, ImageFetchError) else ImageFetchError
            raise kind(f"task {task}, image {shown(value)!r}: {error}") from error
        try:
            write(path, copy)
            prune(path, self.limit // FOLDERS)
        except OSError as error:
            log.warning("the cache %s cannot be written (%s): images are fetched again each time", self.folder, error)
        return copy

    def _path(self, project: int, value: str) -> Path:
        name = hashlib.sha256(
            f"{self.studio.url} {project} {self.size} {value}".encode("utf-8", "surrogatepass")
        ).hexdigest()
        return self.folder / f"{int(name[:4], 16) % FOLDERS:02d}" / f"{name[:40]}.jpg"


def fetch(studio: LabelStudio, task: int, value: str, allowed_hosts: Collection[str] = ()) -> bytes:
    """The bytes of a task's image file.

    Args:
        studio: serves uploads, local files and, by itself or by sending us on, cloud storage.
        task: whose project has the cloud storage.
        value: `/data/upload/...`, `/data/local-files/?d=...`, `s3://...`, `gs://...`, `azure-blob://...` or http(s).
        allowed_hosts: `host` or `host:port`, lower case, for http(s).

    Raises:
        ImageFetchError: the value is of another kind, its host is not allowed, or the file cannot be had.
        LabelStudioError: Label Studio itself is in trouble.
    """
    if not value:
        raise ImageFetchError("the task has no image: its data lacks the key that the label config shows")
    try:
        with patience(shown_host(value) or "Label Studio"):
            return fetch_value(studio, task, value, allowed_hosts)
    except ValueError:  # of urllib, urllib3 and requests, each of which understands fewer addresses than the next
        raise ImageFetchError("the address cannot be understood: correct it in the task's data") from None


@contextmanager
def patience(host: str) -> Iterator[None]:
    """Leave a host alone that has not answered lately.

    Raises:
        NotAskedError: it is left alone.
    """
    failures, until = SILENT.get(host, (0, 0.0))
    if failures >= PATIENCE and time.monotonic() < until:
        raise NotAskedError(f"{host} did not answer several times in a row: is it reachable from here?")
    try:
        yield
    except SlowHostError:
        SILENT[host] = (failures + 1, time.monotonic() + REST)
        raise
    except ImageFetchError:
        SILENT.pop(host, None)  # it answered
        raise
    SILENT.pop(host, None)


def fetch_value(studio: LabelStudio, task: int, value: str, allowed_hosts: Collection[str]) -> bytes:
    """As `fetch`, by the kind of the address.

    Raises:
        ValueError: it is no address.
    """
    scheme = urlsplit(value).scheme
    if scheme in CLOUD:
        uri = base64.urlsafe_b64encode(value.encode()).decode()
        return studio.download(f"/tasks/{task}/resolve/?fileuri={uri}", LIMIT, allowed_hosts)
    if scheme in ("http", "https"):
        return fetch_url(studio, value, allowed_hosts)
    if scheme or not value.startswith("/"):
        raise ImageFetchError(
            f"cannot read {scheme or 'relative'} addresses: use uploads, local files, http(s) or cloud"
        )
    return studio.download(served_path(studio, value), LIMIT, allowed_hosts)


def fetch_url(studio: LabelStudio, url: str, allowed_hosts: Collection[str]) -> bytes:
    """The bytes behind an http(s) address; each redirect must lead to an allowed host again.

    Raises:
        ImageFetchError: a host is not allowed, or the file cannot be had.
        LabelStudioError: it is Label Studio's own address and Label Studio is in trouble.
    """
    with download.Download(allowed_hosts):
        for _ in range(1 + REDIRECTS):
            if studio.http.owns(url):
                return studio.download(served_path(studio, url.removeprefix(studio.url)), LIMIT, allowed_hosts)
            check_host(url, allowed_hosts)
            with download.opened(url) as answer:
                onward = download.redirect(answer)
                if onward is None:
                    return download.body(answer, LIMIT)
                url = urljoin(url, onward)
    raise ImageFetchError(f"more than {REDIRECTS} redirects")


def check_host(url: str, allowed_hosts: Collection[str]) -> None:
    """Refuse hosts that nobody allowed: a task could otherwise make us read this network's inner services.

    Raises:
        ImageFetchError: naming the host and the setting.
    """
    parts = urlsplit(url)
    if re.search(r"[\\\x00-\x1f]", url) or re.search(r"\s", parts.netloc):  # programs disagree on what these mean
        raise ImageFetchError("the address has a backslash, or a space or control character where none may be")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    if not port or not download.is_listed(parts.hostname or "", port, allowed_hosts):
        raise ImageFetchError(
            f"host {shown_host(url)!r} is not allowed: add it to FIRSTROW_ALLOWED_HOSTS in the worker's environment"
        )


def served_path(studio: LabelStudio, path: str) -> str:
    """A path below which Label Studio serves files, without the prefix that Label Studio itself may live under.

    Raises:
        ImageFetchError: it is some other path.
    """
    prefix = urlsplit(studio.url).path
    inner = path.removeprefix(prefix) if prefix and path.startswith(f"{prefix}/") else path
    parts = unquote(unquote(urlsplit(inner).path)).replace("\\", "/").split("/")
    if not inner.startswith(SERVED) or ".." in parts:
        raise ImageFetchError("Label Studio serves no files there")
    return inner


def unpacked(copy: bytes) -> tuple[Pixels, tuple[int, int]]:
    """Pixels of a copy, and width and height of its original."""
    with Image.open(io.BytesIO(copy), formats=["JPEG"]) as image:
        width, _, height = image.info["comment"].decode().partition("x")
        return np.array(image.convert("RGB")), (int(width), int(height))


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
        os.utime(path)  # used just now: pruned last
    except OSError:  # not there, or not to be read: then it is fetched again
        return None
    return data


def write(path: Path, data: bytes) -> None:
    """Put a file in place in one step: no other worker reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
        part.write(data)
    os.replace(part.name, path)


def prune(kept: Path, limit: int) -> None:
    """Delete the longest unused files beside `kept` until the folder holds at most `limit` bytes; never `kept`."""
    files = _by_age(kept.parent)
    used = sum(size for _, size, _ in files)
    for _, size, path in files:
        if used <= limit:
            return
        if path != kept:
            path.unlink(missing_ok=True)
            used -= size


def _by_age(folder: Path) -> Sequence[tuple[float, int, Path]]:
    found = []
    for path in folder.iterdir():
        try:
            seen = path.stat()
        except FileNotFoundError:  # another worker pruned it
            continue
        found.append((seen.st_mtime, seen.st_size, path))
    return sorted(found)
