"""Clusters against slow references, and what five coarse labels say about a pool of photographs."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from model.classes import UNKNOWN
from model.clusters import (
    DEFAULT_K,
    SMALLEST,
    SMOOTH,
    Codebook,
    assign,
    cluster_map,
    cover,
    features,
    fit,
    fit_image,
    mode_filter,
    pieces,
    sample_pixels,
    smoothed,
    vegetation_guess,
    without_small,
)
from model.data import Folder
from model.field import render
from model.pseudo import cluster_votes, decide

Bytes = NDArray[np.uint8]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def codebook(images: list[Bytes], k: int = DEFAULT_K) -> Codebook:
    """The clusters of these images, fitted as a project fits them."""
    generator = rng()
    return fit(np.concatenate([sample_pixels(image, 500, generator) for image in images]), k, generator)


@pytest.fixture(scope="module")
def field() -> tuple[Bytes, Bytes]:
    """A rendered field with soil, crop and weeds, and its mask."""
    return render(3, "target")


@pytest.fixture(scope="module")
def book(field: tuple[Bytes, Bytes]) -> Codebook:
    return fit_image(field[0], DEFAULT_K, rng())


def patchy(seed: int) -> Bytes:
    """A map of four labels with pieces of all sizes, some with holes, some touching at corners only."""
    height, width = rng(seed).integers(1, 60, 2)
    noise = rng(seed).random((height, width), np.float32)
    grain = seed % 3
    calm = np.asarray(cv2.GaussianBlur(noise, (0, 0), grain) if grain else noise, np.float64)
    return np.digitize(calm, np.quantile(calm, [0.25, 0.5, 0.75])).astype(np.uint8)


def test_features_are_lab_and_green_partly_centred() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = (255, 255, 255)
    image[0, 1] = (0, 255, 0)
    white, green, black, _ = features(image)
    np.testing.assert_allclose(white - black, [100, 0, 0, 0], atol=0.1)
    np.testing.assert_allclose(green - black, [87.7, -86.2, 83.2, 100], atol=0.2)
    # Half of the mean is taken out, so half of it is left.
    np.testing.assert_allclose(features(image).mean(0), (white - black + green - black) / 4 / 2, atol=0.01)


def test_light_of_another_day_is_taken_out_by_half() -> None:
    image = rng().integers(60, 120, (20, 30, 3), np.uint8)
    plain, brighter = features(image), features(image + np.uint8(60))
    lighter = cv2.cvtColor((image + 60).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0].mean()
    light = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0].mean()
    assert (brighter - plain)[:, 0].mean() == pytest.approx((lighter - light) / 2, abs=0.01)


@pytest.mark.parametrize("k", [1, 2, 12, 40])
def test_pixels_get_the_nearest_centre(k: int) -> None:
    points = rng().normal(size=(40_000, 4)).astype(np.float32) * 30
    model = KMeans(k, n_init=1, max_iter=5, random_state=0).fit(points[:2000].astype(np.float64))
    ours = assign(points, model.cluster_centers_.astype(np.float32))
    theirs = model.predict(points.astype(np.float64))
    differ = ours != theirs
    assert differ.mean() < 1e-3
    # Where they differ the two centres are equally near but for rounding.
    away = np.linalg.norm(points[differ, None].astype(np.float64) - model.cluster_centers_, axis=2)
    rows = np.arange(len(away))
    np.testing.assert_allclose(away[rows, ours[differ]], away[rows, theirs[differ]], rtol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_the_mode_filter_agrees_with_counting_one_by_one(seed: int) -> None:
    labels, reach = patchy(seed), SMOOTH // 2
    if min(labels.shape) <= reach:
        pytest.skip("a mirror needs more pixels than the filter reaches")
    mirrored = np.pad(labels, reach, mode="reflect")
    expected = [
        [np.bincount(mirrored[y : y + SMOOTH, x : x + SMOOTH].ravel()).argmax() for x in range(labels.shape[1])]
        for y in range(labels.shape[0])
    ]
    np.testing.assert_array_equal(mode_filter(labels, 4), expected)


@pytest.mark.parametrize("seed", range(30))
def test_pieces_agree_with_opencv_label_by_label(seed: int) -> None:
    labels = patchy(seed)
    ours, count = pieces(labels), 0
    for label in np.unique(labels):
        found, theirs = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=8)
        count += found - 1
        for piece in range(1, found):
            assert len(np.unique(ours[theirs == piece])) == 1
    assert len(np.unique(ours)) == count


@pytest.mark.parametrize("share", [SMALLEST, 0.005, 0.05])
@pytest.mark.parametrize("seed", range(30))
def test_no_small_piece_stays_and_large_ones_only_grow(seed: int, share: float) -> None:
    labels = patchy(seed)
    before, found = pieces(labels), without_small(labels, share)
    area = np.bincount(before.ravel())
    least = min(share * labels.size, area.max())
    assert np.bincount(pieces(found).ravel()).min() >= least
    large = (area >= least)[before]
    np.testing.assert_array_equal(found[large], labels[large])
    assert set(np.unique(found)) <= set(np.unique(labels[large]))


def test_a_small_piece_gets_the_label_of_the_nearest_large_one() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 1
    labels[5:7, 15:17], labels[30:32, 24:26] = 2, 0
    expected = np.zeros_like(labels)
    expected[:, 20:] = 1
    np.testing.assert_array_equal(without_small(labels, 0.01), expected)


def test_a_cluster_map_has_no_small_piece_and_no_unknown_cluster(field: tuple[Bytes, Bytes], book: Codebook) -> None:
    found = cluster_map(field[0], book)
    assert found.shape == field[0].shape[:2]
    assert found.dtype == np.uint8
    assert found.max() < len(book.centres)
    assert np.bincount(pieces(found).ravel()).min() >= SMALLEST * found.size


def test_a_cluster_map_is_the_same_every_time_and_spares_its_input(field: tuple[Bytes, Bytes], book: Codebook) -> None:
    image = field[0].copy()
    image.setflags(write=False)
    np.testing.assert_array_equal(cluster_map(image, book), cluster_map(field[0], book))


def test_same_seed_same_codebook(field: tuple[Bytes, Bytes]) -> None:
    first, second = fit_image(field[0], 6, rng(4)), fit_image(field[0], 6, rng(4))
    np.testing.assert_array_equal(first.centres, second.centres)
    assert first.version == second.version


def test_other_pixels_other_version(field: tuple[Bytes, Bytes]) -> None:
    other = render(4, "target")[0]
    assert fit_image(field[0], 6, rng()).version != fit_image(other, 6, rng()).version


def test_a_codebook_survives_a_file(book: Codebook) -> None:
    again = Codebook.from_json(json.loads(json.dumps(book.to_json())))
    np.testing.assert_array_equal(again.centres, book.centres)
    assert again.centres.dtype == np.float32
    assert again.version == book.version


def test_samples_are_bounded_and_drawn_from_the_image(field: tuple[Bytes, Bytes]) -> None:
    found = sample_pixels(field[0], 200, rng())
    assert found.shape == (200, 4)
    everything = {tuple(row) for row in features(smoothed(field[0]))}
    assert {tuple(row) for row in found} <= everything
    assert sample_pixels(field[0][:3, :4], 200, rng()).shape == (12, 4)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (120, 80, 40)])
def test_an_image_of_one_colour_is_one_cluster(colour: tuple[int, int, int], book: Codebook) -> None:
    image = np.full((30, 40, 3), colour, np.uint8)
    own = fit_image(image, DEFAULT_K, rng())
    assert len(own.centres) == 1
    assert (cluster_map(image, own) == 0).all()
    assert len(np.unique(cluster_map(image, book))) == 1
    assert vegetation_guess(image, np.zeros((30, 40), np.uint8), 1) is None


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5)])
def test_tiny_images_have_cluster_maps(size: tuple[int, int], book: Codebook) -> None:
    image = rng().integers(0, 256, (*size, 3), np.uint8)
    for codes in (book, fit_image(image, DEFAULT_K, rng())):
        found = cluster_map(image, codes)
        assert found.shape == size
        assert found.max() < len(codes.centres)
    vegetation_guess(image, np.zeros(size, np.uint8), 1)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        fit(np.zeros((0, 4), np.float32), 3, rng())
    for k in (0, 256):
        with pytest.raises(ValueError, match="1 to 255"):
            fit(np.zeros((5, 4), np.float32), k, rng())


def test_colours_that_hardly_differ_give_fewer_clusters() -> None:
    samples = np.repeat(np.array([[0, 0, 0, 0], [50, 0, 0, 0], [50, 0, 0, 1e-30]], np.float32), 20, axis=0)
    assert len(fit(samples, DEFAULT_K, rng()).centres) <= 3


@pytest.mark.parametrize("style", ["source", "target"])
@pytest.mark.parametrize("seed", range(4))
def test_vegetation_is_guessed_on_a_field(seed: int, style: str) -> None:
    image, mask = render(seed, style)  # type: ignore[arg-type]
    found = cluster_map(image, fit_image(image, DEFAULT_K, rng()))
    guess = vegetation_guess(image, found, DEFAULT_K + 1)
    assert guess is not None
    assert np.isnan(guess[DEFAULT_K])
    seen = guess[np.unique(found)]
    assert ((seen >= 0) & (seen <= 1)).all()
    plants = (np.nan_to_num(guess) > 0.5)[found]
    assert (plants == (mask > 0)).mean() > 0.85


@pytest.mark.parametrize("light", [4, 40, 200])
def test_grey_images_tell_nothing_about_vegetation(light: int) -> None:
    grey = np.clip(rng().normal(light, light / 4, (60, 80, 1)), 0, 255).repeat(3, 2)
    noise = rng(1).integers(-2, 3, grey.shape)
    found = np.zeros((60, 80), np.uint8)
    assert vegetation_guess(grey.astype(np.uint8), found, 1) is None
    assert vegetation_guess(np.clip(grey + noise, 0, 255).astype(np.uint8), found, 1) is None


def shares(*rows: list[int]) -> NDArray[np.int64]:
    return np.array(rows, np.int64)


def test_the_image_that_shows_most_of_the_pool_comes_first() -> None:
    counts = shares([100, 0, 0], [40, 30, 30], [0, 100, 0])
    assert cover(counts, [], 3)[0] == 1


def test_clusters_that_are_shown_already_count_less() -> None:
    counts = shares([50, 50, 0], [50, 50, 0], [0, 0, 150])
    assert cover(counts, [0], 2)[0] == 2
    assert cover(counts, [], 2).tolist() == [0, 2]


def test_each_place_goes_to_what_adds_most() -> None:
    counts = rng().integers(0, 50, (20, 6)) * (rng(1).random((20, 6)) < 0.3)
    counts[:, 0] += 1
    shown = np.minimum(counts / counts.sum(1, keepdims=True) / 0.05, 1)
    worth, order = counts.sum(0) / counts.sum(), cover(counts, [4], 20)
    worth = worth * (1 - shown[4] / 2)
    gains = []
    for place, image in enumerate(order):
        left = [i for i in range(20) if i != 4 and i not in order[:place]]
        gains.append(float(shown[image] @ worth))
        assert gains[-1] == pytest.approx(max(shown[left] @ worth))
        worth = worth * (1 - shown[image] / 2)
    assert gains == sorted(gains, reverse=True)


def test_an_order_names_each_image_once_and_none_that_was_chosen() -> None:
    counts = rng().integers(0, 50, (30, 5))
    assert sorted(cover(counts, [3, 8], 99)) == [i for i in range(30) if i not in (3, 8)]
    assert len(cover(counts, [3, 8], 4)) == 4
    assert cover(counts, list(range(30)), 4).size == 0
    assert cover(counts, [], 0).size == 0
    assert cover(np.zeros((0, 5), np.int64), [], 3).size == 0


def test_images_without_a_cluster_map_come_last() -> None:
    counts = shares([0, 0], [5, 5], [0, 0], [5, 0])
    assert set(cover(counts, [], 4)[:2].tolist()) == {1, 3}
    assert cover(np.zeros((3, 4), np.int64), [], 2).size == 2


def test_large_pools_are_covered() -> None:
    counts = rng().integers(0, 50, (50_000, DEFAULT_K))
    assert len(cover(counts, list(range(1000)), 50_000)) == 49_000


def test_five_coarse_labels_tell_plants_from_soil_in_a_pool_of_photographs(data_folder: Path) -> None:
    folder = Folder(data_folder / "peanut")
    names = list(folder.names("train"))[::4]
    images = [folder.image(name, 320) for name in names]
    truth = [folder.classes.coarse_of()[folder.mask(name, 320)].astype(np.uint8) for name in names]
    book = codebook(images)
    maps = [cluster_map(image, book) for image in images]
    counts = np.array([np.bincount(found.ravel(), minlength=DEFAULT_K) for found in maps])
    asked = cover(counts, [], 5)
    votes = np.array([cluster_votes(maps[i], truth[i], DEFAULT_K, 2) for i in asked])
    votes[counts[asked] < 0.001 * maps[0].size] = UNKNOWN
    decided = decide(votes)
    rest = [i for i in range(len(maps)) if i not in set(asked)]
    said, true = decided[np.concatenate([maps[i] for i in rest])], np.concatenate([truth[i] for i in rest])
    sure = said < 2
    assert sure.mean() > 0.5
    assert (said[sure] == true[sure]).mean() > 0.9
    assert ((said == 0) & (true == 1)).sum() / (true == 1).sum() < 0.25
    assert ((said == 1) & (true == 0)).sum() / (true == 0).sum() < 0.1
