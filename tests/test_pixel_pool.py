"""The default rule on stored pixels: every image has one place, the first by design, what is labelled counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.classes import Classes
from model.features import Extractor, fit_scaling, spread_pixels
from model.field import render
from model.heads import Head, coarse_sums, no_sums, solve, sum_up
from model.kinds import design_variance
from model.network import SHIPPED
from model.pixel_pool import FirstRow, PixelPool, doubt_of, make_pool, opinions, probabilities_of

CLASSES = Classes(("soil", "crop", "weed"), ("background", "vegetation"), ((0,), (1, 2)))
PIXELS, IMAGES = 80, 16


class Fields:
    """Rendered fields as a pool, a head that has learnt two of them, and one that tells plants from soil."""

    def __init__(self) -> None:
        fields = [render(seed, "target", (160, 120)) for seed in range(IMAGES)]
        pixels = spread_pixels((120, 160), PIXELS)
        extractor = Extractor(SHIPPED, "cpu")
        raw = torch.stack(list(extractor.sample([image for image, _ in fields], [pixels] * IMAGES)))
        features = fit_scaling(raw.flatten(0, 1), extractor.widths)(raw)
        colours = np.stack([image[pixels[:, 0], pixels[:, 1]] for image, _ in fields])
        self.masks = np.stack([mask[pixels[:, 0], pixels[:, 1]] for _, mask in fields])
        self.pool: PixelPool = make_pool(features, colours, np.random.default_rng(0))
        sums = no_sums(CLASSES.fine, features.shape[2])
        for image in (0, 1):
            shares = torch.eye(3)[torch.from_numpy(self.masks[image]).long()] / PIXELS
            sums = sums + sum_up(features[image], shares, CLASSES.fine, 1)
        self.head: Head = solve(sums).tempered(4.0)
        self.coarse: Head = solve(coarse_sums(features[2], (self.masks[2] > 0).astype(np.uint8), 2))

    def foreground(self, head: Head | None, coarse: Head | None) -> NDArray[np.float32]:
        return opinions(self.pool.features, self.pool.kind_of, self.pool.kinds, head, coarse, CLASSES)[0]

    def order(self, head: Head | None, labelled: list[int], seed: int = 0) -> FirstRow:
        return FirstRow.of(self.pool, head, self.coarse, CLASSES, labelled, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def fields() -> Fields:
    return Fields()


@pytest.mark.parametrize("labelled", [[], [0], [5, 0, 11]])
def test_every_image_without_a_label_has_one_place(fields: Fields, labelled: list[int]) -> None:
    found = fields.order(fields.head if labelled else None, labelled)
    assert sorted(found.order.tolist()) == [i for i in range(IMAGES) if i not in labelled]
    assert len(found.chosen.gain) == len(found.chosen.kind) == IMAGES - len(labelled)


def test_the_first_image_is_chosen_by_design(fields: Fields) -> None:
    inside = fields.foreground(None, fields.coarse)
    found = fields.order(None, [])
    assert found.order[0] == design_variance(fields.pool.reduced, inside).argmin()
    assert found.order.tolist() == fields.order(None, []).order.tolist()


def test_every_place_has_a_reason_in_words_and_in_pixels(fields: Fields) -> None:
    found = fields.order(fields.head, [3, 1])
    for image in found.order.tolist():
        assert found.why(image).startswith("shows ")
        pixels = fields.pool.kind_of[image] == found.kind(image)
        place = found.images.tolist().index(image)
        assert pixels.shape == (PIXELS,)
        assert pixels.mean() == pytest.approx(found.tables.share[image, found.chosen.kind[place]])
    first = int(found.order[0])
    assert found.gain(first) == found.chosen.gain.max() > 0


def test_what_was_labelled_is_worth_less(fields: Fields) -> None:
    best = int(fields.order(fields.head, [0]).order[0])
    before, after = fields.order(fields.head, [0]), fields.order(fields.head, [0, best])
    assert after.chosen.gain.max() < before.chosen.gain.max()


def test_foreground_is_what_either_head_takes_for_it(fields: Fields) -> None:
    one, other = fields.foreground(fields.head, None), fields.foreground(None, fields.coarse)
    both = fields.foreground(fields.head, fields.coarse)
    np.testing.assert_allclose(both, np.maximum(one, other), atol=1e-6)
    assert ((both > 0.5) == (fields.masks > 0)).mean() > 0.85
    assert (fields.foreground(None, None) == 0.5).all()


def test_doubt_is_entropy(fields: Fields) -> None:
    p = fields.head.probabilities(fields.pool.features.float()).numpy()
    [found] = probabilities_of(fields.pool.features, [fields.head])
    np.testing.assert_allclose(found, p, atol=1e-6)
    np.testing.assert_allclose(doubt_of(found, p.shape[:2]), -(p * np.log(p)).sum(-1), atol=1e-5)
    assert (doubt_of(None, p.shape[:2]) == 1).all()


def test_without_coarse_answers_there_is_an_order_too(fields: Fields) -> None:
    found = FirstRow.of(fields.pool, None, None, CLASSES, [], np.random.default_rng(0))
    assert len(found.order) == IMAGES


def test_a_pool_where_all_is_labelled_has_an_empty_order(fields: Fields) -> None:
    assert not len(fields.order(fields.head, list(range(IMAGES))).order)
