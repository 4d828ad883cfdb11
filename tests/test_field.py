"""Rendered fields: the same every time, exact, varied, and unlike each other by style."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from model.data import Folder
from model.farms import FARMS, Style
from model.field import CROP, SOIL, WEED, render, write_folder

STYLES = sorted(FARMS)


@pytest.mark.parametrize("style", STYLES)
def test_same_seed_same_image(style: Style) -> None:
    image, mask = render(5, style)
    again, same = render(5, style)
    assert image.shape == (360, 480, 3)
    assert mask.shape == (360, 480)
    assert image.dtype == mask.dtype == np.uint8
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, same)
    assert not np.array_equal(image, render(6, style)[0])


@pytest.mark.parametrize("style", STYLES)
def test_a_series_has_all_classes_in_plausible_shares(style: Style) -> None:
    shares = np.array([np.bincount(render(seed, style)[1].ravel(), minlength=3) for seed in range(24)]) / (480 * 360)
    assert shares.shape == (24, 3)
    assert 0.6 < shares[:, SOIL].mean() < 0.96
    assert 0.03 < shares[:, CROP].mean() < 0.3
    assert 0.005 < shares[:, WEED].mean() < 0.2
    assert (shares[:, CROP] > 0).all()
    assert (shares[:, WEED] == 0).any()
    assert shares[:, WEED].max() > 3 * np.median(shares[:, WEED])


@pytest.mark.parametrize("style", STYLES)
def test_the_mask_lies_on_the_plants(style: Style) -> None:
    for seed in range(6):
        image, mask = render(seed, style)
        green = image[..., 1].astype(float) * 2 - image[..., 0] - image[..., 2]
        plants = cv2.erode((mask > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        soil = cv2.erode((mask == 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert (green[plants] > 15).mean() > 0.97
        assert (green[soil] > 15).mean() < 0.02


def test_styles_differ_in_soil_and_crop() -> None:
    soil, thickness = {}, {}
    for style in STYLES:
        pairs = [render(seed, style) for seed in range(8)]
        soil[style] = np.mean([image[mask == SOIL].mean(0) for image, mask in pairs], 0)
        thickness[style] = np.mean(
            [cv2.distanceTransform((m == CROP).astype(np.uint8), cv2.DIST_L2, 5).max() for _, m in pairs]
        )
    redness = {style: colour[0] / colour[2] for style, colour in soil.items()}
    assert redness["source"] > redness["target"] + 0.3
    assert thickness["source"] > 1.2 * thickness["target"]


@pytest.mark.parametrize("size", [(160, 120), (640, 480), (300, 400)])
def test_any_size(size: tuple[int, int]) -> None:
    image, mask = render(0, "target", size)
    assert image.shape == (size[1], size[0], 3)
    assert (mask == CROP).any()


def test_a_written_folder_reads_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "field", 3, 2, "source", seed=7)
    folder = Folder(tmp_path / "field")
    assert folder.classes.fine == ("soil", "crop", "weed")
    assert folder.classes.groups == ((0,), (1, 2))
    assert len(folder.names("train")) == 3
    assert len(folder.names("test")) == 2
    assert not set(folder.names("train")) & set(folder.names("test"))
    image, mask = render(7_000_000, "source")
    np.testing.assert_array_equal(folder.mask("0001", 480), mask)
    assert np.abs(folder.image("0001", 480).astype(int) - image).mean() < 5
