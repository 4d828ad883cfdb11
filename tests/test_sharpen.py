"""Sharpened masks: edges where the image has them, levels where it has none, better on real masks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.field import render
from model.metrics import confusion, mean_iou
from model.sharpen import applied, box, coefficients, guide_of, sharpen, strongest


def halves(edge: int, size: tuple[int, int] = (64, 96)) -> NDArray[np.uint8]:
    """(H, W, 3) dark to the left of a column, bright from there on."""
    image = np.full((*size, 3), 40, np.uint8)
    image[:, edge:] = 200
    return image


def coarse(mask: NDArray[np.uint8], stride: int, classes: int) -> NDArray[np.float32]:
    """(C, h, w) shares of classes in the cells of a mask, blurred as coarse logits are."""
    shares = (mask[None] == np.arange(classes)[:, None, None]).astype(np.float32)
    size = (mask.shape[1] // stride, mask.shape[0] // stride)
    return np.stack([cv2.blur(cv2.resize(share, size, interpolation=cv2.INTER_AREA), (3, 3)) for share in shares])


def sharpened(maps: NDArray[np.float32], image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return sharpen(maps, guide_of(image, (maps.shape[1], maps.shape[2])))


@pytest.mark.parametrize("edge", [46, 47, 48, 49, 50])
def test_an_edge_is_put_where_the_image_has_it(edge: int) -> None:
    image = halves(edge)
    mask = (image[..., 0] > 100).astype(np.uint8)
    found = sharpened(coarse(mask, 4, 2), image).argmax(0)
    assert np.array_equal(found, mask)


def test_where_the_image_has_no_edge_maps_are_only_enlarged() -> None:
    image = np.full((64, 96, 3), 120, np.uint8)
    ramp = np.repeat(np.linspace(0, 1, 24, dtype=np.float32)[None], 16, 0)
    found = sharpened(np.stack([ramp, 1 - ramp]), image)
    assert found.shape == (2, 64, 96)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-3)
    middle = found[0, :, 24:72]
    np.testing.assert_allclose(middle, np.broadcast_to(middle[:1], middle.shape), atol=1e-3)
    assert (np.diff(middle[0]) > 0).all()


def test_probabilities_still_sum_to_one() -> None:
    image, mask = render(0, "target", (160, 120))
    np.testing.assert_allclose(sharpened(coarse(mask, 4, 3), image).sum(0), 1, atol=1e-3)


@pytest.mark.parametrize("size", [(61, 97), (120, 160), (33, 34)])
@pytest.mark.parametrize("stride", [2, 4])
def test_any_size_will_do(size: tuple[int, int], stride: int) -> None:
    image = render(1, "target", size[::-1])[0]
    maps = (
        np.random.default_rng(0).dirichlet([1, 1, 1], (-(-size[0] // stride), -(-size[1] // stride))).transpose(2, 0, 1)
    )
    found = sharpened(maps.astype(np.float32), image)
    assert found.shape == (3, *size)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-3)


def test_coefficients_of_a_linear_function_of_colour_are_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    guide = guide_of(image, (20, 30), edge=1e-7)
    values = (image / 255 @ np.array([0.5, -0.25, 2]) + 0.1).astype(np.float32)
    found = coefficients(np.stack([values, 1 - values]), guide)
    assert found.shape == (20, 30, 2, 4)
    np.testing.assert_allclose(found[..., 0, :], np.broadcast_to([0.5, -0.25, 2, 0.1], (20, 30, 4)), atol=1e-2)
    np.testing.assert_allclose(found[..., 1, :], np.broadcast_to([-0.5, 0.25, -2, 0.9], (20, 30, 4)), atol=1e-2)


@pytest.mark.parametrize("size", [(12, 14), (5, 9), (3, 3)])
def test_means_over_squares_are_those_of_opencv(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((*size, 9), np.float32)
    for radius in (1, 2):
        expected = np.dstack([cv2.blur(values[..., k], (2 * radius + 1,) * 2) for k in range(9)])
        np.testing.assert_allclose(box(values, radius), expected, rtol=1e-5)
    assert box(values[:1, :1], 3) == pytest.approx(values[:1, :1])


@pytest.mark.parametrize("size", [(12, 20), (50, 41), (9, 8)])
def test_linear_functions_are_enlarged_bilinearly(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    fitted, image = rng.random((6, 5, 2, 4), np.float32), rng.integers(0, 256, (3, *size), np.uint8)
    found = applied(fitted, image)
    for number in range(2):
        large = cv2.resize(fitted[:, :, number], size[::-1], interpolation=cv2.INTER_LINEAR)
        expected = (large[..., :3] * image.transpose(1, 2, 0) / 255).sum(2) + large[..., 3]
        np.testing.assert_allclose(found[number], expected, rtol=1e-4)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_the_strongest_of_equal_maps_is_the_first() -> None:
    maps = np.array([[[0.2, 0.5]], [[0.6, 0.5]], [[0.2, 0.0]]], np.float32)
    best, value = strongest(maps, np.array([3, 7, 9], np.uint8))
    assert best.tolist() == [[7, 3]]
    assert value.tolist() == pytest.approx(np.array([[0.6, 0.5]], np.float32))


def test_coarse_masks_of_fields_get_better() -> None:
    tables = np.zeros((2, 3, 3), np.int64)
    for seed in range(6):
        image, mask = render(seed, "target", (256, 192))
        maps = coarse(mask, 4, 3)
        plain = np.stack([cv2.resize(m, (256, 192), interpolation=cv2.INTER_LINEAR) for m in maps]).argmax(0)
        for number, found in enumerate((plain, sharpened(maps, image).argmax(0))):
            tables[number] += confusion(found.astype(np.uint8), mask, 3)
    assert mean_iou(tables[1]) > mean_iou(tables[0]) + 0.02
