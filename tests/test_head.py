"""The project's head and the features it learns from, in a real store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from numpy.typing import NDArray
from team import GROUPS, SEG

from backend import features, head
from backend.context import Context, connect
from backend.features import Fit, Held, extractor, held, join_packs, make_fit, write_pack
from backend.head import Model, keep_pixels, learn
from backend.label_config import ProjectConfig, parse, with_coarse
from backend.project import Index, Project, TaskRecord
from backend.settings import Settings
from model.features import spread_pixels
from model.field import render
from model.pixel_pool import PIXELS

#: Most bytes that an image may take in the store.
BOUND = 250_000
SIZE = (160, 120)


@dataclass(frozen=True)
class Field:
    """A project of eight rendered pictures in a store, measured, with a mask of each."""

    ctx: Context
    project: Project
    config: ProjectConfig
    fit: Fit
    masks: Mapping[int, NDArray[np.uint8]]
    index: Index

    def labelled(self, versions: Mapping[int, str]) -> Index:
        """The index in which these tasks have a full annotation of this version."""
        for task, version in versions.items():
            record = replace(self.index[task], version=version)
            maps = extractor(self.ctx.settings.network)[0].maps([render(task, "target", SIZE)[0]])
            mask = self.masks[task] if version == "first" else np.flipud(self.masks[task])
            keep_pixels(self.project, self.config, self.fit, record, maps, np.ascontiguousarray(mask))
        labels = {t: replace(self.index[t], stage="full", version=version) for t, version in versions.items()}
        return {**self.index, **labels}

    def answered(self, masks: Mapping[int, NDArray[np.uint8]]) -> Index:
        """The index in which these tasks have coarse answers."""
        for task, mask in masks.items():
            self.project.save_own_coarse(task, mask, self.config)
        return {**self.index, **{task: replace(self.index[task], coarse=True, version="c") for task in masks}}

    def held(self, index: Index) -> Held:
        return held(self.ctx, self.project, self.fit, index)

    def learn(self, index: Index, number: int = 1) -> Model:
        return learn(self.ctx, self.project, index, self.config, self.held(index), number)[0]


@pytest.fixture
def field(database_url: str, tmp_path: Path) -> Field:
    environment = {**QUICK, "LABEL_STUDIO_API_KEY": "0" * 40, "REDIS_URL": database_url}
    ctx = connect(Settings.read({**environment, "FIRSTROW_STORE": str(tmp_path)}))
    xml = SEG.format(tag="BrushLabels")
    config = parse(with_coarse(xml, parse(xml, GROUPS).classes))
    project, index = ctx.project(7), {t: TaskRecord(t, f"/data/{t}.jpg", size=SIZE) for t in range(1, 9)}
    drawn = {task: render(task, "target", SIZE) for task in index}
    places = spread_pixels((SIZE[1], SIZE[0]), PIXELS)
    raw = list(extractor(ctx.settings.network)[0].sample([image for image, _ in drawn.values()], [places] * 8))
    colours = [image[places[:, 0], places[:, 1]] for image, _ in drawn.values()]
    fit, scaled = make_fit(ctx, raw, colours, np.random.default_rng(0))
    write_pack(ctx, project, fit, list(index.values()), scaled)
    return Field(ctx, project, config, fit, {task: mask for task, (_, mask) in drawn.items()}, index)


def test_labels_that_change_and_go_leave_the_head_of_those_that_are_there(field: Field) -> None:
    field.learn(field.labelled({1: "first", 2: "first", 3: "first"}))
    last = {2: "second", 3: "first", 4: "first"}
    stepwise = field.learn(field.labelled(last), 2)
    head.SUMMED.clear()
    field.project.store.delete(field.project.key("model.json"))
    fresh = field.learn(field.labelled(last), 3)
    assert stepwise.trained == fresh.trained == {str(task): version for task, version in last.items()}
    assert stepwise.head is not None
    assert fresh.head is not None
    assert torch.allclose(stepwise.head.weights, fresh.head.weights, atol=1e-4)
    assert torch.allclose(stepwise.head.bias, fresh.head.bias, atol=1e-4)


def test_nothing_is_learnt_anew_where_nothing_has_changed(field: Field) -> None:
    index = field.labelled({1: "first"})
    first = learn(field.ctx, field.project, index, field.config, field.held(index), 1)
    again = learn(field.ctx, field.project, index, field.config, field.held(index), 2)
    assert (first[0].version, first[1]) == ("model-1", True)
    assert (again[0].version, again[1]) == ("model-1", False)


def test_coarse_answers_predict_before_the_first_label(field: Field) -> None:
    coarse = {task: (field.masks[task] > 0).astype(np.uint8) for task in (1, 2, 3)}
    model = field.learn(field.answered(coarse))
    assert model.version == "coarse-1"
    assert model.learnt is None
    assert model.head is not None
    seen = field.held(field.index).of_image(field.project.store, 5)
    assert seen is not None
    rows, columns = spread_pixels((SIZE[1], SIZE[0]), PIXELS).T
    plant = model.head.probabilities(seen.float())[:, 1:].sum(1).numpy() > 0.5
    assert (plant == (field.masks[5][rows, columns] > 0)).mean() > 0.9


def test_coarse_answers_without_a_foreground_teach_nothing_and_that_is_said(field: Field) -> None:
    index = field.answered({1: np.zeros(SIZE[::-1], np.uint8)})
    model = field.learn({**index, **{t: r for t, r in field.labelled({2: "first"}).items() if t == 2}})
    assert model.coarse is None
    assert model.version == "model-1"
    note = field.project.store.read_json(field.project.key("model.json"))["note"]
    assert "1 pictures have coarse labels" in note
    assert "background and foreground" in note


def test_features_of_another_picture_or_of_damaged_files_are_not_held(field: Field) -> None:
    assert field.held(field.index).places.keys() == field.index.keys()
    other = {**field.index, 3: replace(field.index[3], image="/data/other.jpg")}
    assert field.held(other).places.keys() == field.index.keys() - {3}
    [key] = [key for key in field.project.store.list(field.project.key("features")) if key.endswith(".f16")]
    data = field.project.store.read(key) or b""
    assert len(data) / len(field.index) < BOUND
    features.WHOLE.clear()
    field.project.store.write(key, data[:-2] + b"xx")
    assert list(field.held(field.index).parts(field.project.store, sorted(field.index))) == []
    assert not field.held(field.index).places, "they are computed anew"


def test_small_packs_are_joined_and_nothing_is_lost(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = field.held(field.index)
    before = {task: everything.of_image(field.project.store, task) for task in field.index}
    field.project.store.delete_prefix(field.project.key("features"))
    for task, record in field.index.items():
        seen = before[task]
        assert seen is not None
        write_pack(field.ctx, field.project, field.fit, [record], seen[None])
    join_packs(field.ctx, field.project, field.fit, field.index)
    assert len(field.held(field.index).packs) == len(field.index), "few small packs stay"
    monkeypatch.setattr(features, "MANY", 4)
    left = {task: record for task, record in field.index.items() if task != 8}
    join_packs(field.ctx, field.project, field.fit, left)
    joined = field.held(left)
    assert len(joined.packs) == 1
    assert sorted(joined.packs[0].tasks.tolist()) == sorted(left), "a task that is gone is in no pack"
    for task in left:
        now, then = joined.of_image(field.project.store, task), before[task]
        assert now is not None
        assert then is not None
        assert torch.equal(now, then)


def test_rows_of_a_pack_come_with_their_tasks(field: Field) -> None:
    there = field.held(field.index)
    parts = list(there.parts(field.project.store, [5, 2]))
    assert [ids for ids, _, _ in parts] == [[5, 2]]
    for task, row in zip(parts[0][0], parts[0][1], strict=True):
        alone = there.of_image(field.project.store, task)
        assert alone is not None
        assert torch.equal(alone, row)
