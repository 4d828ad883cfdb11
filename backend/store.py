"""The store: checkpoints, cluster maps, masks, scores, in one folder or bucket. Derived things only."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import cv2
import fsspec
import numpy as np
import orjson
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from backend.errors import StoreError

#: End of the names of files that are being written.
PART = ".part"


class Store:
    """Bytes by key; keys look like `projects/7/clusters/ab12/31.png`.

    Every write is atomic: a reader sees the old content or the new, never half of one.

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

    def __hash__(self) -> int:
        return hash(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def read(self, key: str) -> bytes | None:
        """The bytes under a key, None when there are none."""
        with self._door("read", key) as path, suppress(FileNotFoundError, NotADirectoryError):
            return bytes(self.files.cat_file(path))
        return None

    def write(self, key: str, data: bytes) -> None:
        """Replace what lies under a key."""
        with self._door("write", key) as path:
            if self.local:
                _write_file(Path(path), data, os.replace)
            else:
                self.files.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write under a key where there is nothing yet; readable by our own user only where the store is a folder.

        Returns:
            False when there was something: it stays. Of several callers at once, one gets True.
        """
        with self._door("write", key) as path, suppress(FileExistsError):
            if self.local:
                _write_file(Path(path), data, os.link, mode=0o600)
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

    def list(self, prefix: str) -> list[str]:
        """All keys below a folder, sorted."""
        with self._door("list", prefix) as path, suppress(FileNotFoundError):
            found = [str(file).removeprefix(self.root + "/") for file in self.files.find(path)]
            return sorted(key for key in found if not key.endswith(PART))
        return []

    def delete_prefix(self, prefix: str) -> None:
        """Remove all keys below a folder; fine if there are none."""
        with self._door("delete", prefix) as path, suppress(FileNotFoundError):
            self.files.rm(path, recursive=True)

    def read_json(self, key: str) -> Any:
        """The value under a key, None when there is none."""
        data = self.read(key)
        try:
            return None if data is None else orjson.loads(data)
        except ValueError as error:
            raise self._damaged(key) from error

    def write_json(self, key: str, value: Any) -> None:
        """Keep a value; numpy numbers and arrays are fine, NaN becomes null."""
        self.write(key, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))

    def read_arrays(self, key: str, names: Collection[str] | None = None) -> dict[str, NDArray[Any]] | None:
        """Named arrays, those of these names alone or all; None when there are none."""
        data = self.read(key)
        if data is None:
            return None
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                return {name: file[name] for name in file.files if names is None or name in names}
        except (ValueError, EOFError, OSError, BadZipFile) as error:
            raise self._damaged(key) from error

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
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
        if found is None:
            raise self._damaged(key)
        return np.asarray(found, np.uint8)

    def write_map(self, key: str, values: NDArray[np.uint8]) -> None:
        """Keep a map (H, W) of uint8 as a PNG."""
        self.write(key, cv2.imencode(".png", np.ascontiguousarray(values, np.uint8))[1].tobytes())

    def _damaged(self, key: str) -> StoreError:
        return StoreError(f"{key} in the store {self.url} is damaged; delete it and it will be made again")

    @contextmanager
    def _door(self, verb: str, key: str) -> Iterator[str]:
        """Give the path of a key, and turn whatever the storage raises into one sentence; each kind has its own."""
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key!r} is not a key of the store")
        try:
            yield f"{self.root}/{key}"
        except Exception as error:
            raise StoreError(f"the store {self.url} cannot {verb} {key}: {error}") from error


def _write_file(path: Path, data: bytes, place: Callable[[str, Path], None], mode: int = 0o644) -> None:
    """Write beside the path, then `place` the complete file there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        place(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
