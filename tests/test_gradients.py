"""The loss over sets of classes and its closed-form gradient agree with autograd and with plain enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.classes import Classes
from model.gradients import (
    gradient_embedding,
    label_variance,
    marginal_cross_entropy,
    posteriors,
    squared_features,
)
from model.network import SHIPPED, build

CLASSES = Classes(("soil", "crop", "weed"), ("soil", "plant"), ((0,), (1, 2)))
SETS = torch.from_numpy(CLASSES.sets())
ANY = CLASSES.any_row


def case(seed: int, shape: tuple[int, int, int] = (2, 5, 7), spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (N, 3, H, W) and a target that has every row of the sets."""
    rng = torch.Generator().manual_seed(seed)
    count, height, width = shape
    target = torch.randint(0, len(SETS), shape, generator=rng)
    target.view(-1)[: len(SETS)] = torch.arange(len(SETS))[: target.numel()]
    return spread * torch.randn(count, 3, height, width, generator=rng, dtype=torch.float64), target


def test_a_set_of_one_class_is_ordinary_cross_entropy() -> None:
    logits, _ = case(0)
    target = torch.randint(0, 3, (2, 5, 7), generator=torch.Generator().manual_seed(1))
    expected = functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(marginal_cross_entropy(logits, target, SETS), expected)


def test_loss_is_minus_the_log_of_the_sets_probability() -> None:
    logits, target = case(1)
    inside = (logits.softmax(1) * SETS[target].movedim(-1, 1)).sum(1)
    torch.testing.assert_close(marginal_cross_entropy(logits, target, SETS), -inside.log())


def test_any_class_costs_and_pulls_exactly_nothing() -> None:
    logits, target = case(2, spread=50)
    logits.requires_grad_()
    loss = marginal_cross_entropy(logits, target, SETS)
    gradient = torch.autograd.grad(loss.sum(), logits)[0].movedim(1, -1)
    assert (loss[target == ANY] == 0).all()
    assert (gradient[target == ANY] == 0).all()
    assert (gradient[target == 0] != 0).any()


def test_p_minus_q_is_the_gradient() -> None:
    logits, target = case(3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(marginal_cross_entropy(logits, target, SETS).sum(), logits)
    p, q = posteriors(logits.detach(), target, SETS)
    torch.testing.assert_close(p - q, gradient)
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
    assert (q.movedim(1, -1)[~SETS[target]] == 0).all()


def test_certainty_of_the_wrong_set_stays_finite() -> None:
    # p underflows to 0 on the whole set "plant", where p * M / sum(p * M) is 0 / 0.
    logits = torch.tensor([500.0, -500.0, -501.0]).view(1, 3, 1, 1).requires_grad_()
    target = torch.full((1, 1, 1), CLASSES.coarse_row(1))
    loss = marginal_cross_entropy(logits, target, SETS)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    p, q = posteriors(logits.detach(), target, SETS)
    share = 1 / (1 + math.exp(-1))
    assert loss.item() == pytest.approx(1000 - math.log(1 + math.exp(-1)))
    assert q.flatten().tolist() == pytest.approx([0, share, 1 - share])
    torch.testing.assert_close(gradient, p - q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_single(dtype: torch.dtype) -> None:
    logits, target = case(4)
    half = logits.to(dtype)
    loss = marginal_cross_entropy(half, target, SETS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, marginal_cross_entropy(half.float(), target, SETS))


def test_targets_may_be_bytes() -> None:
    logits, target = case(5)
    expected = marginal_cross_entropy(logits, target, SETS)
    torch.testing.assert_close(marginal_cross_entropy(logits, target.to(torch.uint8), SETS), expected)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", SHIPPED])
@pytest.mark.parametrize("size", [(64, 96), (61, 47)])
def test_embedding_is_autograds_gradient_of_the_last_layers(name: str, size: tuple[int, int]) -> None:
    network = build(name, 3, pretrained=False)
    inputs: list[Tensor] = []
    for layer in network.last_layers():
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].detach()))
    rng = torch.Generator().manual_seed(1)
    target = torch.randint(0, len(SETS), (1, *size), generator=rng)
    logits = network(torch.rand(1, 3, *size, generator=rng))
    parameters = [p for layer in network.last_layers() for p in layer.parameters()]
    gradients = torch.autograd.grad(marginal_cross_entropy(logits, target, SETS).mean(), parameters)
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    p, q = posteriors(logits.detach(), target, SETS)
    found = gradient_embedding((p - q)[0], inputs)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("low", "high"), [((4, 6), (31, 47)), ((1, 1), (3, 5)), ((1, 5), (8, 9)), ((7, 5), (7, 5))])
def test_squared_features_are_those_of_the_enlarged_features(low: tuple[int, int], high: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(depth, *low, generator=rng, dtype=torch.float64) for depth in (3, 8)]
    large = [functional.interpolate(f[None], high, mode="bilinear")[0] for f in features]
    expected = sum((f.square().sum(0) + 1 for f in large), torch.zeros(high, dtype=torch.float64))
    torch.testing.assert_close(squared_features(features, high), expected)


def every_labelling(q: Tensor) -> list[tuple[float, Tensor]]:
    """Each labelling (C, H, W) of an image whose pixels are independent, with its probability."""
    classes, height, width = q.shape
    found = []
    for labels in itertools.product(range(classes), repeat=height * width):
        label = functional.one_hot(torch.tensor(labels), classes).T.reshape(classes, height, width).double()
        found.append((float((q * label).sum(0).prod()), label))
    return found


@pytest.mark.parametrize("conditioned", [True, False])
def test_expected_square_is_that_of_the_mean_plus_the_variance(conditioned: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(depth, 1, 2, generator=rng, dtype=torch.float64) for depth in (2, 4)]
    logits, _ = case(6, (1, 2, 3), 1.0)
    target = torch.tensor([[[3, 4, 4], [5, 0, 4]]]) if conditioned else torch.full((1, 2, 3), ANY)
    p, q = (x[0] for x in posteriors(logits, target, SETS))
    expected = math.fsum(
        chance * float(gradient_embedding(p - label, features).square().sum()) for chance, label in every_labelling(q)
    )
    mean = float(gradient_embedding(p - q, features).square().sum())
    variance = float(label_variance(q, squared_features(features, (2, 3))))
    assert (mean > 0) == conditioned
    assert variance > 0
    assert mean + variance == pytest.approx(expected)


def test_a_known_fine_class_leaves_no_variance() -> None:
    logits, _ = case(7)
    _, q = posteriors(logits, torch.ones(2, 5, 7, dtype=torch.int64), SETS)
    assert float(label_variance(q[0], torch.full((5, 7), 9.0, dtype=torch.float64))) == 0


def test_embedding_does_not_grow_with_the_image() -> None:
    norms = [
        float(gradient_embedding(torch.ones(3, *size), [torch.ones(4, 2, 3)]).norm()) for size in ((8, 12), (32, 48))
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
