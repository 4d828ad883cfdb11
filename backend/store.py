"""The store: checkpoints, cluster maps, masks, scores, in one folder or bucket. Derived things only.

So what is damaged is deleted, with a warning, and counts as missing: whatever is missing is made again.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import cv2
import fsspec
import numpy as np
import orjson
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from backend.errors import StoreError

log = logging.getLogger(__name__)

#: End of the names of files that are being written, and the age in seconds at which nobody is writing them any more.
PART, DEAD = ".part", 3600
#: How a PNG ends; a decoder may give half of a picture for half of a file.
PNG_END = b"IEND\xaeB`\x82"
#: Where a ZIP file without a comment says how many files are in it; its reader does not compare.
ENTRIES = slice(-12, -10)


class Store:
    """Bytes by key; keys look like `projects/7/clusters/ab12/31.png`.

    Every write is atomic: a reader sees the old content or the new, never half of one; in a folder it is on the disk
    before the call returns.

    Attributes:
        damaged: keys that were found damaged by this process, and deleted; for whoever has them made again.

    Args:
        url: a folder, or an fsspec URL such as `s3://bucket/firstrow`.

    Raises:
        StoreError: there is no such kind of store, or its package is not installed; every method raises it when the
            store does not answer, is full or read-only.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:  # without a cache of listings: other processes write here too
            self.files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # each kind has its own
            raise StoreError(f"the store {url} cannot be opened: {error}") from error
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.files, LocalFileSystem)
        self.damaged: list[str] = []

    def __hash__(self) -> int:
        return hash(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes | None:
        """The bytes under a key, or those from `start` up to `end`; None when there are none."""
        with self._door("read", key) as path, suppress(FileNotFoundError, NotADirectoryError):
            return bytes(self.files.cat_file(path, start=start, end=end))
        return None

    def map(self, key: str) -> bytearray | mmap.mmap | None:
        """As `read`, for something large that nobody writes again; where the store is a folder it takes no memory."""
        if not self.local:
            data = self.read(key)
            return None if data is None else bytearray(data)
        with (
            self._door("read", key) as path,
            suppress(FileNotFoundError, NotADirectoryError),
            Path(path).open("rb") as file,
        ):
            if not os.fstat(file.fileno()).st_size:
                return bytearray()  # cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # as torch wants it, and nothing is written
        return None

    def write(self, key: str, data: bytes) -> None:
        """Replace what lies under a key."""
        with self._door("write", key) as path:
            if self.local:
                write_file(Path(path), [data], os.replace)
            else:
                self.files.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write under a key where there is nothing yet; readable by our own user only where the store is a folder.

        Returns:
            False when there was something: it stays. Of several callers at once, one gets True.
        """
        with self._door("write", key) as path, suppress(FileExistsError):
            if self.local:
                write_file(Path(path), [data], os.link, mode=0o600)
            else:
                self.files.pipe_file(path, data, mode="create")
            return True
        return False

    def exists(self, key: str) -> bool:
        """Whether there is something under a key."""
        with self._door("read", key) as path:
            return bool(self.files.exists(path))

    def delete(self, key: str) -> None:
        """Remove a key; fine if it is gone."""
        with self._door("delete", key) as path, suppress(FileNotFoundError):
            self.files.rm_file(path)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        with self._door("list", prefix) as path, suppress(FileNotFoundError, NotADirectoryError):
            rows = self.files.ls(path, detail=True)
            return sorted(str(row["name"]).rstrip("/").rpartition("/")[2] for row in rows if row["type"] == "directory")
        return []

    def list(self, prefix: str) -> list[str]:
        """All keys below a folder, sorted."""
        with self._door("list", prefix) as path, suppress(FileNotFoundError):
            if self.local:  # without asking the size of each of 10,000 files
                every = [f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names]
            else:
                every = self.files.find(path)
            found = [str(file).removeprefix(self.root).lstrip("/") for file in every]
            return sorted(key for key in found if not key.endswith(PART))
        return []

    def sweep(self, prefix: str) -> None:
        """Remove what writers that were killed have left below a folder."""
        if not self.local:
            return
        with self._door("list", prefix) as path:
            for file in Path(path).rglob(f".*{PART}"):
                with suppress(FileNotFoundError):
                    if time.time() - file.stat().st_mtime > DEAD:
                        file.unlink()

    def delete_prefix(self, prefix: str) -> None:
        """Remove all keys below a folder; fine if there are none."""
        with self._door("delete", prefix) as path, suppress(FileNotFoundError):
            self.files.rm(path, recursive=True)

    def read_json(self, key: str) -> Any:
        """The value under a key, None when there is none."""
        return self.parsed(key, self.read(key))

    def parsed(self, key: str, data: bytes | None) -> Any:
        """The value that was read from under a key as `data`, None when there is none."""
        try:
            return None if data is None else orjson.loads(data)
        except ValueError:
            self.discard(key, data)
            return None

    def write_json(self, key: str, value: Any) -> bytes:
        """Keep a value; numpy numbers and arrays are fine, NaN becomes null. Returns the file's bytes."""
        data = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
        self.write(key, data)
        return data

    def read_arrays(self, key: str, names: Collection[str] | None = None) -> dict[str, NDArray[Any]] | None:
        """Named arrays, those of these names alone or all; None when there are none."""
        data = self.read(key)
        if data is None:
            return None
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                if not 0 < len(file.files) == int.from_bytes(data[ENTRIES], "little"):
                    raise ValueError("its table of contents is damaged")
                return {name: file[name] for name in file.files if names is None or name in names}
        except (ValueError, EOFError, OSError, KeyError, BadZipFile, RuntimeError, TokenError, zlib.error):
            self.discard(key, data)
            return None

    def write_arrays(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep named arrays."""
        buffer = io.BytesIO()
        np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
        self.write(key, buffer.getvalue())

    def read_map(self, key: str) -> NDArray[np.uint8] | None:
        """A map (H, W), None when there is none."""
        data = self.read(key)
        if data is None:
            return None
        whole = data.endswith(PNG_END)
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if whole else None
        if values is None:
            self.discard(key, data)
            return None
        return np.asarray(values, np.uint8)

    def write_map(self, key: str, values: NDArray[np.uint8]) -> None:
        """Keep a map (H, W) of uint8 as a PNG."""
        self.write(key, cv2.imencode(".png", np.ascontiguousarray(values, np.uint8))[1].tobytes())

    def discard(self, key: str, data: bytes | None) -> None:
        """Delete what is damaged, unless it was replaced since it was read; it counts as missing."""
        if data is not None and self.read(key) == data:
            log.warning("%s in the store %s is damaged (%d bytes): deleted, it is made again", key, self.url, len(data))
            self.delete(key)
            self.damaged.append(key)

    @contextmanager
    def _door(self, verb: str, key: str) -> Iterator[str]:
        """Give the path of a key, and turn whatever the storage raises into one sentence; each kind has its own."""
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key!r} is not a key of the store")
        try:
            yield f"{self.root}/{key}"
        except Exception as error:
            raise StoreError(f"the store {self.url} cannot {verb} {key}: {error}") from error


def write_file(path: Path, data: Iterable[bytes], place: Callable[[str, Path], None], mode: int = 0o644) -> None:
    """Write pieces beside the path, then `place` the complete file there; both are on the disk when this returns."""
    _make_folder(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
        _sync(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents; their names are on the disk when this returns."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Have the names in a folder written to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
