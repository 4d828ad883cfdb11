"""Confusion, IoU and learning curves against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import auc, confusion_matrix, jaccard_score

from model.classes import IGNORE
from model.metrics import area_under_curve, confusion, iou, mean_iou


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 19])
def test_confusion_and_iou_agree_with_scikit_learn(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, classes, (31, 17), np.uint8)
    prediction = np.where(rng.random(mask.shape) < 0.5, mask, rng.integers(0, classes, mask.shape)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.2] = IGNORE
    table = confusion(prediction, mask, classes)
    truth, guess = mask[mask != IGNORE], prediction[mask != IGNORE]
    labels = list(range(classes))
    np.testing.assert_array_equal(table, confusion_matrix(truth, guess, labels=labels))
    np.testing.assert_allclose(iou(table), jaccard_score(truth, guess, labels=labels, average=None))
    assert mean_iou(table) == pytest.approx(jaccard_score(truth, guess, labels=labels, average="macro"))


def test_rows_are_the_truth() -> None:
    table = confusion(np.array([1, 1, 1], np.uint8), np.array([0, 0, 1], np.uint8), 2)
    assert table.tolist() == [[0, 2], [0, 1]]
    assert table.dtype == np.int64


def test_what_is_predicted_on_unknown_pixels_does_not_count() -> None:
    prediction, mask = np.array([[0, 200], [1, 255]], np.uint8), np.array([[0, IGNORE], [1, IGNORE]], np.uint8)
    assert confusion(prediction, mask, 2).tolist() == [[1, 0], [0, 1]]


def test_a_mask_of_unknown_pixels_has_no_iou() -> None:
    table = confusion(np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORE, np.uint8), 3)
    assert table.sum() == 0
    assert np.isnan(iou(table)).all()
    assert math.isnan(mean_iou(table))


def test_a_class_that_is_nowhere_does_not_count_but_one_predicted_in_vain_does() -> None:
    mask = np.array([0, 0, 0, 0], np.uint8)
    nowhere = confusion(mask, mask, 3)
    assert mean_iou(nowhere) == 1
    assert np.isnan(iou(nowhere)).tolist() == [False, True, True]
    in_vain = confusion(np.array([0, 0, 0, 1], np.uint8), mask, 3)
    assert mean_iou(in_vain) == pytest.approx((3 / 4 + 0) / 2)


def test_the_table_of_two_images_is_the_sum_of_their_tables() -> None:
    rng = np.random.default_rng(0)
    masks, guesses = rng.integers(0, 3, (2, 8, 8), np.uint8), rng.integers(0, 3, (2, 8, 8), np.uint8)
    both = sum(confusion(guess, mask, 3) for guess, mask in zip(guesses, masks, strict=True))
    np.testing.assert_array_equal(both, confusion(guesses, masks, 3))


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction is \(2, 3\), the mask is \(3, 2\)"):
        confusion(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2)


@pytest.mark.parametrize(("guess", "truth"), [(2, 0), (0, 2), (IGNORE, 0)])
def test_classes_that_are_not_there_are_refused(guess: int, truth: int) -> None:
    with pytest.raises(ValueError, match=rf"a class {max(guess, truth)}, but only 2"):
        confusion(np.array([guess], np.uint8), np.array([truth], np.uint8), 2)


def test_the_area_under_a_curve_is_a_mean_height() -> None:
    assert area_under_curve([1, 5, 20], [0.4, 0.4, 0.4]) == pytest.approx(0.4)
    n, values = [1, 2, 5, 10, 20], [0.3, 0.5, 0.55, 0.7, 0.71]
    assert area_under_curve(n, values) == pytest.approx(auc(n, values) / 19)


@pytest.mark.parametrize(
    ("n", "values"), [([], []), ([1], [0.5]), ([1, 2], [0.5]), ([1, 1], [0.5, 0.6]), ([2, 1], [0.5, 0.6])]
)
def test_what_is_no_curve_is_refused(n: list[int], values: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more points with rising n"):
        area_under_curve(n, values)
