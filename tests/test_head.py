"""The project's head and the features it learns from, in a real store."""

from __future__ import annotations

import zlib
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
from backend.head import Model, keep_pixels, lacks_pixels, learn, load_model, pixels_key
from backend.label_config import ProjectConfig, parse, with_coarse
from backend.leftovers import delete_leftovers
from backend.project import Index, Project, TaskRecord
from backend.settings import Settings
from model.features import spread_pixels
from model.field import render
from model.heads import no_sums
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
        return learn(self.ctx, self.project, index, self.config, self.held(index), number)


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
    assert [field.learn(index, number).version for number in (1, 2)] == ["model-1", "model-1"]


def test_leftovers_go_at_once_where_nobody_works_and_stay_where_they_are_needed_again(field: Field) -> None:
    store, project = field.project.store, field.project
    a, b = project.key("pixels", "a"), project.key("pixels", "b")
    for key in (a, b):
        store.write(key, b"1")
    store.write_json(project.key("state.json"), {"round": 1})
    delete_leftovers(project, {a, b}, idle=False)
    store.write_json(project.key("state.json"), {"round": 9})
    delete_leftovers(project, {a}, idle=False)
    assert (store.exists(a), store.exists(b)) == (False, True)
    delete_leftovers(project, {b}, idle=False)
    assert store.exists(b), "its time begins anew"
    delete_leftovers(project, {b}, idle=True)
    assert not store.exists(b)


def test_sums_are_kept_of_a_few_projects_alone(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SUMMED", {})
    monkeypatch.setattr(head, "PROJECTS", 2)
    for number in (1, 2, 1, 3):
        other = replace(field, project=Project(field.ctx.store, number))
        other.learn(other.labelled({1: "first"}))
    assert [number for _, number in head.SUMMED] == [2, 3], "those that learnt last"


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


def test_rows_that_are_no_numbers_are_not_held(field: Field) -> None:
    store = field.project.store
    about, key = store.list(field.project.key("features"))[::-1]
    data = np.frombuffer(store.read(key) or b"", np.float16).copy()
    data[7] = np.inf
    store.write(key, data.tobytes())
    arrays = store.read_arrays(about) or {}
    arrays["numbers"][1] = zlib.crc32(data.tobytes())
    store.write_arrays(about, arrays)
    features.WHOLE.clear()
    features.remembered.cache_clear()
    assert list(field.held(field.index).parts(store, sorted(field.index))) == []
    assert not field.held(field.index).places, "they are computed anew, and what is wrong is noted there"


def test_pixels_that_are_no_numbers_teach_nothing_and_are_made_anew(field: Field) -> None:
    index = field.labelled({1: "first", 2: "first"})
    key = pixels_key(field.project, field.fit, index[2])
    arrays = field.project.store.read_arrays(key) or {}
    arrays["features"][3, 5] = np.nan
    field.project.store.write_arrays(key, arrays)
    model = field.learn(index)
    assert model.trained == {"1": "first"}
    assert_finite(model)
    assert lacks_pixels(field.project, field.fit, index) == {2}
    assert field.learn(field.labelled({1: "first", 2: "first"}), 2).trained == {"1": "first", "2": "first"}


@pytest.mark.parametrize("part", ["weight", "first", "second"])
def test_a_head_that_is_not_finite_is_not_used_and_the_former_stays(field: Field, part: str) -> None:
    before = field.learn(field.labelled({1: "first", 2: "first"}))
    saved = {name: field.project.store.read(field.project.key(name)) for name in ("model.json", "head.npz")}
    place = (field.project.store.url, field.project.id)
    getattr(head.SUMMED[place].total, part)[1] = torch.nan
    index = field.labelled({1: "first", 2: "first", 3: "first"})
    model = field.learn(index, 2)
    assert (model.version, model.trained) == ("model-1", before.trained)
    assert_finite(model)
    assert {name: field.project.store.read(field.project.key(name)) for name in saved} == saved
    board = field.ctx.board
    said = (board.error(field.project.id) or {})["message"]
    assert said.startswith("model-2 is not used, the model in force stays: ")
    assert "finite" in said
    assert board.redis.exists(f"firstrow:{field.project.id}:retry"), "it is tried again by itself"
    assert field.learn(index, 3).trained.keys() == {"1", "2", "3"}, "and then from sums that are made anew"


def test_a_former_head_of_other_classes_or_other_features_is_no_model(field: Field) -> None:
    field.learn(field.labelled({1: "first"}))
    place = (field.project.store.url, field.project.id)
    index = field.labelled({1: "first", 2: "first"})
    for fit in (field.fit, replace(field.fit, version="another")):
        spoilt = replace(no_sums(field.config.classes.fine, 472), weight=torch.full((3,), torch.nan))
        head.SUMMED[place] = head.Summed(fit.version, {2: "first"}, spoilt)
        there = replace(field.held(index), fit=fit)
        if fit is not field.fit:
            for task in (1, 2):
                data = field.project.store.read(pixels_key(field.project, field.fit, index[task])) or b""
                field.project.store.write(pixels_key(field.project, fit, index[task]), data)
        left = {t: r for t, r in index.items() if t != 1} | {1: replace(index[1], stage="new")}
        model = learn(field.ctx, field.project, left, field.config, there, 2)
        assert bool(model.version) == (fit is field.fit)


def test_a_stored_head_that_is_not_finite_is_made_anew(field: Field) -> None:
    index = field.labelled({1: "first"})
    field.learn(index)
    arrays = field.project.store.read_arrays(field.project.key("head.npz")) or {}
    arrays["head:weights"][0, 0] = np.nan
    field.project.store.write_arrays(field.project.key("head.npz"), arrays)
    assert load_model(field.project) is None
    model = field.learn(index, 2)
    assert model.version == "model-2"
    assert_finite(model)


def assert_finite(model: Model) -> None:
    assert model.head is not None
    assert model.head.weights.isfinite().all()
    assert model.head.bias.isfinite().all()


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
    store, project = field.project.store, field.project
    project.save_index(left)
    useless = features.useless_packs(field.ctx, project, field.fit)
    assert len(useless) == 2 * len(field.index), "all that was joined"
    for number, gone in enumerate([False, False, True], 5):
        project.store.write_json(project.key("state.json"), {"round": number})
        delete_leftovers(project, useless, idle=False)
        assert all(store.exists(key) != gone for key in useless), "what a round reads stays until it is over"
    joined = field.held(left)
    assert len(joined.packs) == 1
    assert sorted(joined.packs[0].tasks.tolist()) == sorted(left), "a task that is gone is in no pack"
    assert features.useless_packs(field.ctx, project, field.fit) == set()
    join_packs(field.ctx, project, field.fit, left)
    assert len(field.held(left).packs) == 1
    for task in left:
        now, then = joined.of_image(field.project.store, task), before[task]
        assert now is not None
        assert then is not None
        assert torch.equal(now, then)


def test_rows_of_a_pack_come_with_their_tasks(field: Field) -> None:
    there, every = field.held(field.index), sorted(field.index)
    for wanted in ([5, 2], every, every[::-1], [*every[3:], *every[:3]]):
        [(ids, rows, kinds)] = there.parts(field.project.store, wanted)
        assert sorted(ids) == sorted(wanted)
        for task, row, own in zip(ids, rows, kinds, strict=True):
            alone = there.of_image(field.project.store, task)
            assert alone is not None
            assert torch.equal(alone, row)
            assert (field.fit.kinds.of(field.fit.kinds.reduced(row[None].numpy()))[0] == own).all()
