"""The store: checkpoints, cluster maps, masks, scores, in one folder or bucket. Derived things only."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import orjson
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from backend.errors import StoreError


class Store:
    """Bytes by key; keys look like `projects/7/clusters/ab12/31.png`.

    Every write is atomic: a reader sees the old content or the new, never half of one.

    Args:
        url: a folder, or an fsspec URL such as `s3://bucket/firstrow`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files, root = fsspec.core.url_to_fs(str(url))
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.files, LocalFileSystem)

    def __hash__(self) -> int:
        return hash(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and other.url == self.url

    def read(self, key: str) -> bytes | None:
        """The bytes under a key, None when there are none.

        Raises:
            StoreError: the store does not answer.
        """
        try:
            return bytes(self.files.cat_file(self._path(key)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"the store {self.url} cannot read {key}: {error}") from error

    def write(self, key: str, data: bytes, private: bool = False) -> None:
        """Replace what lies under a key.

        Args:
            key: where.
            data: what.
            private: readable by our own user only, where the store is a folder.

        Raises:
            StoreError: the store is full, read-only or does not answer.
        """
        try:
            if self.local:
                _write_file(Path(self._path(key)), data, 0o600 if private else 0o644)
            else:
                self.files.pipe_file(self._path(key), data)
        except OSError as error:
            raise StoreError(f"the store {self.url} cannot write {key}: {error}") from error

    def exists(self, key: str) -> bool:
        """Whether there is something under a key."""
        return bool(self.files.exists(self._path(key)))

    def delete(self, key: str) -> None:
        """Remove a key; fine if it is gone."""
        with suppress(FileNotFoundError):
            self.files.rm_file(self._path(key))

    def list(self, prefix: str) -> list[str]:
        """All keys below a folder, sorted."""
        self.files.invalidate_cache()
        try:
            found = self.files.find(self._path(prefix))
        except FileNotFoundError:
            return []
        return sorted(str(path).removeprefix(self.root + "/") for path in found if not _is_temporary(str(path)))

    def delete_prefix(self, prefix: str) -> None:
        """Remove all keys below a folder; fine if there are none."""
        with suppress(FileNotFoundError):
            self.files.rm(self._path(prefix), recursive=True)

    def read_json(self, key: str) -> Any:
        """The value under a key, None when there is none."""
        data = self.read(key)
        return None if data is None else orjson.loads(data)

    def write_json(self, key: str, value: Any) -> None:
        """Keep a value; numpy numbers and arrays are fine, NaN becomes null."""
        self.write(key, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS))

    def read_arrays(self, key: str) -> dict[str, NDArray[Any]] | None:
        """Named arrays, None when there are none."""
        data = self.read(key)
        if data is None:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return dict(file)

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
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        if found is None:
            raise StoreError(f"{key} in the store {self.url} is not a map; delete it and it will be made again")
        return np.asarray(found, np.uint8)

    def write_map(self, key: str, values: NDArray[np.uint8]) -> None:
        """Keep a map (H, W) of uint8 as a PNG."""
        self.write(key, cv2.imencode(".png", np.ascontiguousarray(values, np.uint8))[1].tobytes())

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/"):
            raise StoreError(f"{key!r} is not a key of the store")
        return f"{self.root}/{key}"


def _write_file(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _is_temporary(path: str) -> bool:
    return path.endswith(".part")
