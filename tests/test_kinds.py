"""Kinds of pixels: what is frequent, doubtful and little seen comes first, and says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.features import Extractor, fit_scaling, spread_pixels
from model.field import render
from model.kinds import (
    COMPONENTS,
    GREEDY,
    KINDS,
    LEFT,
    Chosen,
    Kinds,
    Worth,
    choose,
    colour_words,
    design_variance,
    fit_kinds,
    reason,
    tabulate,
    worth_of,
)
from model.network import SHIPPED

PIXELS = 100


class Pool:
    """Rendered fields with stored features."""

    def __init__(self) -> None:
        images = [render(seed, "target", (160, 120))[0] for seed in range(20)]
        self.masks = [render(seed, "target", (160, 120))[1] for seed in range(20)]
        self.pixels = spread_pixels((120, 160), PIXELS)
        extractor = Extractor(SHIPPED, "cpu")
        raw = torch.stack(list(extractor.sample(images, [self.pixels] * 20)))
        scaling = fit_scaling(raw.flatten(0, 1), extractor.widths)
        self.features = scaling(raw).half().numpy()
        self.colours = np.stack([image[self.pixels[:, 0], self.pixels[:, 1]] for image in images])
        self.kinds = fit_kinds(self.features, self.colours, np.random.default_rng(0))


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def worth(*values: float) -> Worth:
    """Of kinds that fill equal shares of the pool."""
    return Worth(np.full(len(values), 1 / len(values)), np.ones(len(values)), np.array(values))


def test_kinds_are_pixels_that_look_alike(pool: Pool) -> None:
    reduced = pool.kinds.reduced(pool.features)
    kinds = pool.kinds.of(reduced)
    assert reduced.shape == (20, PIXELS, COMPONENTS)
    assert kinds.shape == (20, PIXELS)
    assert len(np.unique(kinds)) == KINDS == len(pool.kinds.words)
    truth = np.stack([mask[pool.pixels[:, 0], pool.pixels[:, 1]] > 0 for mask in pool.masks])
    plants = np.bincount(kinds.ravel(), truth.ravel(), minlength=KINDS) / np.bincount(kinds.ravel(), minlength=KINDS)
    assert (np.maximum(plants, 1 - plants) * np.bincount(kinds.ravel())).sum() / kinds.size > 0.9


def test_components_are_those_of_the_greatest_variance(pool: Pool) -> None:
    centred = pool.features.reshape(-1, 472).astype(np.float64)
    centred -= centred.mean(0)
    values = np.linalg.svd(centred, compute_uv=False)[:COMPONENTS]
    found = pool.kinds.reduced(pool.features).reshape(-1, COMPONENTS).astype(np.float64)
    np.testing.assert_allclose(np.sqrt((found**2).sum(0)), values, rtol=1e-3)


def test_examples_show_their_kind(pool: Pool) -> None:
    kinds = pool.kinds.of(pool.kinds.reduced(pool.features))
    image, pixel = pool.kinds.examples.T
    assert (kinds[image, pixel] == np.arange(KINDS)).mean() > 0.9  # of kinds of one pixel two may look the same


def test_same_generator_same_kinds(pool: Pool) -> None:
    again = fit_kinds(pool.features, pool.colours, np.random.default_rng(0))
    assert np.array_equal(again.centres, pool.kinds.centres)


def test_few_pixels_make_few_kinds(pool: Pool) -> None:
    kinds = fit_kinds(pool.features[:1, :5], pool.colours[:1, :5], rng())
    assert len(kinds.centres) == 5
    assert kinds.of(kinds.reduced(pool.features)).max() <= 4
    with pytest.raises(ValueError, match="no pixels"):
        fit_kinds(pool.features[:0], pool.colours[:0], rng())


def test_tables_say_what_an_image_shows() -> None:
    kinds = np.array([[0, 0, 2, 2], [1, 1, 1, 1]], np.uint8)
    doubt, inside = np.array([[1.0, 0, 0.5, 0.5], [0.2] * 4]), np.array([[0.0, 0, 1, 1], [0.5] * 4])
    tables = tabulate(kinds, 3, doubt, inside)
    np.testing.assert_allclose(tables.share, [[0.5, 0, 0.5], [0, 1, 0]])
    np.testing.assert_allclose(tables.doubt, [[0.25, 0, 0.25], [0, 0.2, 0]])
    np.testing.assert_allclose(tables.foreground, [[0, 0, 0.5], [0, 0.5, 0]])


def test_foreground_is_worth_as_much_as_background_and_doubt_counts() -> None:
    kinds = np.array([[0] * 45 + [1] * 45 + [2] * 10], np.uint8)
    inside = (kinds == 2).astype(float)
    even = worth_of(tabulate(kinds, 3, np.ones(kinds.shape), inside))
    np.testing.assert_allclose(even.worth, [0.25, 0.25, 0.5])
    np.testing.assert_allclose(even.share, [0.45, 0.45, 0.1])
    doubtful = worth_of(tabulate(kinds, 3, np.where(kinds == 1, 0.5, 0.1), inside))
    np.testing.assert_allclose(doubtful.worth, [0.025, 0.125, 0.05])


def test_where_nothing_is_foreground_the_background_is_all_there_is() -> None:
    kinds = np.array([[0, 0, 0, 1]], np.uint8)
    assert worth_of(tabulate(kinds, 3, np.ones((1, 4)), np.zeros((1, 4)))).worth.tolist() == [0.75, 0.25, 0]


def test_images_with_what_is_worth_most_come_first() -> None:
    share = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]])
    chosen = choose(share, np.zeros((0, 3)), worth(1, 2, 4), rng())
    assert chosen.order[0] == 2
    assert chosen.kind[2] == 2
    assert chosen.gain[2] == pytest.approx(4 * (1 - LEFT))


def test_a_kind_that_was_shown_is_worth_half() -> None:
    share = np.array([[1.0, 0], [0, 1.0]])
    seen = np.array([[0, 1.0]])
    chosen = choose(share, seen, worth(3, 4), rng())
    assert chosen.order.tolist() == [0, 1]
    assert chosen.gain.tolist() == pytest.approx([3 * 0.5, 4 * 0.5 * 0.5])
    assert chosen.seen.tolist() == [0, 1]


def test_places_know_those_before_them() -> None:
    share = np.array([[1.0, 0], [1.0, 0], [0, 1.0]])
    assert choose(share, np.zeros((0, 2)), worth(4, 3), rng()).order[1] == 2


def test_equal_images_come_in_any_order() -> None:
    share = np.ones((6, 1))
    orders = {tuple(choose(share, np.zeros((0, 1)), worth(1), np.random.default_rng(seed)).order) for seed in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("images", [0, 1, GREEDY + 50])
def test_every_image_has_one_place(images: int) -> None:
    share = rng().dirichlet(np.ones(4), images).reshape(images, 4)
    chosen = choose(share, np.zeros((0, 4)), worth(1, 2, 3, 4), rng())
    assert np.array_equal(np.sort(chosen.order), np.arange(images))
    after = chosen.gain[chosen.order[GREEDY:]]
    assert (np.diff(after) <= 0).all()


def test_the_first_image_is_the_one_that_predicts_the_pool_best() -> None:
    generator = rng()
    axes = np.zeros((3, 200, 2), np.float32)
    axes[0, :, 0] = generator.normal(0, 1, 200)  # varies along one axis of the pool only
    axes[1] = generator.normal(0, 1, (200, 2))  # along both
    variance = design_variance(axes, np.full((3, 200), 0.5))
    assert variance.argmin() == 1
    assert variance.argmax() == 2  # shows nothing but one colour


def test_the_first_image_is_chosen_for_foreground_as_much_as_for_background() -> None:
    generator = rng()
    rare = np.zeros((50, 100, 2), np.float32)
    rare[:, :, 0] = generator.normal(0, 1, (50, 100))
    rare[0, :50, 1] = 3  # half of the first image is plants, which the others do not have
    inside = (rare[..., 1] > 0).astype(float)
    assert design_variance(rare, inside).argmin() == 0


@pytest.mark.parametrize(
    ("rgb", "words"),
    [
        ((30, 70, 30), "dark green"),
        ((120, 170, 70), "green"),
        ((110, 80, 50), "dark brown"),
        ((150, 110, 80), "brown"),
        ((128, 128, 128), "grey"),
        ((245, 245, 245), "bright grey"),
        ((90, 140, 220), "blue"),
        ((200, 30, 30), "red"),
    ],
)
def test_colours_have_words(rgb: tuple[int, int, int], words: str) -> None:
    assert colour_words(np.array(rgb, np.float32)) == words


def test_a_place_has_a_reason_in_words() -> None:
    chosen = Chosen(np.array([0]), np.ones(1), np.array([1]), np.array([1.2]))
    share, doubt = np.array([[0.88, 0.12]]), np.array([0.0, 0.7])
    words = reason(chosen, 0, share[0], Worth(share[0], doubt, doubt), ("brown", "dark green"), 3)
    assert words == "shows dark green pixels (12% of it), shown 1 time so far, very doubtful"


def test_a_rendered_pool_is_ordered_and_every_place_has_a_reason(pool: Pool) -> None:
    kinds = pool.kinds.of(pool.kinds.reduced(pool.features))
    inside = np.stack([mask[pool.pixels[:, 0], pool.pixels[:, 1]] > 0 for mask in pool.masks]).astype(float)
    tables = tabulate(kinds, KINDS, np.full(kinds.shape, 0.3), inside)
    value = worth_of(tables)
    chosen = choose(tables.share[3:], tables.share[:3], value, rng())
    assert np.array_equal(np.sort(chosen.order), np.arange(17))
    for image in chosen.order:
        assert reason(chosen, image, tables.share[3:][image], value, pool.kinds.words, 3).startswith("shows ")


def test_kinds_are_plain_arrays(pool: Pool) -> None:
    assert isinstance(pool.kinds, Kinds)
    assert pool.kinds.axes.dtype == pool.kinds.centres.dtype == np.float32
