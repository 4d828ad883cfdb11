"""Masks of a head: a class for every pixel, only of classes that have a label, sure where they are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.features import Extractor, Scaling, fit_scaling, spread_pixels
from model.field import render
from model.heads import Head, LabelledPixels, choose_pixels, fit, no_sums
from model.masks import predict
from model.metrics import confusion, mean_iou
from model.network import SHIPPED

NAMES = ("vines", "soil", "crop", "weed")
SIZE = (256, 192)


class Learnt:
    """A head that has learnt six rendered fields; it has no label of the first of its classes."""

    def __init__(self) -> None:
        fields = [render(seed, "target", SIZE) for seed in range(6)]
        images, masks = [image for image, _ in fields], [mask + 1 for _, mask in fields]
        self.extractor, rng = Extractor(SHIPPED, "cpu"), np.random.default_rng(0)
        raw = self.extractor.sample(images, [spread_pixels(SIZE[::-1], 200)] * 6)
        self.scaling: Scaling = fit_scaling(torch.cat(list(raw)), self.extractor.widths)
        chosen = [choose_pixels(mask, 600, rng) for mask in masks]
        features = self.extractor.sample(images, [pixels for pixels, _, _ in chosen])
        kept = [LabelledPixels(self.scaling(f), labels, w) for f, (_, labels, w) in zip(features, chosen, strict=True)]
        sums = no_sums(NAMES, self.scaling.dimensions)
        for image in kept:
            sums = sums + image.sums(NAMES)
        self.head: Head = fit(kept, sums)

    def predict(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return predict(self.extractor.maps([image]), self.scaling, self.head)


@pytest.fixture(scope="module")
def learnt() -> Learnt:
    return Learnt()


def test_masks_of_new_fields_are_right_and_sure_where_they_are(learnt: Learnt) -> None:
    table, right, wrong = np.zeros((4, 4), np.int64), [], []
    for seed in range(20, 28):
        image, mask = render(seed, "target", SIZE)
        found, confidence = learnt.predict(image)
        assert found.shape == confidence.shape == mask.shape
        table += confusion(found, mask + 1, 4)
        right.append(confidence[found == mask + 1].mean())
        wrong.append(confidence[found != mask + 1].mean())
    assert mean_iou(table[1:, 1:]) > 0.6
    assert table[:, 0].sum() == 0  # nobody has labelled vines
    assert np.mean(right) > np.mean(wrong) + 40


def test_images_of_odd_sizes_have_masks_too(learnt: Learnt) -> None:
    image = render(30, "target", (141, 99))[0]
    found, confidence = learnt.predict(image)
    assert found.shape == confidence.shape == (99, 141)
    assert set(np.unique(found)) <= {1, 2, 3}


def test_a_head_with_one_class_fills_the_mask(learnt: Learnt) -> None:
    pixels = LabelledPixels(
        torch.randn(50, learnt.scaling.dimensions), np.full(50, 2, np.uint8), np.full(50, 0.02, np.float32)
    )
    head = fit([pixels], pixels.sums(NAMES))
    found, confidence = predict(learnt.extractor.maps([render(0, "target", SIZE)[0]]), learnt.scaling, head)
    assert (found == 2).all()
    assert confidence.min() >= 254
