"""Features of pixels: from every backbone, at every pixel what the maps say there, fast."""

from __future__ import annotations

import copy

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional

from model.backbones import BACKBONES, backbone_of, build_stages
from model.features import (
    COLOURS,
    CUT,
    WIDEST,
    Extractor,
    Image,
    Scaling,
    colour_features,
    enlarged,
    fit_scaling,
    lab,
    smoothed_at,
    smoothed_grid,
    spread_pixels,
)
from model.field import render
from model.folded import fold_batch_norms
from model.network import NETWORKS, SHIPPED, Network, build

SIZE = (90, 122)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor(SHIPPED, "cpu")


@pytest.fixture(scope="module")
def images() -> list[Image]:
    """A photograph and a field, (90, 122, 3) each, sides no multiple of a stride."""
    photo = cv2.resize(load_sample_image("flower.jpg"), SIZE[::-1])
    return [photo, render(0, "target", SIZE[::-1])[0]]


@pytest.fixture(scope="module")
def scaling(extractor: Extractor, images: list[Image]) -> Scaling:
    pixels = [spread_pixels(SIZE, 500)] * 2
    return fit_scaling(torch.cat(list(extractor.sample(images, pixels))), extractor.widths)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_a_backbone_with_strides_two_to_thirty_two(network: str) -> None:
    backbone, x = backbone_of(network), torch.rand(1, 3, 96, 128)
    assert backbone.strides[0] == 2
    assert backbone.strides[-1] == 32
    for stage, width, stride in zip(build_stages(network, False), backbone.widths, backbone.strides, strict=True):
        x = stage(x)
        assert x.shape == (1, width, 96 // stride, 128 // stride)


def test_there_is_no_backbone_of_another_name() -> None:
    with pytest.raises(ValueError, match="choose one of lraspp"):
        backbone_of("resnet50")


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50", SHIPPED])
def test_stages_have_the_weights_of_the_segmentation_networks_backbone(name: str) -> None:
    network, stages = build(name, 2, pretrained=False), build_stages(name, False)
    own, theirs = list(stages.parameters()), list(network.backbone().parameters())
    assert [p.shape for p in own[: len(theirs)]] == [p.shape for p in theirs[: len(own)]]


def test_the_shipped_backbone_sees_what_the_shipped_network_sees(images: list[Image]) -> None:
    network: Network = build(SHIPPED, 2)
    plain = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    maps = Extractor(SHIPPED, "cpu").maps(images)
    with torch.no_grad():
        expected = network.encode(plain)
    torch.testing.assert_close(maps.stages[2], expected["low"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.stages[4], expected["high"], rtol=1e-4, atol=1e-4)


def test_folded_stages_say_the_same() -> None:
    stages, x = build_stages(SHIPPED), torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(fold_batch_norms(copy.deepcopy(stages))(x), stages(x), rtol=1e-4, atol=1e-4)


def test_features_of_a_pixel_are_the_enlarged_maps_there(extractor: Extractor, images: list[Image]) -> None:
    pixels = [spread_pixels(SIZE, 40)] * 2
    maps = extractor.maps(images)
    large = torch.cat([functional.interpolate(m, SIZE, mode="bilinear", align_corners=False) for m in maps.stages], 1)
    for number, found in enumerate(extractor.sample(images, pixels)):
        rows, columns = pixels[number].T
        assert found.shape == (40, sum(extractor.widths))
        expected = large[number, :, rows, columns].T
        torch.testing.assert_close(found[:, :-COLOURS], expected, rtol=1e-4, atol=1e-4)


def test_images_of_different_sizes_are_taken_in_their_order(extractor: Extractor, images: list[Image]) -> None:
    mixed = [images[0], images[1][:64, :64], images[1]]
    pixels = [spread_pixels((image.shape[0], image.shape[1]), 30) for image in mixed]
    found = list(extractor.sample(mixed, pixels))
    alone = [next(extractor.sample([image], [places])) for image, places in zip(mixed, pixels, strict=True)]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_lab_is_that_of_opencv(images: list[Image]) -> None:
    plain = images[0].astype(np.float32) / 255
    expected = torch.from_numpy(cv2.cvtColor(plain, cv2.COLOR_RGB2LAB))
    torch.testing.assert_close(lab(torch.from_numpy(plain)), expected, rtol=0, atol=0.5)  # its roots are splines


def test_colour_is_smoothed_and_squared_with_its_sign(images: list[Image]) -> None:
    pixels = torch.from_numpy(spread_pixels(SIZE, 50))[None]
    rgb = smoothed_at(torch.from_numpy(images[0])[None], pixels)
    mean = cv2.blur(images[0].astype(np.float32), (5, 5), borderType=cv2.BORDER_REPLICATE) / 255
    rows, columns = pixels[0].T
    torch.testing.assert_close(rgb[0], torch.from_numpy(mean)[rows, columns], rtol=0, atol=1e-5)
    values, squares = colour_features(rgb).split(4, -1)
    assert (values < 0).any()
    torch.testing.assert_close(squares, values.sign() * values.square())
    torch.testing.assert_close(values[..., 3], 2 * rgb[..., 1] - rgb[..., 0] - rgb[..., 2])


def test_smoothed_colour_of_a_grid_of_pixels_is_that_of_the_pixels(images: list[Image]) -> None:
    image = torch.from_numpy(images[0])[None]
    every = torch.stack(torch.meshgrid(*map(torch.arange, SIZE), indexing="ij"), -1).view(1, -1, 2)
    torch.testing.assert_close(smoothed_grid(image, SIZE).view(1, -1, 3), smoothed_at(image, every), atol=1e-5, rtol=0)


def test_standardised_features_have_the_size_they_should(scaling: Scaling, extractor: Extractor) -> None:
    raw = torch.randn(2000, sum(extractor.widths)) * scaling.deviation + scaling.mean
    found = scaling(raw)
    assert found.shape == (2000, 472) == (2000, scaling.dimensions)
    squares = [part.square().sum(1).mean().item() for part in found.split(scaling.widths, 1)]
    assert squares == pytest.approx([1.0] * 7, abs=0.1)  # every stage weighs the same
    assert float(scaling(1e9 * torch.ones(1, raw.shape[1])).max()) == pytest.approx(CUT / 8**0.5)


def test_a_feature_that_never_varies_stays_finite() -> None:
    features = torch.randn(50, 3)
    features[:, 1] = 7
    assert torch.equal(fit_scaling(features, [3])(features)[:, 1], torch.zeros(50))


def test_wide_stages_are_reduced_to_what_varies_most() -> None:
    low = torch.randn(3000, 20) @ torch.randn(20, 400)
    scaling = fit_scaling(low, [400])
    found = scaling(low)
    assert found.shape == (3000, WIDEST)
    standard = ((low - low.mean(0)) / low.std(0, correction=0)) / 400**0.5
    torch.testing.assert_close(
        torch.cdist(found[:50], found[:50]), torch.cdist(standard[:50], standard[:50]), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_dense_logits_are_those_of_the_pixels(
    extractor: Extractor, images: list[Image], scaling: Scaling, stride: int
) -> None:
    weights, bias = torch.randn(3, 472), torch.randn(3)
    maps = extractor.maps(images)
    dense = maps.dense(scaling, stride).logits(scaling.parts(weights), bias)
    assert dense.shape == (2, 3, -(-SIZE[0] // stride), -(-SIZE[1] // stride))
    if stride == 1:
        every = torch.stack(torch.meshgrid(*map(torch.arange, SIZE), indexing="ij"), -1).view(1, -1, 2).repeat(2, 1, 1)
        expected = (scaling(maps.at(every)) @ weights.T + bias).movedim(1, 2).view(2, 3, *SIZE)
        differs = (dense - expected).abs() > 1e-3
        assert differs.float().mean() < 0.02  # only where features are cut, before or after they are enlarged
    else:
        every = maps.dense(scaling, 1).logits(scaling.parts(weights), bias)
        full = functional.interpolate(every, dense.shape[2:], mode="area")
        assert torch.corrcoef(torch.stack([dense.flatten(), full.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("size", [(7, 5), (12, 16), (23, 40)])
def test_maps_are_enlarged_bilinearly(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 6, 5)
    expected = functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged(maps, size), expected)


def test_pixels_are_spread_evenly_and_always_the_same() -> None:
    pixels = spread_pixels((480, 640), 240)
    assert np.array_equal(pixels[:60], spread_pixels((480, 640), 60))
    cells = pixels // np.array([120, 160])
    counts = np.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert counts.std() < 2.5  # 3.75 were they drawn at random
    assert len(np.unique(pixels, axis=0)) == 240
    assert spread_pixels((3, 2), 50).max(0).tolist() == [2, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same(extractor: Extractor, images: list[Image], scaling: Scaling) -> None:
    pixels = [spread_pixels(SIZE, 100)] * 2
    there = list(Extractor(SHIPPED, "cuda").sample(images, pixels))
    for one, other in zip(there, extractor.sample(images, pixels), strict=True):
        assert (scaling(one) - scaling(other)).norm() < 0.02 * scaling(other).norm()  # half precision
    weights, bias = torch.randn(3, 472), torch.randn(3)
    parts = scaling.parts(weights)
    dense = Extractor(SHIPPED, "cuda").maps(images).dense(scaling, 4).logits(parts, bias).cpu()
    expected = extractor.maps(images).dense(scaling, 4).logits(parts, bias)
    assert (dense - expected).norm() < 0.02 * expected.norm()


def test_all_backbones_are_used() -> None:
    assert {name.partition("_")[2] for name in NETWORKS} == set(BACKBONES)
