"""One bad thing costs only itself: it is named with its remedy, tried again by itself, and the others go on."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Backend
from numpy.typing import NDArray
from PIL import Image
from rq import Worker
from rq.timeouts import JobTimeoutException
from team import cannot_be_shown, shown
from test_decoder import blank_png

from backend.annotator import Annotator
from backend.attach import apply, plan
from backend.errors import ConfigError, ImageFetchError, LabelStudioError, MaskError, StoreError
from backend.faults import LONGEST_PAUSE, concerns_all, due, due_tasks, noted, pause, with_error
from backend.label_config import parse
from backend.labelstudio import LabelStudio
from backend.learn import model_info, train_round
from backend.prepare import clusters_name
from backend.project import Project, TaskRecord
from backend.status import status, unusable
from backend.sync import listing
from model.data import ImageError
from model.training import Recipe

CONFIG = """<View><Image name="photo" value="$picture"/><BrushLabels name="seg" toName="photo">
<Label value="soil"/><Label value="crop"/><Label value="weed"/></BrushLabels></View>"""
GROUPS = {"Soil": ["soil"], "Plant": ["crop", "weed"]}
NOBODY = LabelStudio("http://127.0.0.1:1", "key")
#: Makes the decoder of a worker really crash at files with this mark, and its network fail at pictures that are red all
#: over: Python reads it as it starts.
MARK = b"this picture crashes decoders"
CRASHING = f"""
import sys
if "backend.worker" in sys.orig_argv:
    from importlib.machinery import PathFinder
    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            spec = super().find_spec(name, path, target) if name == "model.features" else None
            if spec:
                run = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (run(module), fail_at_red(module))
            return spec
    def fail_at_red(module):
        real = module.Extractor.maps
        def maps(self, images):
            if any((image[..., 0] > 200).all() and (image[..., 1:] < 60).all() for image in images):
                raise RuntimeError("red is not seen")
            return real(self, images)
        module.Extractor.maps = maps
    sys.meta_path.insert(0, Finder)
if "backend.decoder" in sys.orig_argv:
    import ctypes
    from PIL import Image
    real = Image.open
    def open(source, *args, **more):
        if {MARK!r} in source.getvalue(): ctypes.string_at(0)
        return real(source, *args, **more)
    Image.open = open
"""


# When a task is tried again


def test_pauses_rise_from_a_minute_to_a_day() -> None:
    assert [pause(n) for n in (1, 2, 3)] == [60, 120, 240]
    assert pause(50) == pause(5000) == LONGEST_PAUSE
    record, waits = TaskRecord(7), []
    for _ in range(4):
        record = with_error(record, ImageFetchError("gone: restore it"))
        waits.append(record.next_try - time.time())
    assert waits == pytest.approx([60, 120, 240, 480], abs=5)
    assert (record.tries, record.error) == (4, "gone: restore it")
    assert not due(record)
    assert due(replace(record, next_try=time.time() - 1))
    assert not due(replace(record, next_try=0, error=""))


def test_a_task_that_was_well_for_long_begins_anew() -> None:
    record = TaskRecord(7, tries=9, next_try=time.time() - 2 * LONGEST_PAUSE)
    assert with_error(record, MaskError("x")).tries == 1
    assert with_error(replace(record, next_try=time.time() - 60), MaskError("x")).tries == 10


def test_records_of_a_store_without_tries_are_read() -> None:
    row = {name: value for name, value in TaskRecord(7).to_json().items() if name not in ("tries", "next_try")}
    assert TaskRecord.from_json(row) == TaskRecord(7)
    assert TaskRecord.from_json(TaskRecord(7, tries=3, next_try=9.5).to_json()).next_try == 9.5


@pytest.mark.parametrize(
    "error", [StoreError("full"), ConfigError("x"), JobTimeoutException(), LabelStudioError("down"), ConnectionError()]
)
def test_what_concerns_all_ends_the_job(error: Exception) -> None:
    if isinstance(error, ConnectionError):
        from redis import ConnectionError as Lost

        error = Lost()
    assert concerns_all(error, NOBODY)
    with pytest.raises(type(error)):
        noted(NOBODY, 1, TaskRecord(7), error)


@pytest.mark.parametrize(
    "error", [RecursionError(), MemoryError("much"), KeyError("x"), RuntimeError("odd"), OSError()]
)
def test_what_nobody_foresaw_costs_one_task(error: Exception) -> None:
    record = noted(NOBODY, 1, TaskRecord(7), error)
    assert f"task 7 cannot be used ({type(error).__name__}" in record.error
    assert "the worker's log says more" in record.error


def test_an_error_of_label_studio_is_a_tasks_own_where_others_are_answered(label_studio: LabelStudio) -> None:
    assert not concerns_all(LabelStudioError("broken", status=500), label_studio)
    assert concerns_all(LabelStudioError("broken", status=500), NOBODY)
    assert concerns_all(LabelStudioError("no key", status=401), label_studio)


def test_status_names_every_one() -> None:
    index = {n: with_error(TaskRecord(n), MaskError(f"task {n}: redraw it")) for n in range(1, 26)} | {
        99: TaskRecord(99)
    }
    rows = unusable(index)
    assert rows["count"] == 25
    assert [row["task"] for row in rows["tasks"]] == list(range(1, 26))
    assert due_tasks(index) == set()


# The whole of it


class Bad:
    """Pictures that have something wrong with them, by name."""

    def __init__(self) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        self.good = png(noise)
        self.files = {
            "crash.png": self.good + MARK,
            "bomb.png": blank_png(13300, 13300),
            "page.jpg": b"<html>please log in</html>",
            "red.png": png(np.full_like(noise, (250, 0, 0))),
            "cut.png": self.good[: len(self.good) // 2],
            "paper.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        }
        if "AVIF" in Image.registered_extensions().values():
            buffer = io.BytesIO()
            Image.fromarray(noise).save(buffer, "AVIF")
            head, mdat, body = buffer.getvalue().partition(b"mdat")
            self.files["inside.jpg"] = head + mdat + b"\xff" * 40 + body[40:]


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def worker_pids(backend: Backend) -> list[int]:
    return sorted(worker.pid or 0 for worker in Worker.all(connection=backend.context.board.redis))


def until(found: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")])))


def test_bad_tasks_cost_only_themselves(
    label_studio: LabelStudio,
    crashing: None,
    make_backend: Callable[..., Backend],
    pictures: dict[Path, NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = make_backend(FIRSTROW_COARSE_TASKS="0")
    ctx, studio, bad = backend.context, label_studio, Bad()
    number = int(studio.create_project("harm", CONFIG)["id"])
    good = studio.upload(number, list(pictures))
    for name, data in bad.files.items():
        (tmp_path / name).write_bytes(data)
    faulty = dict(zip(studio.upload(number, [tmp_path / name for name in bad.files]), bad.files, strict=True))
    odd = {
        "served with 500": "/data/local-files/?d=a%2F..%2F..%2Fx.png",
        "not allowed": "http://192.0.2.1/picture.jpg?sig=hunter2",
        "no address": "http://[::1/x.jpg",
        "empty": "",
    }
    imported = studio.import_tasks(number, [{"picture": value} for value in odd.values()])
    faulty |= dict(zip(imported, odd, strict=True))
    (drawn,) = studio.import_tasks(number, [{"picture": studio.task(good[0], number)["data"]["picture"]}])
    head = {"id": "r1", "from_name": "seg", "to_name": "photo", "type": "brushlabels", "image_rotation": 0}
    region = {**head, "original_width": 160, "original_height": 120}
    rle = [0, 0, 0, 1, *[0] * 5000]
    studio.create_annotation(drawn, [{**region, "value": {"format": "rle", "rle": rle, "brushlabels": ["crop"]}}])
    faulty[drawn] = "mask"
    (unshown,) = studio.import_tasks(number, [{"picture": studio.task(good[0], number)["data"]["picture"]}])
    cannot_be_shown(studio, unshown)
    faulty[unshown] = "not shown"
    apply(plan(studio, number, ctx.settings, GROUPS))
    workers = until(lambda: worker_pids(backend))
    ctx.board.request_round(number, "attached")
    order = backend.wait(number)

    project = Project(ctx.store, number)
    index = project.index()
    assert {task for task, record in index.items() if record.error} == set(faulty)
    clusters = clusters_name(ctx, project)
    assert clusters, "there is a codebook, by the good pictures"
    assert all(ctx.store.exists(project.cluster_key(clusters, task)) for task in good)
    assert worker_pids(backend) == workers, "the worker lives on"
    reasons = {faulty[row["task"]]: row["reason"] for row in status(ctx, number)["unusable"]["tasks"]}
    for name, part in {
        "crash.png": "crashes its decoder (SIGSEGV)",
        "bomb.png": "13300 x 13300 pixels, too many to decode",
        **({"inside.jpg": "cannot be read"} if "inside.jpg" in bad.files else {}),
        "page.jpg": "a web page, perhaps a login",
        "red.png": "cannot be used (RuntimeError: red is not seen): the worker's log says more",
        "cut.png": "save it again as JPEG or PNG",
        "paper.jpg": "it is EPS",
        "served with 500": "answers 500 when asked for this file",
        "not allowed": "'192.0.2.1' is not allowed: add it to FIRSTROW_ALLOWED_HOSTS",
        "no address": "cannot be understood: correct it",
        "empty": "the task has no image",
        "mask": "region r1 of 'seg' cannot be read",
        "not shown": "half a character for example; delete that annotation, or the task",
    }.items():
        assert part in reasons[name]
    assert reasons.keys() == set(faulty.values())
    assert "hunter2" not in "".join(reasons.values())
    text = shown(status(ctx, number))
    assert f"Unusable tasks ({len(faulty)} of {len(faulty)})" in text
    for task, name in faulty.items():  # cause, remedy, next try
        assert re.search(rf" {task} {re.escape(reasons[name])} (now|in [01] min) ", f"{text} ")

    # Until its time has come, the comparison with Label Studio asks for no look at a task that is as it was.
    assert listing(ctx, project, project.config(), index) == (index, set())

    # Mended in Label Studio: tried at once. Unchanged, its time come: tried by itself, and longer is waited.
    mended = next(task for task, name in faulty.items() if name == "empty")
    value = studio.task(good[0], number)["data"]["picture"]
    studio.http.call("PATCH", f"/api/tasks/{mended}/", body={"data": {"picture": value}})
    crash, red = (next(t for t, n in faulty.items() if n == name) for name in ("crash.png", "red.png"))
    index |= {task: replace(index[task], next_try=time.time() - 1) for task in (crash, red)}
    project.save_index(index)
    ctx.board.reconcile(number)
    order = backend.wait(number, order)
    index = project.index()
    assert index[mended].error == ""
    for task in (crash, red):
        assert index[task].tries == 2
        assert index[task].next_try - time.time() > 60
    assert {task for task, record in index.items() if record.error} == set(faulty) - {mended}
    assert worker_pids(backend) == workers

    # A training that comes to nothing leaves the model as it was.
    config = parse(studio.project(number)["label_config"], GROUPS)
    masks = dict(zip(good, pictures.values(), strict=True))
    studio.create_annotation(good[1], Annotator(studio, number, config, masks).full_result(good[1]))
    backend.wait(number, order)
    train_round(ctx, project, project.index(), project.config(), "model-998")
    before = model_info(project)
    assert before["version"] == "model-998"
    monkeypatch.setattr("backend.learn.Recipe", partial(Recipe, head_rate=1e30))
    train_round(ctx, project, project.index(), project.config(), "model-999")
    assert model_info(project) == before
    assert not ctx.store.exists(project.key("models", "model-999.safetensors"))
    error = status(ctx, number)["error"]
    assert error["step"] == "train"
    assert "model-999 is not used, the model in force stays: the loss is nan" in error["message"]

    def unreadable(*_: object) -> None:
        raise ImageFetchError("gone")

    monkeypatch.setattr("backend.images.ImageCache.get", unreadable)
    train_round(ctx, project, project.index(), project.config(), "model-999")
    assert model_info(project) == before
    with pytest.raises(ImageError, match="gone"):
        raise ImageError(ctx.board.error(number)["message"])  # type: ignore[index]
