"""Statistics of learning curves against values known by hand or by construction, and the report made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from backend import bench
from backend.errors import BenchError
from model import results
from model.results import FULL, Row
from model.statistics import (
    areas,
    budget_of,
    crossing,
    grouped,
    holm,
    images_to,
    interval,
    paired,
    penalties,
    t_test,
)
from model.summary import summarise

Height = Callable[[int, int], float]


def row(strategy: str, seed: int, n: int, miou: float, setting: str = "pretrained head", name: str = "field") -> Row:
    """A row of that height; an image takes 60 s from a prelabel, 100 s from empty, coarse labels 30 s."""
    return Row(
        setting=setting,
        set=name,
        strategy=strategy,
        seed=seed,
        n=n,
        image=f"i{n}" if n else "",
        mIoU=miou,
        iou={"soil": miou, "<b>weed|</b>": math.nan if n == 0 else miou / 2},
        coarse_seconds=30.0,
        full_seconds=60.0 if n else 0.0,
        scratch_seconds=100.0 if n else 0.0,
        fix_clicks=3 if n else 0,
        repaint_share=0.1,
        scratch_clicks=9,
        scratch_repaint_share=0.5,
        train_seconds=2.0,
        score_seconds=1.0,
        commit="abc",
        device="CPU",
    )


def curve(
    strategy: str, height: Height, seeds: Sequence[int] = range(5), steps: Sequence[int] = range(11), **where: str
) -> list[Row]:
    """A curve per seed."""
    return [row(strategy, seed, n, height(seed, n), **where) for seed in seeds for n in steps]


def base(seed: int, n: int) -> float:
    """What random reaches: a rising curve that depends on the seed."""
    return 0.5 + 0.02 * n + 0.01 * np.sin(7 * seed)


def noisy(seed: int, n: int, strength: float = 0.01) -> float:
    """Noise without a mean over seeds and steps to speak of, the same whenever it is asked for."""
    return strength * float(np.random.default_rng([seed, n]).normal())


def better(seed: int, n: int) -> float:
    return base(seed, n) + 0.05 + noisy(seed, n, 0.002)


def equal(seed: int, n: int) -> float:
    return base(seed, n) + noisy(seed, n)


def scene() -> list[Row]:
    """Random, one that is better, one that is not, and full supervision."""
    rows = curve("random", base, range(9)) + curve("typiclust", better) + curve("entropy", equal)
    return rows + [row(FULL, seed, 50, 0.8) for seed in range(2)]


def group_of(rows: Sequence[Row], setting: str = "pretrained head", name: str = "field"):  # type: ignore[no-untyped-def]
    return grouped(rows)[setting][name]


def test_an_area_is_the_mean_height_from_one_image_on() -> None:
    rows = curve("random", lambda seed, n: float(n), seeds=[0], steps=[0, 1, 2, 3])
    assert areas(group_of(rows)["random"]).tolist() == [2.0]
    rows = curve("random", lambda seed, n: math.log(max(n, 1)), seeds=[0], steps=[0, 1, 2, 3])
    assert areas(group_of(rows)["random"], log=True)[0] == pytest.approx(math.log(3) / 2)


def test_the_tail_does_not_count_for_the_area() -> None:
    steps = [0, 1, 2, 3, 4, 10, 50]
    assert budget_of(steps) == 4
    assert budget_of([0, 5, 10, 15]) == 15
    rows = curve("random", lambda seed, n: 1.0 if n <= 4 else 9.0, seeds=[0], steps=steps)
    assert areas(group_of(rows)["random"]).tolist() == [1.0]


def test_unfinished_curves_are_left_out() -> None:
    rows = curve("random", base, range(3)) + curve("entropy", equal, range(2)) + curve("entropy", equal, [2], range(6))
    assert group_of(rows)["entropy"].seeds == (0, 1)
    assert group_of(rows)["random"].seeds == (0, 1, 2)
    assert grouped(curve("random", base, [0], [0, 1])) == {}


def test_intervals_hold_the_mean_and_need_two_seeds() -> None:
    values = np.array([0.4, 0.5, 0.6, 0.55])
    low, high = interval(values) or (0, 0)
    assert 0.4 <= low < values.mean() < high <= 0.6
    assert interval(values[:1]) is None
    assert interval(values) == interval(values)


def test_paired_differences_are_scipys() -> None:
    a, b = np.array([0.5, 0.7, 0.65]), np.array([0.4, 0.62, 0.6])
    found = t_test(a - b)
    assert found is not None
    assert found["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found["interval"] == pytest.approx(list(stats.ttest_rel(a, b).confidence_interval(0.95)))
    assert t_test(np.array([0.1])) is None
    same, shifted = t_test(np.zeros(3)), t_test(np.full(3, 0.25))
    assert same is not None
    assert shifted is not None
    assert (same["p"], shifted["p"]) == (1.0, 0.0)


def test_pairs_are_the_seeds_in_common() -> None:
    group = group_of(scene())
    found = paired(group["typiclust"], group["random"])
    assert found is not None
    assert found["pairs"] == 5
    assert found["mean"] == pytest.approx(0.05, abs=0.002)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_images_to_a_target() -> None:
    curves = group_of(curve("random", lambda seed, n: 0.1 * n, [0]))["random"]
    assert images_to(curves, 0.45) == 5
    assert images_to(curves, 2.0) is None


def test_the_penalty_matrix_counts_budgets_that_are_won() -> None:
    def half(seed: int, n: int) -> float:
        return base(seed, n) + (0.1 + noisy(seed, n, 0.001) if n > 5 else noisy(seed, n))

    rows = curve("random", base) + curve("typiclust", better) + curve("entropy", half)
    rows += [Row(**{**vars(r), "set": "other"}) for r in rows]
    names, table = penalties(grouped(rows)["pretrained head"])
    at = {name: i for i, name in enumerate(names)}
    assert table[at["typiclust"], at["random"]] == 2.0  # all budgets of both sets
    assert table[at["random"], at["typiclust"]] == 0.0
    assert table[at["entropy"], at["random"]] >= 1.0  # n = 6 to 10, half of the budgets of both
    assert np.diag(table).tolist() == [0, 0, 0]


def test_gains_end_where_the_difference_does() -> None:
    def early(seed: int, n: int) -> float:
        return base(seed, n) + (0.1 if n <= 4 else -0.1) + noisy(seed, n, 0.002)

    group = group_of(curve("random", base) + curve("coverage", early) + curve("typiclust", better))
    found = crossing(group["coverage"], group["random"])
    assert found is not None
    assert found["significant_until"] == 4
    assert found["crosses"] in (4, 5)
    forever = crossing(group["typiclust"], group["random"])
    assert forever is not None
    assert forever["significant_until"] == forever["crosses"] == 10


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


def test_no_win_is_claimed_of_one_seed(tmp_path: Path) -> None:
    results.append(tmp_path / "results.csv", curve("random", base, [0]) + curve("typiclust", better, [0]))
    bench.report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "significantly better" not in text
    assert "too few seeds to compare with random" in text
    assert "(one seed)" in text
    assert "1 seeds only, fewer than the protocol's five" in text
    assert "Left out: no setting was run both with and without weak labels" in text


def test_results_of_a_run_that_has_just_begun_make_a_report(tmp_path: Path) -> None:
    results.append(tmp_path / "results.csv", curve("random", base, [0], [0]))
    bench.report(tmp_path)
    assert "No curve is complete yet" in (tmp_path / "report.html").read_text()


def test_damaged_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("a,b\n")
    with pytest.raises(BenchError, match="other columns"):
        bench.report(tmp_path)
