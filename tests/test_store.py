"""The store: a folder and a bucket (fsspec's in-memory one) keep the same promises."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from backend.errors import StoreError
from backend.store import Store


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind."""
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid4().hex}"
    store = Store(url)
    yield store
    store.delete_prefix("")


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    """A store in a folder."""
    return Store(str(tmp_path / "store"))


def test_bytes_come_back(store: Store) -> None:
    assert store.read("a/b.bin") is None
    assert not store.exists("a/b.bin")
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"\x00second")
    assert store.read("a/b.bin") == b"\x00second"
    assert store.exists("a/b.bin")


def test_a_key_below_a_key_is_not_there(store: Store) -> None:
    store.write("a", b"x")
    assert store.read("a/b") is None


def test_list_and_delete(store: Store) -> None:
    for key in ("p/7/b", "p/7/deep/a", "p/70/c", "q"):
        store.write(key, b"x")
    assert store.list("p/7") == ["p/7/b", "p/7/deep/a"]
    store.delete("p/7/b")
    store.delete("p/7/b")
    assert store.list("p/7") == ["p/7/deep/a"]
    store.delete_prefix("p/7")
    store.delete_prefix("p/7")
    assert store.list("p/7") == []
    assert store.list("p") == ["p/70/c"]


def test_another_process_sees_what_was_written(store: Store) -> None:
    other = Store(store.url)
    assert (store.list("a"), other.list("a")) == ([], [])
    other.write("a/1", b"x")
    assert store.list("a") == ["a/1"]
    assert store.exists("a/1")
    assert store == other
    assert hash(store) == hash(other)


def test_one_of_many_creates(store: Store) -> None:
    gate = threading.Barrier(8)

    def create(number: int) -> bool:
        gate.wait()
        return Store(store.url).create("secret", str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8))) if store.local else [store.create("secret", b"0"), create_again(store)]
    assert won.count(True) == 1
    assert store.read("secret") == str(won.index(True)).encode()


def create_again(store: Store) -> bool:
    """A second caller; fsspec's in-memory store has no lock for callers at once, buckets do."""
    return store.create("secret", b"1")


def test_modes_of_files(folder: Store) -> None:
    folder.create("secret", b"x")
    folder.write("map.png", b"x")
    assert Path(folder.root, "secret").stat().st_mode & 0o777 == 0o600
    assert Path(folder.root, "map.png").stat().st_mode & 0o777 == 0o644


def test_a_reader_never_sees_half(folder: Store) -> None:
    contents = [bytes([n]) * 300_000 for n in range(2)]
    folder.write("x", contents[0])
    done = threading.Event()

    def write() -> None:
        for n in range(200):
            folder.write("x", contents[n % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing, reads = pool.submit(write), 0
        while not done.is_set() or not reads:
            assert folder.read("x") in contents
            assert folder.list("") == ["x"]
            reads += 1
        writing.result()
    assert os.listdir(folder.root) == ["x"]


def test_a_write_that_fails_leaves_nothing(folder: Store) -> None:
    folder.write("x/y", b"old")
    with pytest.raises(StoreError, match="cannot write x"):
        folder.write("x", b"new")  # a folder lies there
    assert folder.read("x/y") == b"old"
    assert os.listdir(folder.root) == ["x"]


def test_a_store_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = Store(str(tmp_path / "file"))
    assert store.read("x") is None
    with pytest.raises(StoreError, match="file cannot write a/b"):
        store.write("a/b", b"")


@pytest.mark.parametrize("key", ["/etc/passwd", "../x", "a/../../x"])
def test_keys_stay_inside(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="is not a key"):
        store.read(key)
    with pytest.raises(StoreError, match="is not a key"):
        store.write(key, b"")


def test_json(store: Store) -> None:
    assert store.read_json("x.json") is None
    value = {"score": np.float32(0.5), "order": np.array([2, 0, 1]), "none": math.nan, 7: "seven"}
    store.write_json("x.json", value)
    assert store.read_json("x.json") == {"score": 0.5, "order": [2, 0, 1], "none": None, "7": "seven"}


def test_arrays(store: Store) -> None:
    assert store.read_arrays("x.npz") is None
    given: dict[str, NDArray[Any]] = {
        "embedding": np.arange(6, dtype=np.float32).reshape(2, 3),
        "tasks": np.array([], np.int64),
    }
    store.write_arrays("x.npz", given)
    found = store.read_arrays("x.npz")
    assert found is not None
    assert found.keys() == given.keys()
    for name, values in given.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype


def test_arrays_never_run_code(store: Store) -> None:
    buffer = np.array([{"an": "object"}], dtype=object)
    store.write_arrays("x.npz", {"x": buffer})
    assert store.read_arrays("x.npz") is None
    assert store.damaged == ["x.npz"]


@pytest.mark.parametrize("value", [0, 1, 255])
def test_arrays_with_any_bytes_damaged_are_whole_or_gone(value: int) -> None:
    store, arrays = Store(f"memory://{uuid4().hex}"), {"a": np.arange(9), "b": np.array(["soil", "crop"])}
    store.write_arrays("x.npz", arrays)
    data = store.read("x.npz") or b""
    for place, length in product(range(len(data)), (1, 30)):
        store.write("x.npz", data[:place] + bytes([value] * length) + data[place + length :])
        found = store.read_arrays("x.npz")
        if found is None:
            assert store.read("x.npz") is None
        else:
            assert found.keys() == arrays.keys(), place
            assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_map(store: Store) -> None:
    assert store.read_map("x.png") is None
    given = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    store.write_map("x.png", given)
    np.testing.assert_array_equal(store.read_map("x.png"), given)


@pytest.mark.parametrize("harm", ["half", "empty", "zeros", "other"])
def test_what_is_damaged_is_deleted_with_a_warning(store: Store, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    store.write_json("x.json", {"a": list(range(100))})
    store.write_arrays("x.npz", {"a": np.arange(1000)})
    store.write_map("x.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    for key, read in {"x.json": store.read_json, "x.npz": store.read_arrays, "x.png": store.read_map}.items():
        data = store.read(key) or b""
        harmed = {"half": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "other": b"PK\x03\x04 {"}
        store.write(key, harmed[harm])
        assert read(key) is None
        assert not store.exists(key)
        assert f"{key} in the store {store.url} is damaged" in caplog.text
    assert store.damaged == ["x.json", "x.npz", "x.png"]


def test_what_was_replaced_meanwhile_stays(store: Store) -> None:
    store.write("x.json", b"whole")
    store.discard("x.json", b"as it was read before")
    assert store.read("x.json") == b"whole"
    assert store.damaged == []


def test_writes_are_on_the_disk_before_they_count(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr("os.replace", lambda one, two: (order.append("place"), replace(one, two)))
    folder.write("x", b"1")
    order.clear()
    folder.write("x", b"2")
    assert order == ["file", "place", "folder"]
    folder.write("deep/er/x", b"3")
    assert order[3:] == ["folder", "folder", "file", "place", "folder"], "new folders too"


def test_what_killed_writers_left_is_swept(folder: Store) -> None:
    folder.write("p/7/x", b"1")
    for name, age in (("old", 7200), ("new", 0)):
        part = Path(folder.root, "p/7", f".{name}.part")
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age, time.time() - age))
    folder.sweep("p/7")
    assert sorted(os.listdir(Path(folder.root, "p/7"))) == [".new.part", "x"]


def test_folders(store: Store) -> None:
    for key in ("projects/7/x", "projects/70/deep/y", "projects/file"):
        store.write(key, b"1")
    assert store.folders("projects") == ["7", "70"]
    assert store.folders("nothing") == []


def test_kinds_of_store_that_cannot_be_had() -> None:
    with pytest.raises(StoreError, match=r"cannot be opened: .*nonsense"):
        Store("nonsense://bucket")
    with pytest.raises(StoreError, match=r"cannot be opened: .*refused"):
        Store("ftp://127.0.0.1:9/bucket")
    missing = [kind for kind in ("s3", "gs", "abfs") if not installed(kind)]
    for kind in missing:
        with pytest.raises(StoreError, match=r"(?i)cannot be opened: .*install"):
            Store(f"{kind}://bucket")


def installed(kind: str) -> bool:
    """Whether the package for a kind of bucket is here."""
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError:
        return False
    return True
