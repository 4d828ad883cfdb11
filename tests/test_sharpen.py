"""Sharpened masks: edges where the image has them, levels where it has none, better on real masks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from model.field import render
from model.metrics import confusion, mean_iou
from model.sharpen import box, coefficients, guide_of, sharpen


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


def enlarged(maps: NDArray[np.float32], image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return sharpen(maps, guide_of(image, (maps.shape[1], maps.shape[2])))


@pytest.mark.parametrize("edge", [46, 47, 48, 49, 50])
def test_an_edge_is_put_where_the_image_has_it(edge: int) -> None:
    image = halves(edge)
    mask = (image[..., 0] > 100).astype(np.uint8)
    found = enlarged(coarse(mask, 4, 2), image).argmax(0)
    assert np.array_equal(found, mask)


def test_where_the_image_has_no_edge_maps_are_only_enlarged() -> None:
    image = np.full((64, 96, 3), 120, np.uint8)
    ramp = np.repeat(np.linspace(0, 1, 24, dtype=np.float32)[None], 16, 0)
    found = enlarged(np.stack([ramp, 1 - ramp]), image)
    assert found.shape == (2, 64, 96)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-3)
    middle = found[0, :, 24:72]
    np.testing.assert_allclose(middle, np.broadcast_to(middle[:1], middle.shape), atol=1e-3)
    assert (np.diff(middle[0]) > 0).all()


def test_probabilities_still_sum_to_one() -> None:
    image, mask = render(0, "target", (160, 120))
    np.testing.assert_allclose(enlarged(coarse(mask, 4, 3), image).sum(0), 1, atol=1e-3)


@pytest.mark.parametrize("size", [(61, 97), (120, 160), (33, 34)])
@pytest.mark.parametrize("stride", [2, 4])
def test_any_size_will_do(size: tuple[int, int], stride: int) -> None:
    image = render(1, "target", size[::-1])[0]
    maps = np.random.default_rng(0).random((3, -(-size[0] // stride), -(-size[1] // stride)), np.float32)
    found = enlarged(maps, image)
    assert found.shape == (3, *size)
    assert np.isfinite(found).all()


def test_coefficients_of_a_linear_function_of_colour_are_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    guide = guide_of(image, (20, 30), edge=1e-7)
    values = (guide.image @ np.array([0.5, -0.25, 2]) + 0.1).astype(np.float32)
    slope, offset = coefficients(values, guide)
    np.testing.assert_allclose(slope, np.broadcast_to([0.5, -0.25, 2], slope.shape), atol=1e-2)
    np.testing.assert_allclose(offset, 0.1, atol=1e-2)


def test_means_over_squares_of_any_number_of_channels() -> None:
    values = np.random.default_rng(0).random((12, 14, 9), np.float32)
    found = box(values, 1)
    assert found.shape == values.shape
    np.testing.assert_allclose(found[5, 6], values[4:7, 5:8].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(box(values[..., 0], 1)[5, 6], found[5, 6, 0], rtol=1e-5)


def test_coarse_masks_of_fields_get_better() -> None:
    tables = np.zeros((2, 3, 3), np.int64)
    for seed in range(6):
        image, mask = render(seed, "target", (256, 192))
        maps = coarse(mask, 4, 3)
        plain = np.stack([cv2.resize(m, (256, 192), interpolation=cv2.INTER_LINEAR) for m in maps]).argmax(0)
        for number, found in enumerate((plain, enlarged(maps, image).argmax(0))):
            tables[number] += confusion(found.astype(np.uint8), mask, 3)
    assert mean_iou(tables[1]) > mean_iou(tables[0]) + 0.02
