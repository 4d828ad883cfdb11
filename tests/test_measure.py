"""What is computed of a picture fails for that picture alone; what is no picture's fault ends the job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from numpy.typing import NDArray
from PIL import Image
from team import GROUPS, SEG

from backend.context import Context, connect
from backend.errors import RoundOver, StoreError
from backend.features import Fit, fit_features, held, load_fit
from backend.head import lacks_pixels, learn
from backend.label_config import ProjectConfig, parse, with_coarse
from backend.masks import show_masks
from backend.measure import measure
from backend.project import HEAD_MASKS, Index, Project, TaskRecord
from backend.score import score_tasks
from backend.settings import Settings
from model.features import Extractor, Maps
from model.field import render
from model.scoring import ImageScore, Scorer

#: The picture of this task is red all over: the network fails at it in the way that a test wants.
RED = 3
Images = Sequence[NDArray[np.uint8]]
Fault = Callable[[Callable[[Images], Maps], Images], Maps]


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Pool:
    """A project of six pictures that a host serves, one of them red, and a store."""

    ctx: Context
    project: Project
    config: ProjectConfig
    index: Index

    def fit(self) -> None:
        """Find how features are scaled, and keep none of them."""
        fit_features(self.ctx, self.project, self.index)
        self.project.store.delete_prefix(self.project.key("features"))

    def measure(self, tasks: Sequence[int]) -> dict[int, str]:
        """Measure these tasks as a shard; what each is noted for."""
        records = [self.index[task] for task in tasks]
        found = measure(self.ctx, self.project, self.config, records, 1, 0)
        return {record.id: record.error for record in found if record and record.error}

    def fitted(self) -> Fit:
        """How features are scaled."""
        fit = load_fit(self.project)
        assert fit is not None
        return fit

    def held(self) -> set[int]:
        """Tasks whose features are in the store."""
        return set(held(self.ctx, self.project, self.fitted(), self.index).places)


@pytest.fixture
def pool(database_url: str, tmp_path: Path) -> Iterator[Pool]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for task in range(1, 7):
        pixels = render(task, "target", (160, 120))[0] if task != RED else np.full((120, 160, 3), (250, 0, 0), np.uint8)
        Image.fromarray(pixels).save(folder / f"{task}.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    environment = {**QUICK, "LABEL_STUDIO_API_KEY": "0" * 40, "REDIS_URL": database_url, "FIRSTROW_ALLOWED_HOSTS": host}
    environment |= {"FIRSTROW_STORE": str(tmp_path / "store"), "FIRSTROW_CACHE": str(tmp_path / "cache")}
    ctx, xml = connect(Settings.read(environment)), SEG.format(tag="BrushLabels")
    index = {task: TaskRecord(task, f"http://{host}/{task}.png", size=(160, 120)) for task in range(1, 7)}
    yield Pool(ctx, ctx.project(7), parse(with_coarse(xml, parse(xml, GROUPS).classes)), index)
    server.shutdown()
    server.server_close()


def fails(monkeypatch: pytest.MonkeyPatch, fault: Fault, every: bool = False) -> None:
    """Have the network fail at red pictures, or at every picture."""
    real = Extractor.maps

    def maps(self: Extractor, images: Images) -> Maps:
        red = any((image[..., 0] > 200).all() and (image[..., 1:] < 60).all() for image in images)
        return fault(partial(real, self), images) if red or every else real(self, images)

    monkeypatch.setattr(Extractor, "maps", maps)


def crash(real: Callable[[Images], Maps], images: Images) -> Maps:
    raise RuntimeError("cannot be seen")


def no_memory(real: Callable[[Images], Maps], images: Images) -> Maps:
    raise MemoryError("no room")


def no_numbers(real: Callable[[Images], Maps], images: Images) -> Maps:
    """What an overflow of half precision leaves."""
    maps = real(images)
    with torch.inference_mode():
        return Maps((*maps.stages[:-1], torch.full_like(maps.stages[-1], torch.nan)), maps.images)


FAULTS = [crash, no_memory, no_numbers]
REASONS = {crash: "RuntimeError: cannot be seen", no_memory: "MemoryError: no room", no_numbers: "not finite numbers"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_that_fails_costs_that_one(pool: Pool, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    pool.fit()
    fails(monkeypatch, fault)
    faulty = pool.measure(sorted(pool.index))
    assert faulty.keys() == {RED}
    assert REASONS[fault] in faulty[RED]
    assert pool.held() == pool.index.keys() - {RED}
    assert pool.measure([RED]).keys() == {RED}, "also where it is tried again alone"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sample_with_a_picture_that_fails_is_that_of_the_others(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    fails(monkeypatch, fault)
    fit_features(pool.ctx, pool.project, pool.index)
    assert pool.fitted().scaling.mean.isfinite().all()
    assert pool.fitted().images == len(pool.index) - 1
    assert pool.measure(sorted(pool.index)).keys() == {RED}


def test_a_pool_in_which_no_picture_can_be_measured_says_why(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, crash)
    bad = replace(pool, index={RED: pool.index[RED]})
    bad.fit()
    assert "cannot be seen" in bad.measure([RED])[RED]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("fitted", [True, False])
def test_a_network_that_fails_at_every_picture_ends_the_job(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, fault: Fault, fitted: bool
) -> None:
    if fitted:
        pool.fit()
    fails(monkeypatch, fault, every=True)
    with pytest.raises(Exception, match=REASONS[fault].rpartition(": ")[2]):
        pool.measure([1, 2])
    with pytest.raises(Exception, match=REASONS[fault].rpartition(": ")[2]):
        pool.measure([1])


def test_a_store_that_cannot_be_written_and_a_project_that_was_stopped_end_the_job(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.fit()
    fails(monkeypatch, crash)
    (Path(pool.ctx.settings.store) / pool.project.key("features")).write_text("in the way of a folder")
    with pytest.raises(StoreError):
        pool.measure(sorted(pool.index))
    pool.ctx.board.stop(pool.project.id)
    with pytest.raises(RoundOver):
        pool.measure(sorted(pool.index))


def labelled(pool: Pool, tasks: Sequence[int]) -> Pool:
    """The pool whose first row of pixels is crop and all else soil, of these tasks."""
    mask = np.zeros((96, 128), np.uint8)
    mask[0] = 1
    for task in tasks:
        pool.project.save_labels(task, mask, pool.config)
    full = {task: replace(pool.index[task], stage="full", version="v") for task in tasks}
    return replace(pool, index={**pool.index, **full})


def test_a_label_of_whose_pixels_the_network_makes_no_numbers_is_not_kept(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.fit()
    assert not pool.measure(sorted(pool.index))
    there = labelled(pool, [RED, 4])
    fails(monkeypatch, no_numbers)
    assert "not finite numbers" in there.measure([RED, 4])[RED]
    assert lacks_pixels(pool.project, pool.fitted(), there.index) == {RED}


def test_a_network_that_fails_at_every_label_ends_the_job(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.fit()
    assert not pool.measure(sorted(pool.index))
    fails(monkeypatch, crash, every=True)
    with pytest.raises(RuntimeError, match="cannot be seen"):
        labelled(pool, [1, 2]).measure([1, 2])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_whose_mask_fails_costs_that_one(pool: Pool, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    pool.fit()
    there = labelled(pool, [1, 2])
    assert not there.measure(sorted(pool.index))
    fit = pool.fitted()
    model = learn(pool.ctx, pool.project, there.index, pool.config, held(pool.ctx, pool.project, fit, there.index), 1)
    fails(monkeypatch, fault)
    assert show_masks(pool.ctx, pool.project, there.index, fit, model, [4, RED, 5])
    shown = [task for task in there.index if pool.project.prediction(HEAD_MASKS, task, pool.config.classes.fine)]
    assert shown == [4, 5]


def test_scores_by_a_trained_network_fail_for_the_pictures_alone_or_end_the_job(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Scorer.score

    def score(self: Scorer, image: NDArray[np.uint8], target: NDArray[np.uint8]) -> ImageScore:
        if every or (image[..., 0] > 200).all():
            raise RuntimeError("cannot be seen")
        return real(self, image, target)

    monkeypatch.setattr(Scorer, "score", score)
    every, red = False, [pool.index[RED], replace(pool.index[RED], id=7)]
    for records in (red[:1], red, [*red, pool.index[4]]):
        faulty = score_tasks(pool.ctx, pool.project, records, pool.config)
        assert [record.id for record in faulty] == [record.id for record in records if record in red]
    every = True
    for records in ([pool.index[4]], [*red, pool.index[4]]):
        with pytest.raises(RuntimeError, match="cannot be seen"):
            score_tasks(pool.ctx, pool.project, records, pool.config)
