"""The report of a benchmark: a better strategy wins, an equal one does not, and whatever is missing is said."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_statistics import base, better, curve, equal, row, scene

from backend import bench
from backend.errors import BenchError
from model import results
from model.figures import gains, learning_curves
from model.report_axes import COLOURS, FAMILIES, look
from model.report_sections import interface
from model.results import FULL, Row
from model.statistics import REFERENCES, grouped
from model.summary import summarise


def test_a_summary_holds_what_was_put_in() -> None:
    facts = summarise(scene())["settings"]["pretrained head"]["sets"]["field"]
    assert facts["full_supervision"] == {"mean": pytest.approx(0.8), "seeds": 2}
    assert facts["coarse_seconds"] == 30
    typical, chance = facts["strategies"]["typiclust"], facts["strategies"]["random"]
    assert typical["seeds"] == 5
    assert chance["seeds"] == 9
    assert typical["versus"]["random"]["p_holm"] < 0.001
    assert facts["strategies"]["entropy"]["versus"]["random"]["p_holm"] > 0.05
    assert typical["images_to_90"] == 9  # 0.5 + 0.05 + 0.02 n >= 0.72, noise apart
    assert typical["seconds_to_90"] == pytest.approx(30 + 60 * 9)
    assert typical["scratch_seconds_to_90"] == pytest.approx(100 * 9)
    assert typical["clicks_to_90"] == pytest.approx(27)
    assert chance["images_to_95"] is None
    assert chance["seconds_to_95"] is None


def with_settings() -> list[Row]:
    """A scene with every part of the report: no weak labels, other layers, a second set."""
    rows = scene()
    rows += curve("random", lambda s, n: base(s, n) - 0.1, range(3), setting="pretrained head, no weak labels")
    rows += curve("typiclust", equal, range(3), setting="pretrained head, layers=head")
    return rows + [Row(**{**vars(r), "set": "<other>"}) for r in rows]


def test_settings_that_differ_by_one_thing_are_compared() -> None:
    facts = summarise(with_settings())
    weak = facts["refinement"]["pretrained head"]["field"]["random"]
    assert weak["seeds"] == 3
    assert weak["points"]["0"]["difference"]["mean"] == pytest.approx(0.1)
    assert weak["points"]["5"]["mIoU"][0] == pytest.approx(weak["points"]["5"]["mIoU"][1] + 0.1)
    assert facts["layers"]["head"]["pretrained head"]["field"]["typiclust"]["auc"]["mean"] > 0.03
    assert facts["layers"]["all"] == {}


def test_the_report_is_complete_and_the_same_each_time(tmp_path: Path) -> None:
    results.append(tmp_path / "results.csv", with_settings())
    page = bench.report(tmp_path)
    names = ("summary.json", "report.md", "report.html")
    first = {name: (tmp_path / name).read_bytes() for name in names}
    first |= {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    bench.report(tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == first[name]
    for picture in (tmp_path / "figures").iterdir():
        assert picture.read_bytes() == first[picture.name]
        assert len(set(Image.open(picture).convert("L").tobytes())) > 10, picture  # not blank
    text, markdown = page.read_text(), (tmp_path / "report.md").read_text()
    for path in (tmp_path / "figures").iterdir():
        assert f'src="figures/{path.name}"' in text
        assert f"(figures/{path.name})" in markdown
    json.loads((tmp_path / "summary.json").read_text())
    for what in ("curves", "auc", "gain", "penalty", "cost", "effort", "classes-field", "refinement", "layers"):
        assert f"figures/pretrained-head-{what}.png" in markdown, what
    assert "typiclust has the largest area" in markdown
    assert "against random" in markdown
    assert "significantly better typiclust (+0.0" in markdown
    assert "significantly worse none; 1 not to be told apart, first among them entropy" in markdown
    assert "<other>" not in text
    assert "<b>weed" not in text
    assert r"&lt;b&gt;weed\|&lt;/b&gt;" in markdown  # a table's cell, in one piece
    assert "foreground-random in 0 of 6 comparisons" in markdown
    assert "strategies of one seed do not start alike" in markdown
    assert "above random at every n from 1 to 10, the last n there is" in markdown
    assert max(p.stat().st_size for p in (tmp_path / "figures").iterdir() if p.name != "label-coarse.png") < 150_000


def pairs_of_seeds(noise: float, setting: str) -> list[Row]:
    """Curves of eight seeds; two neighbours pick the same images, and training deviates by so much between them."""
    rows = []
    for seed in range(8):
        choice, training = 0.05 * np.sin(3 * (seed // 2)), noise * (1 if seed % 2 else -1)
        for one in curve("entropy", lambda _, n, up=choice + training: 0.5 + 0.02 * n + up, [seed], setting=setting):
            rows.append(replace(one, image=f"{seed // 2}-{one.n}" if one.n else ""))
    return rows


def test_what_training_adds_to_the_spread_is_told_from_what_choice_does(tmp_path: Path) -> None:
    facts = summarise(pairs_of_seeds(0.004, "pretrained head"))["settings"]["pretrained head"]["sets"]["field"]
    found = facts["variance"]
    assert found["training"]["number"] == 4 * 10
    assert found["training"]["variance"] == pytest.approx(2 * 0.004**2)  # two values 2 d apart have variance 2 d^2
    areas = np.array([0.05 * np.sin(3 * (seed // 2)) + 0.004 * (1 if seed % 2 else -1) for seed in range(8)])
    assert found["area"] == pytest.approx(areas.var(ddof=1))
    share = found["training"]["variance"] / found["area"]
    text = report_of(tmp_path, pairs_of_seeds(0.004, "pretrained head"))
    assert f"Training makes at most {share:.0%} of the areas' variance, choice at least {1 - share:.0%}." in text
    assert "a seed fixes initial head" in text


def test_the_instant_learner_has_choice_alone(tmp_path: Path) -> None:
    text = report_of(tmp_path, pairs_of_seeds(0.0, "instant 256 px"))
    assert "All of it is choice" in text
    assert "40 repeats differ by 0.000000 at most" in text
    assert "a seed fixes which part of the pool may be picked from" in text
    assert "a seed fixes initial head" not in text


def test_where_no_images_were_learnt_twice_training_is_not_guessed(tmp_path: Path) -> None:
    rows = [replace(one, image=f"{one.seed}-{one.n}" if one.n else "") for one in scene() if one.strategy != FULL]
    assert "How much of it is training cannot be told" in report_of(tmp_path, rows)


def test_no_win_is_claimed_of_one_seed(tmp_path: Path) -> None:
    results.append(tmp_path / "results.csv", curve("random", base, [0]) + curve("typiclust", better, [0]))
    bench.report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "significantly better" not in text
    assert "too few seeds to compare with random" in text
    assert "(one seed)" in text
    assert "1 seed only, fewer than the protocol's five" in text
    assert "Left out: no setting was run both with and without weak labels" in text


def test_results_of_a_run_that_has_just_begun_make_a_report(tmp_path: Path) -> None:
    results.append(tmp_path / "results.csv", curve("random", base, [0], [0]))
    bench.report(tmp_path)
    assert "No curve is complete yet" in (tmp_path / "report.html").read_text()


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("a,b\n")
    with pytest.raises(BenchError, match="other columns"):
        bench.report(tmp_path)


def report_of(folder: Path, rows: Sequence[Row]) -> str:
    """The Markdown made of some rows."""
    results.append(folder / "results.csv", rows)
    bench.report(folder)
    json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)
    return (folder / "report.md").read_text()


def test_every_strategy_has_a_look_of_its_own() -> None:
    known = [*REFERENCES, *(name for members in FAMILIES.values() for name in members)]
    assert len({str(look(name)) for name in known}) == len(known)
    assert look("mine") == look("mine") != look("first-row")
    assert {"random", "typiclust"} <= set(known)


def test_a_figure_shows_colours_as_they_are(tmp_path: Path) -> None:
    report_of(tmp_path, tiny() + curve("entropy", equal, [0, 1], range(4)))
    drawn = Image.open(tmp_path / "figures" / "pretrained-head-curves.png").convert("RGB")
    found = {f"#{r:02X}{g:02X}{b:02X}" for _, (r, g, b) in drawn.getcolors(1 << 24) or []}
    assert {"#FFFFFF", look("typiclust")["color"], look("entropy")["color"]} <= found
    assert look("badge")["color"] in COLOURS


def test_legends_name_what_any_set_of_the_row_has() -> None:
    rows = scene() + [replace(r, set="other") for r in curve("random", base) + curve("mine", equal)]
    sets = grouped(rows)["pretrained head"]
    for figure in (learning_curves(sets), gains(sets, summarise(rows)["settings"]["pretrained head"]["sets"])):
        assert figure is not None
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        assert {"entropy", "typiclust", "mine"} <= {t.get_text() for one in legends for t in one.get_texts()}


def test_panels_have_one_scale() -> None:
    rows = scene() + [replace(r, set="other", mIoU=r.mIoU / 4) for r in scene()]
    spans = {round(high - low, 9) for low, high in (a.get_ylim() for a in learning_curves_of(rows))}
    assert len(spans) == 1


def learning_curves_of(rows: Sequence[Row]):  # type: ignore[no-untyped-def]
    return learning_curves(grouped(rows)["pretrained head"]).axes


def tiny(**changes: object) -> list[Row]:
    """The least that makes a report."""
    rows = curve("random", base, [0, 1], range(4)) + curve("typiclust", better, [0, 1], range(4))
    return [replace(r, **changes) for r in rows]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(curve("random", base, steps=[0, 1, 25]), id="no tail without a curve"),
        pytest.param(tiny(set="a$\\frac$b | <i>"), id="formula"),
        pytest.param([*tiny(), *curve("random", base, [77], setting="pretrained head, no weak labels")], id="no pairs"),
        pytest.param([*tiny(iou={"soil": 0.5, "weed": math.nan}), row(FULL, 9, 50, math.nan)], id="no number"),
        pytest.param(curve("mine", base, steps=range(3)) + curve("yours", better, steps=range(3)), id="unknown names"),
        pytest.param(tiny() + curve("random", base, [0, 1], [5, 25, 50]), id="tail"),
        pytest.param([row(FULL, 0, 50, 0.8)], id="only full supervision"),
        pytest.param([], id="nothing"),
    ],
)
def test_a_report_is_made_of_any_rows(tmp_path: Path, rows: list[Row]) -> None:
    text = report_of(tmp_path, rows)
    assert "# Which image next" in text
    assert "<i>" not in text
    assert "nan" not in text.split()
    assert ("-tail.png" in text) == any(r.n == 50 and r.strategy != FULL for r in rows)


def test_equal_names_of_files_get_a_number(tmp_path: Path) -> None:
    rows = [replace(r, set=name) for name in ("a b", "a-b") for r in curve("random", base, [0], range(3))]
    text = report_of(tmp_path, rows)
    assert "(figures/pretrained-head-classes-a-b.png)" in text
    assert "(figures/pretrained-head-classes-a-b-2.png)" in text


def test_what_rows_come_from_and_what_is_not_done_is_told(tmp_path: Path) -> None:
    rows = [*tiny(), *(replace(r, commit="def+") for r in curve("entropy", equal, range(3), range(4)))]
    text = report_of(tmp_path, rows + curve("entropy", equal, [5], range(3)))
    assert "1 unfinished curve is left out of every number" in text
    assert json.loads((tmp_path / "summary.json").read_text())["unfinished"] == {"pretrained head": 1}
    assert "different numbers of seeds, so their areas do not compare" in text
    assert "rows of 2 states of the code are compared (abc, def+)" in text
    assert "Made with changes that were not committed: def+" in text
    assert "| one state of the code per setting | no |" in text
    assert "| strategies not designed or chosen on these test images | ? |" in text


def test_without_the_interfaces_picture_the_report_says_where_it_is(tmp_path: Path) -> None:
    facts = {"settings": {"s": {"sets": {"field": {"coarse_seconds": 30.0}}}}}
    told = [block.text for block in interface(tmp_path, facts, tmp_path / "none.png")]
    assert told[1] == "The picture of the interface is in the project's repository."
    assert told[2].startswith("field: 30 s")
