"""Scores from sampled pixels: what autograd says of the same pixels, right by definition, alike for all chunks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.classes import Classes
from model.features import Extractor, fit_scaling, spread_pixels
from model.field import render
from model.gradients import marginal_cross_entropy
from model.heads import NEVER, Head, LabelledPixels, choose_pixels, no_sums, solve
from model.network import SHIPPED
from model.pixel_scores import CHUNK, FISHER_FEATURES, NUMBERS, SKETCH, VECTORS, score_pool

CLASSES = Classes(("soil", "crop", "weed"), ("background", "vegetation"), ((0,), (1, 2)))
SETS = torch.from_numpy(CLASSES.sets())
SOIL, PLANT, ANY = CLASSES.coarse_row(0), CLASSES.coarse_row(1), CLASSES.any_row
IMAGES, PIXELS = 5, 60


class Fields:
    """Rendered fields: stored features of their pixels and a head that has learnt two others."""

    def __init__(self) -> None:
        fields = [render(seed, "target", (160, 120)) for seed in range(IMAGES + 2)]
        extractor, rng = Extractor(SHIPPED, "cpu"), np.random.default_rng(0)
        images, masks = [image for image, _ in fields], [mask for _, mask in fields]
        raw = list(extractor.sample(images, [spread_pixels((120, 160), PIXELS)] * len(images)))
        scaling = fit_scaling(torch.cat(raw), extractor.widths)
        self.features = torch.stack([scaling(image) for image in raw[2:]]).half()
        sums = no_sums(CLASSES.fine, scaling.dimensions)
        chosen = [choose_pixels(mask, 300, rng) for mask in masks[:2]]
        learnt = extractor.sample(images[:2], [pixels for pixels, _, _ in chosen])
        for features, (_, labels, weights) in zip(learnt, chosen, strict=True):
            sums = sums + LabelledPixels(scaling(features), labels, weights).sums(CLASSES.fine)
        self.head = solve(sums).tempered(3.0)
        self.rows = rng.integers(0, ANY + 1, (IMAGES, PIXELS))

    def score(self, name: str, rows: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
        return score_pool(self.features, self.head, CLASSES, [name], rows)[name]

    def probabilities(self) -> NDArray[np.float64]:
        """(N, P, C)."""
        return self.head.probabilities(self.features.float()).double().numpy()

    def layer(self) -> nn.Linear:
        """The head as torch's layer."""
        layer = nn.Linear(self.features.shape[-1], 3)
        with torch.no_grad():
            layer.weight.copy_(self.head.weights)
            layer.bias.copy_(self.head.bias)
        return layer

    def with_one(self) -> NDArray[np.float64]:
        """(N, P, D + 1) features and the constant 1."""
        features = self.features.double().numpy()
        return np.concatenate([features, np.ones((*features.shape[:2], 1))], -1)


@pytest.fixture(scope="module")
def fields() -> Fields:
    return Fields()


def gradient_of(layer: nn.Linear, loss: Tensor) -> Tensor:
    """Weights, then bias, by autograd."""
    weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
    return torch.cat([weight.flatten(), bias])


def close(found: NDArray[np.float32], expected: NDArray[np.floating] | Tensor) -> None:
    """Equal but for 1e-5 of the largest number."""
    values = np.asarray(expected)
    np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5 * float(np.abs(values).max()))


def test_gradient_against_sets_of_classes_is_that_of_autograd(fields: Fields) -> None:
    layer, expected = fields.layer(), []
    for features, rows in zip(fields.features.float(), torch.from_numpy(fields.rows), strict=True):
        loss = marginal_cross_entropy(layer(features).T[None, :, None], rows[None, None], SETS).mean()
        expected.append(gradient_of(layer, loss))
    found = fields.score("embedding", fields.rows)
    close(found, torch.stack(expected))
    close(fields.score("magnitude", fields.rows), torch.stack(expected).norm(dim=1))


def test_gradient_against_own_classes_is_that_of_autograd(fields: Fields) -> None:
    layer, expected = fields.layer(), []
    for features in fields.features.float():
        logits = layer(features)
        expected.append(gradient_of(layer, nn.functional.cross_entropy(logits, logits.argmax(1))))
    close(fields.score("own"), torch.stack(expected))
    close(fields.score("embedding"), torch.stack(expected))  # where nothing is known
    assert not fields.score("magnitude").any()


def test_gradient_of_the_entropy_is_that_of_autograd(fields: Fields) -> None:
    layer, expected = fields.layer(), []
    for features in fields.features.float():
        log_p = layer(features).log_softmax(1)
        expected.append(gradient_of(layer, -(log_p.exp() * log_p).sum(1).mean()).norm().detach())
    close(fields.score("entropy_gradnorm"), torch.stack(expected))


def test_loss_is_that_of_autograd(fields: Fields) -> None:
    logits = fields.head.logits(fields.features.float()).movedim(-1, 1)[:, :, None]
    expected = marginal_cross_entropy(logits, torch.from_numpy(fields.rows)[:, None], SETS).mean((1, 2))
    close(fields.score("pseudo_loss", fields.rows), expected)


@pytest.mark.parametrize("known", [True, False])
def test_expected_squared_gradient_is_its_mean_over_all_labelings(fields: Fields, known: bool) -> None:
    """All 3^4 labelings of four pixels, each with its probability."""
    rows = fields.rows[:, :4] if known else np.full((IMAGES, 4), ANY)
    features, p = fields.with_one()[:, :4], fields.probabilities()[:, :4]
    allowed = CLASSES.sets()[rows]
    q = p * allowed / (p * allowed).sum(-1, keepdims=True)
    expected = np.zeros(IMAGES)
    for labeling in product(range(3), repeat=4):
        residual = p - np.eye(3)[list(labeling)]
        gradient = np.einsum("npc,npd->ncd", residual, features) / 4
        chance = np.prod(q[:, range(4), labeling], axis=1)
        expected += chance * (gradient**2).sum((1, 2))
    name = "coarse_egl" if known else "egl"
    close(score_pool(fields.features[:, :4], fields.head, CLASSES, [name], rows)[name], expected)


def test_coarse_egl_is_magnitude_and_variance(fields: Fields) -> None:
    parts = [fields.score(name, fields.rows) for name in ("magnitude", "variance")]
    close(fields.score("coarse_egl", fields.rows), parts[0] ** 2 + parts[1])
    close(fields.score("coarse_egl"), fields.score("egl"))
    exact = np.zeros((IMAGES, PIXELS), int)
    assert np.abs(fields.score("variance", exact)).max() < 1e-9


def test_settles_form_by_definition(fields: Fields) -> None:
    p, features = fields.probabilities(), fields.with_one()
    away = np.stack([np.linalg.norm(p - np.eye(3)[y], axis=-1) for y in range(3)], -1)
    expected = ((p * away).sum(-1) * np.linalg.norm(features, axis=-1)).mean(1)
    close(fields.score("egl_settles"), expected)


def test_expected_squared_gradient_over_segments_is_its_mean_over_their_labelings(fields: Fields) -> None:
    segments = np.tile([0, 0, 1, 2, 2, 2], (IMAGES, 1))
    rows = np.tile([PLANT, PLANT, ANY, SOIL, SOIL, SOIL], (IMAGES, 1))
    features, p = fields.with_one()[:, :6], fields.probabilities()[:, :6]
    mean = np.stack([p[:, segments[0] == m].mean(1) for m in range(3)], 1) * CLASSES.sets()[[PLANT, ANY, SOIL]]
    pi = mean / mean.sum(-1, keepdims=True)
    expected = np.zeros(IMAGES)
    for labels in product(range(3), repeat=3):
        residual = p - np.eye(3)[np.array(labels)[segments[0]]]
        gradient = np.einsum("npc,npd->ncd", residual, features) / 6
        expected += np.prod(pi[:, range(3), labels], axis=1) * (gradient**2).sum((1, 2))
    found = score_pool(fields.features[:, :6], fields.head, CLASSES, ["segment_egl"], rows, segments)
    close(found["segment_egl"], expected)


def test_entropy_has_two_parts(fields: Fields) -> None:
    p = fields.probabilities()
    groups = np.stack([p[..., 0], p[..., 1:].sum(-1)], -1)
    close(fields.score("entropy"), -(p * np.log(p)).sum(-1).mean(1))
    close(fields.score("coarse_entropy"), -(groups * np.log(groups)).sum(-1).mean(1))
    close(fields.score("fine_entropy"), fields.score("entropy") - fields.score("coarse_entropy"))


def test_other_uncertainties_by_definition(fields: Fields) -> None:
    p = fields.probabilities()
    ordered, entropy = np.sort(p, -1), -(p * np.log(p)).sum(-1)
    close(fields.score("least_confidence"), 1 - ordered[..., -1].mean(1))
    close(fields.score("margin"), (ordered[..., -1] - ordered[..., -2]).mean(1))
    close(fields.score("entropy_top"), np.sort(entropy, 1)[:, -6:].mean(1))
    close(fields.score("class_entropy").sum(1), entropy.mean(1))
    plants = p.argmax(-1) > 0
    expected = [e[f].mean() if f.any() else 0.0 for e, f in zip(entropy, plants, strict=True)]
    close(fields.score("entropy_foreground"), np.array(expected))


def test_foreground_is_what_is_known_else_what_is_predicted(fields: Fields) -> None:
    predicted = fields.probabilities().argmax(-1) > 0
    close(fields.score("foreground"), predicted.mean(1))
    named = CLASSES.named()[fields.rows]
    close(fields.score("foreground", fields.rows), np.where(named >= 0, named > 0, predicted).mean(1))


def test_bald_is_what_passes_disagree_about(fields: Fields) -> None:
    assert (fields.score("bald") > 0).all()
    constant = Head(CLASSES.fine, torch.zeros_like(fields.head.weights), fields.head.bias)
    assert score_pool(fields.features, constant, CLASSES, ["bald"])["bald"].max() < 1e-6


def test_huang_form_is_the_own_gradient_where_passes_agree(fields: Fields) -> None:
    sure = Head(CLASSES.fine, torch.zeros_like(fields.head.weights), torch.tensor([2.0, 1.0, 0.0]))
    found = score_pool(fields.features, sure, CLASSES, ["egl_huang", "own"])
    close(found["egl_huang"], (found["own"] ** 2).sum(1))


def test_fisher_matrix_is_the_expected_outer_product(fields: Fields) -> None:
    found = fields.score("fisher")
    size = 3 * (FISHER_FEATURES + 1)
    assert found.shape == (IMAGES, size, size)
    np.testing.assert_allclose(found, found.transpose(0, 2, 1), atol=1e-6)
    assert np.linalg.eigvalsh(found).min() > -1e-5
    # The constant's block is the mean of diag p - p p'.
    p, last = fields.probabilities(), np.arange(3) * (FISHER_FEATURES + 1) + FISHER_FEATURES
    expected = (np.eye(3) * p[..., None] - p[..., None] * p[..., None, :]).mean(1)
    np.testing.assert_allclose(found[:, last][:, :, last], expected, rtol=1e-4, atol=1e-6)


def test_sketch_keeps_lengths(fields: Fields) -> None:
    whole, sketch = fields.score("embedding", fields.rows), fields.score("sketch", fields.rows)
    assert sketch.shape == (IMAGES, SKETCH)
    lengths = np.linalg.norm(sketch, axis=1) / np.linalg.norm(whole, axis=1)
    np.testing.assert_allclose(lengths, 1, atol=0.25)


def test_pooled_features_are_means_over_image_and_foreground(fields: Fields) -> None:
    features, found = fields.features.float().numpy(), fields.score("pooled", fields.rows)
    named = CLASSES.named()[fields.rows]
    inside = np.where(named >= 0, named > 0, fields.probabilities().argmax(-1) > 0)
    close(found[:, :472], features.mean(1))
    close(found[:, 472:], np.stack([f[i].mean(0) for f, i in zip(features, inside, strict=True)]))
    close(fields.score("pooled", np.zeros((IMAGES, PIXELS), int))[:, 472:], features.mean(1))  # soil alone


@pytest.mark.parametrize("name", [*NUMBERS, *VECTORS])
def test_every_score_is_finite_and_the_same_in_all_chunks(fields: Fields, name: str) -> None:
    many = fields.features.repeat(-(-(CHUNK + 9) // IMAGES), 1, 1)
    rows = np.tile(fields.rows, (len(many) // IMAGES, 1))
    unlabelled = fields.head.bias.clone()
    unlabelled[2] = NEVER
    for head in (fields.head, Head(CLASSES.fine, fields.head.weights, unlabelled)):
        found = score_pool(many, head, CLASSES, [name], rows)[name]
        assert found.shape[0] == len(many)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[-IMAGES:], found[:IMAGES], rtol=1e-4, atol=1e-6)


def test_no_image_no_score(fields: Fields) -> None:
    found = score_pool(fields.features[:0], fields.head, CLASSES, ["entropy", "egl"])
    assert [len(values) for values in found.values()] == [0, 0]


def test_what_cannot_be_scored_is_refused(fields: Fields) -> None:
    with pytest.raises(ValueError, match="there is no score doubt"):
        score_pool(fields.features, fields.head, CLASSES, ["doubt"])
    other = Classes(("weed", "crop", "soil"), ("background", "vegetation"), ((2,), (0, 1)))
    with pytest.raises(ValueError, match="not weed, crop, soil"):
        score_pool(fields.features, fields.head, other, ["entropy"])
