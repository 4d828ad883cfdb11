"""A head made of sums: the linear discriminant, exact under every change of labels, sure only where it is right."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from model.classes import IGNORE, MIXED, UNKNOWN, Classes
from model.data import Folder
from model.features import Extractor, fit_scaling, spread_pixels
from model.field import render
from model.heads import (
    ALONE,
    LEFT_OUT,
    NEVER,
    PRIOR_POWER,
    RIDGE,
    RIDGE_FEW,
    Head,
    LabelledPixels,
    Sums,
    choose_pixels,
    coarse_sums,
    fit,
    foreground_probability,
    names_foreground,
    no_sums,
    solve,
    sum_up,
    temperature,
    weak_sums,
)
from model.metrics import calibration_error, confusion, mean_iou
from model.network import SHIPPED

DATA = Path(os.environ.get("FIRSTROW_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
CLASSES = Classes(("soil", "crop", "weed"), ("background", "vegetation"), ((0,), (1, 2)))
NAMES = CLASSES.fine


def labelled(seed: int, present: tuple[int, ...] = (0, 1, 2)) -> LabelledPixels:
    """Pixels of an image with 12 features, whose classes overlap a little."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(present, 150).astype(np.uint8)
    centres = np.random.default_rng(99).normal(0, 1, (3, 12))
    features = rng.normal(0, 1, (150, 12)) + centres[labels] + rng.normal(0, 0.5, 12)
    weights = rng.random(150).astype(np.float32)
    return LabelledPixels(torch.from_numpy(features).float(), labels, weights / weights.sum())


def total(images: list[LabelledPixels]) -> Sums:
    sums = no_sums(NAMES, 12)
    for image in images:
        sums = sums + image.sums(NAMES)
    return sums


def assert_same(one: Sums, other: Sums) -> None:
    assert one.classes == other.classes
    assert one.images == other.images
    for mine, theirs in zip(one.arrays, other.arrays, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_it_is_the_linear_discriminant_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(0, 1, (300, 12)), rng.integers(0, 3, 300)
    features += 0.7 * np.eye(3, 12)[labels]
    sums = sum_up(torch.from_numpy(features), torch.eye(3)[torch.from_numpy(labels)] / 300, NAMES, 1)
    share = np.bincount(labels) / 300
    ridge = RIDGE + RIDGE_FEW
    shrinkage = ridge / (1 + ridge)  # theirs is (1 - s) S + s t I, ours S + r t I
    priors = share**PRIOR_POWER / (share**PRIOR_POWER).sum()
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors).fit(features, labels)
    head = solve(sums)
    np.testing.assert_allclose(head.weights.numpy(), (1 - shrinkage) * theirs.coef_, rtol=1e-4, atol=1e-5)
    expected = (1 - shrinkage) * (theirs.intercept_ - np.log(priors)) + np.log(priors)
    np.testing.assert_allclose(head.bias.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_ridge_shrinks_with_the_number_of_images() -> None:
    one = labelled(0).sums(NAMES)
    again = sum((one for _ in range(9)), one)
    assert solve(again).weights.norm() > 1.5 * solve(one).weights.norm()


def test_adding_replacing_and_removing_an_annotation_is_exact() -> None:
    images = [labelled(seed) for seed in range(6)]
    sums = total(images)
    assert_same(sums - images[2].sums(NAMES), total([*images[:2], *images[3:]]))
    changed = labelled(77, (0, 2))
    replaced = sums - images[4].sums(NAMES) + changed.sums(NAMES)
    assert_same(replaced, total([*images[:4], changed, images[5]]))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_sums_refuse_what_is_no_number_and_no_head_is_made_of_it(number: float) -> None:
    image = labelled(0)
    features, weights = image.features.clone(), image.weights.copy()
    features[7, 3] = weights[9] = number
    for spoilt in (replace(image, features=features), replace(image, weights=weights)):
        with pytest.raises(FloatingPointError, match="not finite"):
            spoilt.sums(NAMES)
    with pytest.raises(FloatingPointError, match="not finite"):
        coarse_sums(features, image.labels, 2)
    for part in ("weight", "first", "second"):
        sums = total([labelled(1), labelled(2)])
        getattr(sums, part).view(-1)[-1] = number
        with pytest.raises(FloatingPointError):
            fit([labelled(1), labelled(2)], sums)


def test_order_of_annotations_and_who_adds_them_mean_nothing() -> None:
    images = [labelled(seed) for seed in range(6)]
    assert_same(total(images), total(images[::-1]))
    assert_same(total(images), total(images[:2]) + total(images[2:]))


def test_thousands_of_changes_leave_no_trace() -> None:
    sums, other = total([labelled(0), labelled(1)]), labelled(2).sums(NAMES)
    changed = sums
    for _ in range(2000):
        changed = changed + other
        changed = changed - other
    assert_same(changed, sums)


def test_an_image_that_does_not_count_is_as_if_subtracted() -> None:
    images = [labelled(seed, (0, 1) if seed else (0, 1, 2)) for seed in range(5)]
    for image in images[:2]:
        expected = solve(total(images) - image.sums(NAMES))
        found = solve(total(images), image.sums(NAMES))
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-4, atol=1e-5)


def test_a_class_without_a_label_is_never_predicted() -> None:
    head = solve(total([labelled(0, (0, 1)), labelled(1, (0,))]))
    probabilities = head.probabilities(10 * torch.randn(5000, 12))
    assert (probabilities[:, 2] == 0).all()
    assert torch.equal(head.tempered(7.0).probabilities(torch.randn(50, 12))[:, 2], torch.zeros(50))


def test_a_class_whose_only_annotation_was_removed_is_never_predicted() -> None:
    weeds = labelled(5).sums(NAMES)
    sums = total([labelled(0, (0, 1)), labelled(1, (0, 1))]) + weeds - weeds
    assert sums.labelled.tolist() == [True, True, False]
    assert solve(sums).bias[2] == NEVER


def test_one_class_alone_is_predicted_everywhere() -> None:
    head = fit([labelled(0, (1,))], labelled(0, (1,)).sums(NAMES))
    assert head.probabilities(torch.randn(9, 12))[:, 1].tolist() == [1.0] * 9


def test_without_a_label_there_is_no_head() -> None:
    with pytest.raises(ValueError, match="at least one labelled pixel"):
        solve(no_sums(NAMES, 12))


def test_classes_go_by_name() -> None:
    sums = total([labelled(0), labelled(1)])
    other = sums.for_classes(("weed", "vines", "soil", "crop"))
    assert other.labelled.tolist() == [True, False, True, True]
    features = torch.randn(40, 12)
    expected = solve(sums).probabilities(features)
    torch.testing.assert_close(solve(other).probabilities(features)[:, [2, 3, 0]], expected)
    assert_same(other.for_classes(NAMES), sums)
    with pytest.raises(ValueError, match="cannot be combined"):
        sums + other


def test_chosen_pixels_stand_for_the_whole_mask() -> None:
    mask = render(3, "target", (160, 120))[1]
    mask[:20] = IGNORE
    pixels, labels, weights = choose_pixels(mask, 600, np.random.default_rng(0))
    assert np.array_equal(mask[pixels[:, 0], pixels[:, 1]], labels)
    assert IGNORE not in labels
    share = np.bincount(mask[mask != IGNORE], minlength=3) / (mask != IGNORE).sum()
    np.testing.assert_allclose(np.bincount(labels, weights, minlength=3), share, atol=0.02)
    assert np.bincount(labels).min() >= 100  # rare classes have pixels enough
    assert weights.sum() == pytest.approx(1)


def test_a_mask_where_nothing_is_known_gives_no_pixels() -> None:
    pixels, labels, weights = choose_pixels(np.full((30, 40), IGNORE, np.uint8), 100, np.random.default_rng(0))
    assert len(pixels) == len(labels) == len(weights) == 0
    assert LabelledPixels(torch.zeros(0, 12), labels, weights).sums(NAMES).labelled.tolist() == [False] * 3


def test_shares_of_pixels_are_soft_labels() -> None:
    features = torch.randn(80, 12)
    shares = torch.rand(80, 3)
    sums = sum_up(features, shares, NAMES, 0)
    torch.testing.assert_close(sums.first, shares.double().T @ features.double(), rtol=1e-5, atol=1e-5)
    expected = torch.einsum("pc,pi,pj->cij", shares.double(), features.double(), features.double())
    torch.testing.assert_close(sums.second.double(), expected, rtol=1e-4, atol=1e-4)


def test_temperature_makes_confidence_honest() -> None:
    images, unseen = [labelled(seed) for seed in range(10)], [labelled(seed) for seed in range(100, 140)]
    head, plain = fit(images, total(images)), solve(total(images))
    sure = Head(NAMES, 4 * plain.weights, 4 * plain.bias)
    factor = temperature(images, total(images))
    torch.testing.assert_close(head.weights, plain.weights / factor)

    def error(of: Head) -> float:
        found = torch.cat([of.probabilities(image.features) for image in unseen]).numpy()
        labels = np.concatenate([image.labels for image in unseen])
        return calibration_error(found, labels, np.concatenate([image.weights for image in unseen]))

    assert error(head) < 0.03
    assert error(sure) > 0.05


def test_temperature_does_without_images_that_cannot_be_left_out() -> None:
    assert temperature([labelled(0)], labelled(0).sums(NAMES)) == ALONE
    apart = [labelled(0, (0,)), labelled(1, (1,))]  # no image has a class of the other
    assert temperature(apart, total(apart)) == ALONE
    many = [labelled(seed) for seed in range(3 * LEFT_OUT)]
    assert temperature(many, total(many)) == pytest.approx(temperature(many[::3], total(many)))


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    assert calibration_error(probabilities, np.array([0, 0, 1, 1]), np.ones(4)) == pytest.approx(0.2)
    assert calibration_error(probabilities, np.array([0, 1, 1, 1]), np.array([9.0, 1, 10, 0])) == pytest.approx(0.15)


def test_coarse_answers_make_a_head_of_foreground() -> None:
    image = labelled(0)
    coarse = np.where(image.labels == 0, 0, 1).astype(np.uint8)
    coarse[:10] = MIXED
    coarse[10:20] = UNKNOWN
    sums = coarse_sums(image.features, coarse, 2)
    assert float(sums.weight.sum()) == pytest.approx(1)
    assert names_foreground(sums)
    probabilities = solve(sums).probabilities(image.features)
    right = (probabilities[:, 1] > 0.5).numpy() == (image.labels > 0)
    assert right.mean() > 0.8


def test_answers_that_name_no_foreground_are_noticed() -> None:
    image = labelled(0)
    assert not names_foreground(coarse_sums(image.features, np.zeros(150, np.uint8), 2))
    assert not names_foreground(coarse_sums(image.features, np.full(150, UNKNOWN, np.uint8), 2))


def test_weak_labels_divide_the_foreground_as_the_fine_head_does() -> None:
    features = torch.randn(60, 12)
    fine = solve(total([labelled(0), labelled(1)]))
    coarse = solve(coarse_sums(labelled(2).features, (labelled(2).labels > 0).astype(np.uint8), 2))
    sums = weak_sums(fine, coarse, features, CLASSES, 0.25)
    assert sums.images == 0
    assert float(sums.weight.sum()) == pytest.approx(0.25)
    inside = coarse.probabilities(features)[:, 1]
    assert float(sums.weight[1:].sum()) == pytest.approx(0.25 * float(inside.mean()), rel=1e-4)
    p = fine.probabilities(features)
    crop = 0.25 * (inside * p[:, 1] / (p[:, 1] + p[:, 2])).mean()
    assert float(sums.weight[1]) == pytest.approx(float(crop), rel=1e-3)


def test_weak_labels_give_no_pixel_to_classes_nobody_has_labelled() -> None:
    fine = solve(total([labelled(0, (0, 1))]))
    coarse = solve(coarse_sums(labelled(2).features, (labelled(2).labels > 0).astype(np.uint8), 2))
    assert weak_sums(fine, coarse, torch.randn(60, 12), CLASSES, 1.0).labelled.tolist() == [True, True, False]


def test_foreground_is_what_is_not_of_the_first_coarse_class() -> None:
    assert foreground_probability(torch.tensor([[0.5, 0.3, 0.2]]), CLASSES).tolist() == pytest.approx([0.5])


def learnt(images: list[NDArray[np.uint8]], masks: list[NDArray[np.uint8]], names: tuple[str, ...], n: int) -> float:
    """Mean IoU on evenly spread pixels of all other images, of a head that has learnt the first n."""
    extractor, rng = Extractor(SHIPPED, "cpu"), np.random.default_rng(0)
    spread = [spread_pixels((mask.shape[0], mask.shape[1]), 500) for mask in masks]
    raw = list(extractor.sample(images, spread))
    scaling = fit_scaling(torch.cat(raw), extractor.widths)
    chosen = [choose_pixels(mask, 700, rng) for mask in masks[:n]]
    features = extractor.sample(images[:n], [pixels for pixels, _, _ in chosen])
    kept = [LabelledPixels(scaling(f), labels, w) for f, (_, labels, w) in zip(features, chosen, strict=True)]
    sums = no_sums(names, scaling.dimensions)
    for image in kept:
        sums = sums + image.sums(names)
    head, table = fit(kept, sums), np.zeros((len(names), len(names)), np.int64)
    for features, mask, pixels in zip(raw[n:], masks[n:], spread[n:], strict=True):
        prediction = head.logits(scaling(features)).argmax(1).numpy().astype(np.uint8)
        table += confusion(prediction, mask[pixels[:, 0], pixels[:, 1]], len(names))
    return mean_iou(table)


def test_ten_rendered_fields_teach_crop_and_weed() -> None:
    fields = [render(seed, "target", (256, 192)) for seed in range(24)]
    assert learnt([image for image, _ in fields], [mask for _, mask in fields], NAMES, 10) > 0.6


def test_ten_photographs_of_peanuts_teach_crop_and_weed() -> None:
    if not (DATA / "peanut").is_dir():
        pytest.skip(f"needs the data set {DATA / 'peanut'}; FIRSTROW_DATA names the folder of data sets")
    folder = Folder(DATA / "peanut")
    names = [*folder.names("train")[:80:8], *folder.names("test")[:20]]
    images, masks = [folder.image(name, 256) for name in names], [folder.mask(name, 256) for name in names]
    assert learnt(images, masks, folder.classes.fine, 10) > 0.65
