"""Scores of images: right by definition, in the obvious order, finite, and from a network left as it was."""

from __future__ import annotations

import copy
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional

from model.classes import Classes
from model.data import Folder
from model.folded import fold_batch_norms
from model.gradients import marginal_cross_entropy
from model.network import NETWORKS, SHIPPED, Network, build
from model.pseudo import fine_target
from model.scoring import ImageScore, Scorer, gradient_map

DATA = Path(os.environ.get("FIRSTROW_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
CLASSES = Classes(("soil", "crop", "weed"), ("soil", "plant"), ((0,), (1, 2)))
SETS = torch.from_numpy(CLASSES.sets())
SOIL, PLANT, ANY = CLASSES.coarse_row(0), CLASSES.coarse_row(1), CLASSES.any_row
NUMBERS = [field.name for field in fields(ImageScore) if field.type == "float"]


def sharp(strength: float) -> Network:
    """ImageNet features under a random head that has opinions of that strength."""
    network = build(SHIPPED, 3)
    rng = torch.Generator().manual_seed(0)
    for layer in network.last_layers():
        nn.init.normal_(layer.weight, std=strength, generator=rng)
    return network


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(sharp(0.03), CLASSES, "cpu")


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    """(75, 101, 3), part of a photograph; may not be written to, as arrays from a cache may not."""
    part = load_sample_image("flower.jpg")[100:400:4, 100:504:4]
    return np.frombuffer(np.ascontiguousarray(part).tobytes(), np.uint8).reshape(part.shape)


def everywhere(image: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
    """A target that is the same for all pixels."""
    return np.full(image.shape[:2], row, np.uint8)


def mixed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A target with every row of the sets."""
    return np.random.default_rng(0).integers(0, ANY + 1, image.shape[:2], np.uint8)


def logits_of(network: Network, image: NDArray[np.uint8]) -> Tensor:
    """(1, 3, H, W), with a graph."""
    return network(torch.tensor(image).permute(2, 0, 1)[None] / 255)  # type: ignore[no-any-return]


def probabilities(network: Network, image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(3, H, W) by plain numpy."""
    z = logits_of(network, image)[0].detach().double().numpy()
    e = np.exp(z - z.max(0))
    return np.asarray(e / e.sum(0))


def expected_embedding(network: Network, image: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.float32]:
    """By autograd, on the network as it is."""
    loss = marginal_cross_entropy(logits_of(network, image), torch.tensor(target)[None], SETS).mean()
    parameters = [p for layer in network.last_layers() for p in layer.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).numpy()


@pytest.mark.parametrize("name", [n for n in NETWORKS if "101" not in n])
def test_folded_network_says_the_same(name: str) -> None:
    network = build(name, 3, pretrained=False)
    rng = torch.Generator().manual_seed(0)
    for norm in [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=rng)
        nn.init.normal_(norm.bias, 0, 0.1, generator=rng)
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 64, 96, generator=rng))
        network.eval()
        images = torch.rand(1, 3, 64, 96, generator=rng)
        expected = network(images)
        folded = fold_batch_norms(copy.deepcopy(network))
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize("training", [True, False])
def test_network_is_left_as_it_was(image: NDArray[np.uint8], training: bool) -> None:
    network = sharp(0.03).train(training)
    network.backbone().eval()  # as where a backbone is frozen: modes differ between parts
    modes = [module.training for module in network.modules()]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    scorer = Scorer(network, CLASSES, "cpu")
    scorer.score(image, mixed(image))
    gradient_map(network, image, mixed(image), CLASSES, "cpu")
    assert scorer.network is network
    assert modes == [module.training for module in network.modules()]
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_network_in_training_mode_is_scored_as_in_evaluation_mode(image: NDArray[np.uint8]) -> None:
    network = sharp(0.03)
    expected = Scorer(network, CLASSES, "cpu").score(image, mixed(image))
    pull = gradient_map(network, image, mixed(image), CLASSES, "cpu")
    network.train()
    found = Scorer(network, CLASSES, "cpu").score(image, mixed(image))
    np.testing.assert_array_equal(found.embedding, expected.embedding)
    np.testing.assert_array_equal(gradient_map(network, image, mixed(image), CLASSES, "cpu"), pull)


def test_a_map_is_made_elsewhere_without_moving_the_network(image: NDArray[np.uint8]) -> None:
    network = sharp(0.03)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        gradient_map(network, image, mixed(image), CLASSES, "meta")  # a device without numbers to return
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}


def test_embedding_is_autograds_gradient(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    score = scorer.score(image, mixed(image))
    expected = expected_embedding(scorer.network, image, mixed(image))
    assert np.linalg.norm(score.embedding - expected) < 1e-4 * np.linalg.norm(expected)
    assert score.magnitude == pytest.approx(np.linalg.norm(expected), rel=1e-4)
    assert score.coarse_egl == pytest.approx(score.magnitude**2 + score.variance)


def test_without_a_coarse_label_the_embedding_is_that_of_the_networks_own_classes(
    scorer: Scorer, image: NDArray[np.uint8]
) -> None:
    score = scorer.score(image, everywhere(image, ANY))
    assert (score.magnitude, score.pseudo_loss) == (0, 0)
    assert score.coarse_egl == score.variance == score.egl > 0
    np.testing.assert_array_equal(score.embedding, scorer.score(image, score.prediction).embedding)
    assert np.linalg.norm(score.embedding) > 0


def test_a_full_annotation_leaves_no_doubt_inside_the_set(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    target = np.random.default_rng(1).integers(0, 3, image.shape[:2], np.uint8)
    score = scorer.score(image, target)
    assert score.variance == 0
    loss = functional.cross_entropy(logits_of(scorer.network, image), torch.tensor(target)[None].long())
    assert score.pseudo_loss == pytest.approx(loss.item(), rel=1e-4)


def test_pseudo_loss_is_the_mean_loss(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    loss = marginal_cross_entropy(logits_of(scorer.network, image), torch.tensor(mixed(image))[None], SETS).mean()
    assert scorer.score(image, mixed(image)).pseudo_loss == pytest.approx(loss.item(), rel=1e-4)


def test_uncertainties_are_what_they_are_called(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    score, p = scorer.score(image, mixed(image)), probabilities(scorer.network, image)
    group = np.stack([p[0], p[1] + p[2]])
    inside = p[1:] / group[1]
    ordered = np.sort(p, axis=0)
    assert score.entropy == pytest.approx(-(p * np.log(p)).sum(0).mean(), rel=1e-4)
    assert score.coarse_entropy == pytest.approx(-(group * np.log(group)).sum(0).mean(), rel=1e-4)
    assert score.fine_entropy == pytest.approx((group[1] * -(inside * np.log(inside)).sum(0)).mean(), rel=1e-4)
    assert score.entropy == pytest.approx(score.coarse_entropy + score.fine_entropy, rel=1e-6)
    assert score.least_confidence == pytest.approx((1 - ordered[-1]).mean(), rel=1e-4)
    assert score.margin == pytest.approx((ordered[-1] - ordered[-2]).mean(), rel=1e-4)


def test_prediction_and_confidence_are_those_of_the_network(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    score, p = scorer.score(image, everywhere(image, ANY)), probabilities(scorer.network, image)
    assert len(np.unique(score.prediction)) > 1
    assert (score.prediction == p.argmax(0)).mean() > 0.999
    assert np.abs(score.confidence - 255 * p.max(0)).max() < 0.51
    assert score.prediction.dtype == score.confidence.dtype == np.uint8


def test_a_contradicted_network_has_more_to_learn(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    said = np.where(scorer.score(image, everywhere(image, ANY)).prediction == 0, SOIL, PLANT)
    agreed, contradicted = scorer.score(image, said), scorer.score(image, SOIL + PLANT - said)
    assert contradicted.magnitude > agreed.magnitude
    assert contradicted.coarse_egl > agreed.coarse_egl
    assert contradicted.pseudo_loss > agreed.pseudo_loss
    assert contradicted.egl == agreed.egl


def test_foreground_is_what_the_target_says_then_what_the_network_says(
    scorer: Scorer, image: NDArray[np.uint8]
) -> None:
    target = everywhere(image, SOIL)
    target[:30], target[30:40], target[40:50] = PLANT, 2, ANY
    score = scorer.score(image, target)
    seen = (score.prediction[40:50] != 0).sum() / score.prediction.size
    assert 0 < seen < 10 / 75
    assert score.foreground == pytest.approx(40 / 75 + seen)
    assert scorer.score(image, everywhere(image, 0)).foreground == 0


def test_features_are_the_mean_over_the_image_then_over_the_foreground(
    scorer: Scorer, image: NDArray[np.uint8]
) -> None:
    target = everywhere(image, SOIL)
    target[:, :50] = PLANT
    whole, inside = np.split(scorer.score(image, target).features, 2)
    target = SOIL + PLANT - target
    again, outside = np.split(scorer.score(image, target).features, 2)
    np.testing.assert_array_equal(whole, again)
    assert np.abs(inside - outside).max() > 0.01
    bare_whole, bare_inside = np.split(scorer.score(image, everywhere(image, SOIL)).features, 2)
    np.testing.assert_array_equal(bare_whole, bare_inside)
    _, full = np.split(scorer.score(image, everywhere(image, PLANT)).features, 2)
    np.testing.assert_allclose(full, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [0, PLANT, ANY])
def test_extreme_logits_give_finite_scores(image: NDArray[np.uint8], row: int) -> None:
    network = sharp(300)
    logits = logits_of(network, image)
    assert float(logits.detach().max() - logits.detach().min()) > 1000
    score = Scorer(network, CLASSES, "cpu").score(image, everywhere(image, row))
    assert all(np.isfinite(getattr(score, name)) and getattr(score, name) >= 0 for name in NUMBERS)
    assert np.isfinite(score.embedding).all()
    assert np.isfinite(score.features).all()


def test_one_class_alone_is_certain(image: NDArray[np.uint8]) -> None:
    alone = Classes(("plant",), ("plant",), ((0,),))
    score = Scorer(build(SHIPPED, 1), alone, "cpu").score(image, everywhere(image, 0))
    assert (score.margin, score.entropy, score.egl, score.foreground) == (1, 0, 0, 0)


def test_a_damaged_network_is_refused(image: NDArray[np.uint8]) -> None:
    network = sharp(0.03)
    nn.init.constant_(network.last_layers()[0].weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        Scorer(network, CLASSES, "cpu").score(image, everywhere(image, ANY))


def test_what_does_not_fit_is_refused(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"image is \(75, 101\), its target \(101, 75\)"):
        scorer.score(image, everywhere(image, ANY).T)
    with pytest.raises(ValueError, match="knows 2 classes, not soil, crop, weed"):
        Scorer(build(SHIPPED, 2), CLASSES, "cpu")


def test_many_images_are_scored_as_each_alone(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    images, targets = [image, image[::-1]], [mixed(image), everywhere(image, ANY)]
    for found, one, target in zip(scorer.score_many(images, targets), images, targets, strict=True):
        alone = scorer.score(one, target)
        np.testing.assert_array_equal(found.embedding, alone.embedding)
        assert [getattr(found, name) for name in NUMBERS] == [getattr(alone, name) for name in NUMBERS]
    with pytest.raises(ValueError, match="shorter"):
        list(scorer.score_many(images, targets[:1]))


def test_gradient_map_shows_how_strongly_each_pixel_pulls(scorer: Scorer, image: NDArray[np.uint8]) -> None:
    target, p = mixed(image), probabilities(scorer.network, image)
    allowed = CLASSES.sets()[target].transpose(2, 0, 1)
    q = p * allowed / (p * allowed).sum(0)
    expected = np.where(target == ANY, np.sqrt(1 - (p**2).sum(0)), np.sqrt(((p - q) ** 2).sum(0)))
    found = gradient_map(scorer.network, image, target, CLASSES, "cpu")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_a_field_photo_is_scored(scorer: Scorer) -> None:
    if not (DATA / "peanut" / "dataset.json").is_file():
        pytest.skip("no pixel-labelled folder: set FIRSTROW_DATA to the folder that holds peanut/")
    folder = Folder(DATA / "peanut")
    name = folder.names(next(iter(folder.splits)))[0]
    photo, target = folder.image(name, 160), fine_target(folder.mask(name, 160), folder.classes)
    fine = Scorer(build(SHIPPED, len(folder.classes.fine)), folder.classes, "cpu").score(photo, target)
    groups = np.append(folder.classes.coarse_of() + len(folder.classes.fine), folder.classes.any_row)
    coarse = Scorer(build(SHIPPED, len(folder.classes.fine)), folder.classes, "cpu").score(
        photo, groups[np.where(target == folder.classes.any_row, len(folder.classes.fine), target)]
    )
    assert fine.foreground == coarse.foreground > 0
    assert fine.pseudo_loss > coarse.pseudo_loss > 0
    assert fine.variance < coarse.variance < coarse.egl
