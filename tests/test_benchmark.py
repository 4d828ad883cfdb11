"""The benchmark: what it measures, that it is repeatable, that it goes on where it was stopped; on a rendered field."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from backend import bench, cli
from backend.embedded import start_worker
from backend.enqueue import Board
from backend.errors import BenchError
from model import results
from model.arena import Arena, Known, Labelled, Learner, recipe_of
from model.benchmark import SCALES, WITHOUT_COARSE, Curve, run, stage, without_gap
from model.classes import IGNORE
from model.coarse import ASKED
from model.effort import CLICK, OPEN, TRACE, correct, from_scratch
from model.experiment import Experiment
from model.features import Extractor
from model.field import write_folder
from model.frozen import encode_views, train_head
from model.masks import predict
from model.metrics import confusion, mean_iou
from model.network import SHIPPED, save
from model.results import FULL, Row
from model.scoring import Encoded
from model.strategies import REFERENCES, STRATEGIES

SMOKE = SCALES["smoke"]


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of eight images and a test set of three."""
    folder = tmp_path_factory.mktemp("data") / "field"
    write_folder(folder, 8, 3, "target", seed=5)
    return folder


@pytest.fixture(scope="module")
def arena(field: Path) -> Arena:
    return Arena(field, SMOKE.size, True, SHIPPED, "pretrained", "cpu")


def curve(field: Path, strategy: str = "entropy", **changes: object) -> Curve:
    """A short curve."""
    plain = Curve(str(field), strategy, 0, (1, 2, 3), "smoke", SHIPPED, "pretrained", True, "last", "abc")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def timeless(row: Row) -> Row:
    """A row without what differs from run to run."""
    return dataclasses.replace(row, train_seconds=0.0, score_seconds=0.0)


# -- effort ------------------------------------------------------------------------------------------------------


def stripes(*widths: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(20, 40) upright stripes of a width and a class each."""
    row = np.concatenate([np.full(width, label, np.uint8) for width, label in widths])
    return np.tile(row, (20, 1))


def test_a_right_prelabel_costs_no_click() -> None:
    mask = stripes((20, 0), (20, 1))
    assert correct(mask, mask) == (0, 0.0, 0.0)
    assert correct(mask, mask).seconds == OPEN


def test_a_wrong_piece_costs_a_click_and_what_is_left_is_traced() -> None:
    mask = stripes((10, 0), (10, 1), (20, 0))
    assert correct(stripes((10, 0), (10, 2), (20, 0)), mask) == (1, 0.0, 0.0)
    # The piece covers five columns too many: they stay wrong, and their two edges are traced.
    effort = correct(stripes((10, 0), (15, 1), (15, 0)), mask)
    assert effort.clicks == 0
    assert effort.repaint == pytest.approx(5 / 40)
    assert effort.outline == pytest.approx(2 * 20 / 40)
    assert effort.seconds == pytest.approx(OPEN + TRACE * effort.outline)


def test_slivers_are_not_traced_and_unknown_pixels_cost_nothing() -> None:
    mask = stripes((20, 0), (20, 1))
    assert correct(stripes((21, 0), (19, 1)), mask).outline == 0
    assert correct(stripes((21, 0), (19, 1)), mask).repaint == pytest.approx(1 / 40)
    unknown = np.where(np.arange(40) < 30, mask, IGNORE).astype(np.uint8)
    assert correct(stripes((30, 0), (10, 2)), unknown).clicks == 0
    assert correct(mask, np.full_like(mask, IGNORE)) == (0, 0.0, 0.0)
    assert from_scratch(np.full_like(mask, IGNORE)) == (0, 0.0, 0.0)


def test_specks_of_a_prelabel_are_joined_to_what_is_around() -> None:
    mask = np.zeros((40, 40), np.uint8)
    speck = mask.copy()
    speck[20, 20:27] = 1  # less than half a per cent
    assert correct(speck, mask) == (0, 0.0, 0.0)
    speck[18:22, 20:27] = 1
    assert correct(speck, mask).clicks == 1


def test_painting_from_scratch_begins_each_piece_that_is_not_background() -> None:
    effort = from_scratch(stripes((5, 0), (5, 1), (20, 0), (5, 2), (5, 0)))
    assert effort.clicks == 2
    assert effort.repaint == pytest.approx(10 / 40)
    assert effort.outline == pytest.approx(4 * 20 / 40)
    assert effort.seconds == pytest.approx(OPEN + 2 * CLICK + TRACE * 2)


def test_efforts_of_maps_that_differ_in_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the prelabel is \(20, 40\), the mask \(20, 39\)"):
        correct(stripes((40, 0)), stripes((39, 0)))


# -- coarse labels and training ------------------------------------------------------------------------------------


def test_coarse_labels_of_five_images_tell_plants_from_soil(arena: Arena) -> None:
    coarse, classes = arena.coarse, arena.classes
    assert len(set(coarse.asked)) == ASKED
    assert coarse.seconds == pytest.approx(OPEN * ASKED + CLICK * coarse.clicks)
    right = decided = 0
    for target, mask in zip(coarse.targets, arena.masks, strict=True):
        known = target != classes.any_row
        right += int(classes.sets()[target[known], mask[known]].sum())
        decided += int(known.sum())
    assert decided > 0.5 * sum(mask.size for mask in arena.masks)
    assert right > 0.9 * decided


def test_a_head_learns_and_its_backbone_stays(arena: Arena) -> None:
    start = arena.begin(0)
    recipe = recipe_of(40, 4, SMOKE.size, True)
    views = [encode_views(start, arena.pair(i, False), arena.classes, SMOKE.size, "cpu", rng()) for i in range(4)]
    trained = train_head(start, views, [], arena.classes, recipe)
    assert mean_iou(arena.test(trained)) > mean_iou(arena.test(start)) + 0.1
    for before, after in zip(start.backbone().parameters(), trained.backbone().parameters(), strict=True):
        assert torch.equal(before, after)
    again = train_head(start, views, [], arena.classes, recipe)
    for one, other in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_head_learns_nothing_from_nothing(arena: Arena) -> None:
    with pytest.raises(ValueError, match="at least one labelled image"):
        train_head(arena.begin(0), [], [], arena.classes, recipe_of(1, 1, 64, True))


def test_without_any_label_the_start_is_tested(arena: Arena) -> None:
    network, seconds = Learner(arena, recipe_of(1, 2, 64, True), 3, weak=False).train([])
    assert seconds == 0
    for one, other in zip(network.parameters(), arena.begin(3).parameters(), strict=True):
        assert torch.equal(one, other)


def test_features_computed_once_score_like_the_image(arena: Arena) -> None:
    network = arena.begin(0)
    known = Known(coarse=True, labelled=frozenset([0]))
    assert isinstance(arena._encoded[0], Encoded)
    by_features, by_image = arena.score(network, known, (), "last"), arena.score(network, known, (), "all")
    for one, other in zip(by_features, by_image, strict=True):  # the former at every second pixel
        assert one.entropy == pytest.approx(other.entropy, rel=0.02)
        assert one.foreground == pytest.approx(other.foreground, abs=0.02)
        whole = len(one.features) // 2
        np.testing.assert_allclose(one.features[:whole], other.features[:whole], rtol=1e-4, atol=1e-4)


def test_the_oracle_sees_hidden_masks(arena: Arena) -> None:
    network = arena.begin(0)
    nothing = Known(coarse=False, labelled=frozenset())
    everything = Known(coarse=False, labelled=frozenset(range(len(arena.names))))
    hidden = arena.score(network, nothing, ("oracle",), "last")
    told = arena.score(network, everything, (), "last")
    assert [s.extras["oracle"] for s in hidden] == pytest.approx([s.magnitude for s in told])
    assert all(s.magnitude == 0 for s in hidden)


# -- curves --------------------------------------------------------------------------------------------------------


def test_a_curve_has_a_row_for_every_n(field: Path) -> None:
    rows = list(run(curve(field), [], "cpu"))
    assert [row.n for row in rows] == [0, 1, 2, 3]
    assert [len(row.image.split()) for row in rows] == [0, 1, 1, 1]
    picked = " ".join(row.image for row in rows).split()
    assert len(set(picked)) == 3
    for row in rows:
        assert 0 < row.mIoU < 1
        assert row.iou.keys() == {"soil", "crop", "weed"}
        assert row.mIoU == pytest.approx(np.mean(list(row.iou.values())))
        assert (row.setting, row.set, row.strategy, row.commit) == ("pretrained smoke", "field", "entropy", "abc")
        assert row.coarse_seconds > 0
    assert all(0 < row.full_seconds <= row.scratch_seconds for row in rows[1:])


@pytest.mark.parametrize("name", [*STRATEGIES, *REFERENCES])
def test_every_strategy_runs_where_labels_are_hidden(field: Path, name: str) -> None:
    rows = list(run(curve(field, name, steps=(1,)), [], "cpu"))
    assert [row.n for row in rows] == [0, 1]
    assert rows[1].image, "it chose by what scoring gave it; choices after the first are in test_strategies"


@pytest.mark.parametrize("name", [*STRATEGIES, *REFERENCES])
def test_every_strategy_runs_with_the_instant_learner(field: Path, name: str) -> None:
    rows = list(run(curve(field, name, learner="instant"), [], "cpu"))
    assert [row.n for row in rows] == [0, 1, 2, 3]
    assert len({row.image for row in rows[1:]}) == 3
    assert {row.setting for row in rows} == {"instant 128 px"}
    assert rows[3].mIoU > 0.4


def test_the_instant_learner_has_no_chance_in_it(field: Path) -> None:
    whole = [timeless(row) for row in run(curve(field, "first-row", learner="instant"), [], "cpu")]
    again = [timeless(row) for row in run(curve(field, "first-row", learner="instant"), whole[:2], "cpu")]
    assert whole[:2] + again == whole
    other = [timeless(row) for row in run(curve(field, "random", learner="instant", seed=1), [], "cpu")]
    assert other[0].mIoU == whole[0].mIoU, "a seed picks; it does not learn"


def test_the_instant_learner_knows_plants_from_coarse_labels_alone(field: Path) -> None:
    coarse, nothing = (next(iter(run(curve(field, learner="instant", weak=weak), [], "cpu"))) for weak in (True, False))
    assert coarse.mIoU > nothing.mIoU
    assert coarse.iou["soil"] > 0.8
    assert coarse.iou["weed"] == 0, "crop and weed are alike to it: the first of them is taken everywhere"


def test_the_test_scores_the_masks_that_people_would_be_shown(field: Path) -> None:
    experiment, extractor = Experiment(field, SMOKE.size, SHIPPED, "cpu"), Extractor(SHIPPED, "cpu")
    head, _ = experiment.train([0, 3], weak=True)
    table = np.zeros((3, 3), np.int64)
    for image, mask in Labelled.read(field, SMOKE.size).tests:
        table += confusion(predict(extractor.maps([image]), experiment._scaling, head)[0], mask, 3)
    assert np.array_equal(experiment.test(head), table)


def test_the_instant_reference_learns_the_whole_pool(field: Path) -> None:
    (row,) = run(curve(field, FULL, learner="instant"), [], "cpu")
    assert (row.n, row.strategy, row.image) == (8, FULL, "")
    assert row.mIoU > 0.5


def test_there_is_no_third_learner(field: Path) -> None:
    with pytest.raises(ValueError, match="no learner 'lazy'"):
        next(iter(run(curve(field, learner="lazy"), [], "cpu")))


def test_same_seed_same_picks_and_another_seed_another_start(field: Path) -> None:
    first, second = ([timeless(row) for row in run(curve(field), [], "cpu")] for _ in range(2))
    assert first == second
    other = next(iter(run(curve(field, seed=1), [], "cpu")))
    assert other.mIoU != first[0].mIoU


def test_a_stopped_curve_goes_on_as_if_it_had_not_stopped(field: Path) -> None:
    whole = [timeless(row) for row in run(curve(field, "first-row"), [], "cpu")]
    rest = [timeless(row) for row in run(curve(field, "first-row"), whole[:2], "cpu")]
    assert whole[:2] + rest == whole
    assert len({row.image for row in whole[1:]}) == len(whole) - 1, "each choice is another image"


def test_rows_after_a_gap_are_run_again(field: Path) -> None:
    whole = list(run(curve(field), [], "cpu"))
    assert [row.n for row in without_gap([whole[0], whole[1], whole[3]], (1, 2, 3))] == [0, 1]


def test_without_weak_labels_uncertainty_costs_no_coarse_label(field: Path) -> None:
    rows = list(run(curve(field, weak=False, steps=(1,)), [], "cpu"))
    assert [row.coarse_seconds for row in rows] == [0, 0]
    assert {row.setting for row in rows} == {"pretrained smoke, no weak labels"}
    coarse = list(run(curve(field, "coarse-egl", weak=False, steps=(1,)), [], "cpu"))
    assert coarse[1].coarse_seconds > 0
    assert set(STRATEGIES) >= WITHOUT_COARSE


def test_the_reference_learns_the_whole_pool(field: Path) -> None:
    (row,) = run(curve(field, FULL), [], "cpu")
    assert (row.n, row.strategy, row.image) == (8, FULL, "")
    assert list(run(curve(field, FULL), [row], "cpu")) == []


def test_a_pool_smaller_than_the_budget_ends_the_curve(field: Path) -> None:
    rows = list(run(curve(field, "random", steps=(4, 8, 12)), [], "cpu"))
    assert [row.n for row in rows] == [0, 4, 8]
    assert {row.setting for row in rows} == {"pretrained smoke, query size 4"}


@pytest.mark.parametrize("layers", ["head", "all"])
def test_gradients_of_more_layers_choose_too(field: Path, layers: str) -> None:
    rows = list(run(curve(field, "direction-range", layers=layers, steps=(1, 2)), [], "cpu"))
    assert len(rows) == 3
    assert rows[0].setting == f"pretrained smoke, layers={layers}"


def test_a_source_network_is_where_every_training_starts(field: Path, tmp_path: Path) -> None:
    arena = Arena(field, SMOKE.size, True, SHIPPED, "pretrained", "cpu")
    trained, _ = Learner(arena, recipe_of(30, 4, SMOKE.size, True), 0, False).train(range(8))
    path = tmp_path / "source.safetensors"
    save(trained, path, {"classes": "soil\ncrop\nweed"})
    start = curve(field, "random", start=str(path), weak=False, steps=(1,))
    rows = list(run(start, [], "cpu"))
    assert rows[0].setting == "source smoke, no weak labels"
    assert rows[0].mIoU == pytest.approx(mean_iou(arena.test(trained)))
    save(trained, path, {"classes": "sky\nroad\ncar"})
    stage.cache_clear()
    assert next(iter(run(start, [], "cpu"))).mIoU != pytest.approx(rows[0].mIoU)  # other classes: a fresh head


def test_a_curve_travels_as_json(field: Path) -> None:
    assert Curve.from_json(curve(field).to_json()) == curve(field)


# -- results file --------------------------------------------------------------------------------------------------


def row(n: int = 1, **changes: object) -> Row:
    """A row."""
    plain = Row(
        "a, b",
        "s",
        "x",
        0,
        n,
        "p q",
        0.5,
        {"a=b": 0.25, "c": math.nan},
        1.5,
        2.5,
        3.5,
        4,
        0.5,
        6,
        0.75,
        8.0,
        9.0,
        "c",
        "d",
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    results.append(tmp_path / "r" / "results.csv", [row(1), row(2, setting='quote " and, comma')])
    results.append(tmp_path / "r" / "results.csv", [row(1, mIoU=0.9)])
    found = results.read(tmp_path / "r" / "results.csv")
    assert [r.n for r in found] == [1, 2]
    assert found[0].mIoU == 0.5  # what was written first counts
    assert found[0].iou["a=b"] == 0.25
    assert math.isnan(found[0].iou["c"])
    assert found[1] == dataclasses.replace(row(2, setting='quote " and, comma'), iou=found[1].iou)
    assert results.read(tmp_path / "none.csv") == []


def test_a_line_that_was_cut_off_by_a_kill_is_left_out_and_written_again(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    results.append(file, [row(1), row(2)])
    file.write_text(file.read_text()[:-20])
    assert [r.n for r in results.read(file)] == [1]
    results.append(file, [row(3)])
    assert [r.n for r in results.read(file)] == [1, 3]


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(results.ResultsError, match="other columns than setting, set"):
        results.read(file)
    file.unlink()
    results.append(file, [row(1), row(2)])
    file.write_text(file.read_text().replace(",0.5,", ",half,", 1))
    with pytest.raises(results.ResultsError, match="line 2 is damaged"):
        results.read(file)


# -- the command ---------------------------------------------------------------------------------------------------


def command(field: Path, out: Path, *more: str) -> list[str]:
    """A small benchmark."""
    plain = ["bench", "run", "--data", str(field), "--strategies", "random,entropy", "--budget", "2", "--seeds", "1"]
    return [*plain, "--scale", "smoke", "--workers", "2", "--out", str(out), *more]


def keys(out: Path) -> set[tuple[str, int, int]]:
    return {(r.strategy, r.seed, r.n) for r in results.read(out / "results.csv")}


#: Random has three times the seeds; the reference one row.
EXPECTED = (
    {("entropy", 0, n) for n in range(3)} | {("random", s, n) for s in range(3) for n in range(3)} | {(FULL, 0, 8)}
)


def test_the_command_runs_resumes_after_a_kill_and_has_nothing_left_to_do(
    field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-m", "backend.cli", *command(field, tmp_path)]
    process = subprocess.Popen(program, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "results.csv").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = (tmp_path / "results.csv").read_text()
    assert cli.main(command(field, tmp_path)) == 0
    assert (tmp_path / "results.csv").read_text().startswith(before[: before.rfind("\n") + 1])
    assert keys(tmp_path) == EXPECTED
    capsys.readouterr()
    assert cli.main(command(field, tmp_path)) == 0
    assert capsys.readouterr().out.startswith("0 rows written")


def test_workers_of_the_queue_give_the_same_rows(field: Path, tmp_path: Path, database_url: str) -> None:
    environment = {"REDIS_URL": database_url, "LABEL_STUDIO_API_KEY": "0" * 40, "FIRSTROW_STORE": str(tmp_path / "s")}
    order = orders(field, tmp_path / "queue")
    (tmp_path / "logs").mkdir()
    with start_worker(tmp_path / "logs", environment):
        written = bench.bench(order, 1, Board(database_url), quiet())
    assert written == len(EXPECTED)
    bench.bench(orders(field, tmp_path / "here"), 1, None, quiet())
    assert keys(tmp_path / "queue") == EXPECTED
    here, queue = (
        {r.key: timeless(r) for r in results.read(tmp_path / name / "results.csv")} for name in ("here", "queue")
    )
    for key, found in here.items():
        assert queue[key].image == found.image
        assert queue[key].mIoU == pytest.approx(found.mIoU, abs=0.02)  # threads add up in another order


def orders(field: Path, out: Path, **changes: object) -> bench.Order:
    """The same benchmark."""
    names = ("random", "entropy")
    plain = bench.Order((field,), names, 2, (), 1, 1, "smoke", SHIPPED, "pretrained", None, True, "last", out, "deep")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def test_the_deep_learner_runs_from_the_command_too(field: Path, tmp_path: Path) -> None:
    assert cli.main(command(field, tmp_path, "--learner", "deep")) == 0
    assert keys(tmp_path) == EXPECTED
    assert {row.setting for row in results.read(tmp_path / "results.csv")} == {"pretrained smoke"}


def quiet() -> bench.Console:
    return bench.Console(file=io.StringIO())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ("best",)}, "there is no strategy best: choose from first-row"),
        ({"start": "scratch"}, "trains no backbone, so it cannot start from scratch"),
        ({"tail": (2, 5)}, "must lie beyond the budget 2"),
        ({"learner": "instant", "layers": "head"}, "need --learner deep"),
        ({"learner": "instant", "start": "scratch"}, "need --learner deep"),
    ],
)
def test_orders_that_make_no_sense_are_refused(
    field: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        bench.bench(orders(field, tmp_path, **changes), 1, None, quiet())


def test_two_folders_of_one_name_are_refused(field: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="called the same"):
        bench.check(orders(field, tmp_path, data=(field, tmp_path / "other" / "field")))


def test_a_curve_that_fails_is_named_and_the_others_are_kept(field: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BenchError, match=r"5 of 10 curves failed, first: empty, .*dataset\.json"):
        bench.bench(orders(field, tmp_path / "out", data=(empty, field)), 1, None, quiet())
    assert keys(tmp_path / "out") == EXPECTED


def test_folders_that_cannot_be_read_are_named_before_anything_runs(
    field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    gone, empty = tmp_path / "gone", tmp_path / "empty"
    for wrong in ((gone,), (empty,), (field, gone)):
        folders = [argument for folder in wrong for argument in ("--data", str(folder))]
        command = ["bench", "run", *folders, "--strategies", "random", "--out", str(tmp_path / "out")]
        assert cli.main(command) == 1
        hint = "name a folder with dataset.json, images and masks"
        assert capsys.readouterr().err == f"firstrow: {wrong[-1]} has no dataset.json: {hint}\n"
    with pytest.raises(BenchError, match=r"^.*gone has no dataset\.json"):
        bench.bench(orders(field, tmp_path / "out", source=gone), 1, None, quiet())


def test_a_tail_and_a_larger_query_size_are_planned(field: Path, tmp_path: Path) -> None:
    (first, *_) = bench.plan(orders(field, tmp_path, budget=6, query_size=3, tail=(7, 8)))
    assert first.steps == (3, 6, 7, 8)
    assert first.commit


def test_the_source_is_learnt_once(field: Path, tmp_path: Path) -> None:
    order = orders(field, tmp_path, source=field)
    (first, *_) = bench.plan(order)
    written = Path(first.start).stat().st_mtime_ns
    (again, *_) = bench.plan(order)
    assert Path(again.start).stat().st_mtime_ns == written
    assert again.setting == "source smoke"


def test_both_fields_are_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RENDERED", {"source": (1, 1), "target": (2, 1)})
    assert cli.main(["bench", "render", str(tmp_path)]) == 0
    assert len(list((tmp_path / "field-target" / "images").iterdir())) == 3
    assert len(list((tmp_path / "field-source" / "images").iterdir())) == 2


def test_a_report_of_nothing_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "report", str(tmp_path)]) == 1
    assert "has no results.csv: run firstrow bench run" in capsys.readouterr().err
