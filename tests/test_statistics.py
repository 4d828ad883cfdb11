"""Statistics of learning curves against values known by hand or by construction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from model.results import FULL, Row
from model.statistics import (
    areas,
    budget_of,
    crossing,
    difference_of,
    grouped,
    holm,
    images_to,
    interval,
    paired,
    penalties,
    references,
    shared_steps,
    t_test,
    unfinished,
)

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
    assert budget_of([0, 1, 25, 50]) == 50  # up to 1 there is no curve
    rows = curve("random", lambda seed, n: 1.0 if n <= 4 else 9.0, seeds=[0], steps=steps)
    assert areas(group_of(rows)["random"]).tolist() == [1.0]


def test_unfinished_curves_are_left_out() -> None:
    rows = curve("random", base, range(3)) + curve("entropy", equal, range(2)) + curve("entropy", equal, [2], range(6))
    assert group_of(rows)["entropy"].seeds == (0, 1)
    assert group_of(rows)["random"].seeds == (0, 1, 2)
    assert unfinished(rows) == {"pretrained head": 1}
    assert grouped(curve("random", base, [0], [0, 1])) == {}


def test_a_row_without_a_number_leaves_its_curve_unfinished() -> None:
    rows = [row("entropy", 1, 4, math.nan) if (r.seed, r.n) == (1, 4) else r for r in curve("entropy", equal)]
    assert group_of(rows)["entropy"].seeds == (0, 2, 3, 4)
    assert unfinished(rows) == {"pretrained head": 1}
    assert references([row(FULL, 0, 50, math.nan), row(FULL, 1, 50, 0.8)])["pretrained head", "field"].tolist() == [0.8]


def test_a_missing_tail_costs_no_curve() -> None:
    steps = [*range(11), 25, 50]
    rows = curve("random", base, range(3), steps) + curve("typiclust", better, range(3))
    rows += curve("entropy", equal, [0, 1], steps) + curve("entropy", equal, [2], steps[:-1])
    group = group_of(rows)
    assert {name: curves.n[-1] for name, curves in group.items()} == {"random": 50, "typiclust": 10, "entropy": 25}
    assert unfinished(rows) == {}
    found = paired(group["typiclust"], group["random"])
    assert found is not None
    assert found["pairs"] == 3
    assert shared_steps(group["random"], group["entropy"]) == (*range(11), 25)
    assert difference_of(group["typiclust"], group["random"], [0, 2]).shape == (2, 11)


def test_differences_are_taken_seed_by_seed_however_they_are_ordered() -> None:
    rows = curve("random", lambda seed, n: float(seed), [2, 0, 1]) + curve("egl", lambda seed, n: seed + 1.0, [1, 2])
    group = group_of(rows)
    assert (difference_of(group["egl"], group["random"], [1, 2]) == 1.0).all()


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


def test_the_penalty_matrix_by_hand() -> None:
    # Differences at n = 1: 0.3, 0.1, so t = sqrt(2) * 0.2 / 0.1414 = 2 < 12.7; at n = 2: 0.2, 0.2, no deviation: won.
    ours = {(0, 1): 0.3, (1, 1): 0.1, (0, 2): 0.2, (1, 2): 0.2}
    rows = curve("a", lambda seed, n: ours.get((seed, n), 0.0), [0, 1], range(3))
    rows += curve("b", lambda seed, n: 0.0, [0, 1], range(3))
    names, table = penalties(grouped(rows)["pretrained head"])
    assert names == ["a", "b"]
    assert table.tolist() == [[0, 0.5], [0, 0]]
    assert penalties({}) == ([], pytest.approx(np.zeros((0, 0))))


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
    assert (forever["significant_until"], forever["crosses"], forever["interval"]) == (10, None, [None, None])
    never = crossing(group["random"], group["random"])
    assert never is not None
    assert (never["significant_until"], never["crosses"]) == (0, 1)
    assert crossing(group_of(curve("random", base, [0]))["random"], group["random"]) is None
