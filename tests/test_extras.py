"""What only some strategies ask for, each against the plain way of computing it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.classes import Classes
from model.extras import (
    DROPPED,
    FISHER_FEATURES,
    LABELINGS,
    NUMBERS,
    PASSES,
    TOP,
    VECTORS,
    View,
    dropout_passes,
    extra,
    fisher,
    segment_egl,
)
from model.gradients import squared_features
from model.network import build
from model.scoring import Encoded, Scorer, most_probable
from model.sketch import WIDTH

CLASSES = Classes(("soil", "crop", "weed"), ("soil", "plant"), ((0,), (1, 2)))
SETS = torch.from_numpy(CLASSES.sets())
SIZE = (24, 32)


def make(seed: int = 0, rows: Tensor | None = None, scale: int = 4) -> View:
    """What a network with two last layers leaves behind, at a quarter of the image's size."""
    torch.manual_seed(seed)
    low = (SIZE[0] // scale, SIZE[1] // scale)
    last = [nn.Conv2d(5, 3, 1), nn.Conv2d(4, 3, 1)]
    layers = [torch.randn(5, *low), torch.randn(4, *low)]
    with torch.no_grad():
        small = sum(conv(layer[None]) for conv, layer in zip(last, layers, strict=True))
        logits = F.interpolate(torch.as_tensor(small), size=SIZE, mode="bilinear")
    target = torch.randint(0, len(SETS), SIZE) if rows is None else rows
    p = logits[0].softmax(0)
    foreground = p.argmax(0) > 0
    squared, own = squared_features(layers, SIZE), most_probable(p)[1]
    return View(logits[0].log_softmax(0), p, own, target, SETS, foreground, layers, squared, last)


def believing(view: View, log_p: Tensor) -> View:
    """The same with other probabilities."""
    return view._replace(log_p=log_p, p=log_p.exp(), own=most_probable(log_p.exp())[1])


def ask(name: str, view: View) -> Tensor:
    """An extra's answer."""
    with torch.no_grad():
        return extra(name)(view)


def enlarged(view: View) -> Tensor:
    """(D + 2, H, W) features at the image's size, and a 1 for each bias."""
    layers = [F.interpolate(layer[None], size=SIZE, mode="bilinear")[0] for layer in view.layers]
    return torch.cat([*layers, torch.ones(len(layers), *SIZE)])


@pytest.mark.parametrize("name", [*NUMBERS, *VECTORS])
def test_an_extra_is_finite_and_the_same_each_time(name: str) -> None:
    first, second = ask(name, make()), ask(name, make())
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.dim() == (0 if name in NUMBERS else 2 if name == "fisher" else 1)


@pytest.mark.parametrize("name", [*NUMBERS, *VECTORS])
def test_an_extra_is_finite_where_the_network_is_certain(name: str) -> None:
    view = make()
    certain = (1000 * view.log_p).log_softmax(0)
    assert torch.isfinite(ask(name, believing(view, certain))).all()


def test_an_extra_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no extra 'surprise'; choose from entropy_top"):
        extra("surprise")


def test_entropies_are_those_of_their_pixels() -> None:
    view = make()
    entropy = -(view.p * view.p.log()).sum(0)
    worst = entropy.flatten().sort(descending=True).values[: int(np.ceil(TOP * entropy.numel()))]
    torch.testing.assert_close(ask("entropy_top", view), worst.mean())
    torch.testing.assert_close(ask("entropy_foreground", view), entropy[view.foreground].mean())
    by_class = ask("class_entropy", view)
    torch.testing.assert_close(by_class.sum(), entropy.mean())
    torch.testing.assert_close(by_class[1], entropy[view.p.argmax(0) == 1].sum() / entropy.numel())


def test_without_foreground_its_entropy_is_zero() -> None:
    view = make()
    assert ask("entropy_foreground", view._replace(foreground=torch.zeros(SIZE, dtype=torch.bool))) == 0


def test_egl_of_settles_is_the_sum_over_labels() -> None:
    view, total = make(), torch.zeros(())
    length = enlarged(view).norm(dim=0)
    for label in range(3):
        away = (view.p - F.one_hot(torch.tensor(label), 3)[:, None, None]).norm(dim=0)
        total = total + (view.p[label] * away * length).mean()
    torch.testing.assert_close(ask("egl_settles", view), total)


def test_the_gradient_of_the_entropy_is_autograds() -> None:
    view = make()
    logits = F.interpolate(
        torch.as_tensor(sum(c(layer[None]) for c, layer in zip(view.last, view.layers, strict=True))),
        size=SIZE,
        mode="bilinear",
    )
    p = logits.softmax(1)
    parameters = [x for conv in view.last for x in (conv.weight, conv.bias) if x is not None]
    found = torch.autograd.grad(-(p * p.log()).sum(1).mean(), parameters)
    torch.testing.assert_close(ask("entropy_gradnorm", view), torch.cat([g.flatten() for g in found]).norm())


def test_bald_is_what_storing_every_pass_would_give() -> None:
    view = make()
    with torch.no_grad():
        p = torch.stack([logits.softmax(0) for logits in dropout_passes(view)])
    assert len(p) == PASSES
    mean = p.mean(0)
    expected = (-(mean * mean.log()).sum(0) + (p * p.log()).sum(1).mean(0)).mean()
    torch.testing.assert_close(ask("bald", view), expected)
    still = view._replace(layers=[torch.zeros_like(layer) for layer in view.layers])
    assert ask("bald", still) < 1e-6


def test_dropout_leaves_whole_features_out() -> None:
    view = make()
    ones = [torch.ones_like(layer) for layer in view.layers]
    eye = [nn.Conv2d(len(layer), 64, 1, bias=False) for layer in ones]
    for conv in eye:
        nn.init.constant_(conv.weight, 1.0)
    with torch.no_grad():
        passes = list(dropout_passes(view._replace(layers=ones, last=eye)))
    for logits in passes:
        assert logits.std() < 1e-4  # the same features everywhere in the image
        kept = float(logits.flatten()[0]) * (1 - DROPPED)
        assert kept == pytest.approx(round(kept), abs=1e-4)
    assert len({float(logits.flatten()[0]) for logits in passes}) > 1


def test_egl_of_huang_is_the_mean_over_likely_masks() -> None:
    view, f, lengths = make(), None, []
    f = enlarged(view)
    with torch.no_grad():
        for logits in itertools.islice(dropout_passes(view), LABELINGS):
            mask = F.interpolate(logits[None], size=SIZE, mode="bilinear")[0].argmax(0)
            residual = (view.p - F.one_hot(mask, 3).movedim(-1, 0)) / mask.numel()
            lengths.append(torch.einsum("chw,dhw->cd", residual, f).square().sum())
    torch.testing.assert_close(ask("egl_huang", view), torch.stack(lengths).mean())


def test_segments_have_the_expected_square_that_all_their_labelings_have() -> None:
    rows = torch.full(SIZE, CLASSES.any_row)
    rows[:, :16] = CLASSES.coarse_row(1)  # two segments of one class each, if it is predicted everywhere
    view = make(1, rows, scale=8)
    bias = torch.tensor([0.0, 9.0, 0.0])[:, None, None]
    view = believing(view, (0.3 * view.log_p + 0.1 * bias).log_softmax(0))
    f = torch.cat([*view.layers, torch.ones_like(view.layers[0][:1])]).flatten(1)
    low = F.adaptive_avg_pool2d(view.p, (3, 4)).flatten(1)
    if len(set(low.argmax(0).tolist())) > 1:
        pytest.fail("the scene should have one predicted class")
    left = (torch.arange(12) % 4 < 2).float()
    allowed = [SETS[CLASSES.coarse_row(1)].float(), torch.ones(3)]
    pis = [(low * side).sum(1) * sets for side, sets in zip((left, 1 - left), allowed, strict=True)]
    pis = [pi / pi.sum() for pi in pis]
    expected = 0.0
    for a, b in itertools.product(range(3), range(3)):
        label = torch.where(left > 0, a, b)
        gradient = (low - F.one_hot(label, 3).T) @ f.T / 12
        expected += float(pis[0][a] * pis[1][b] * gradient.square().sum())
    assert float(segment_egl(view)) == pytest.approx(expected, rel=1e-4)


def test_the_fisher_matrix_is_the_expected_outer_product() -> None:
    view = make(scale=8)
    with torch.no_grad():
        found = fisher(view)
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(FISHER_FEATURES, 9, generator=draw) / FISHER_FEATURES**0.5
    x = torch.cat([projection @ torch.cat(list(view.layers)).flatten(1), torch.ones(1, 12)])
    p = F.adaptive_avg_pool2d(view.p, (3, 4)).flatten(1)
    expected = torch.zeros_like(found)
    for n, label in itertools.product(range(12), range(3)):
        gradient = torch.outer(p[:, n] - F.one_hot(torch.tensor(label), 3), x[:, n]).flatten()
        expected += p[label, n] * torch.outer(gradient, gradient) / 12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.linalg.eigvalsh(found).min() > -1e-4


def image() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Something to look at."""
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def test_a_scorer_delivers_what_was_asked_for() -> None:
    network = build("lraspp_efficientnet_lite0", 3)
    target = np.full((64, 96), CLASSES.any_row)
    score = Scorer(network, CLASSES, "cpu", [*NUMBERS, *VECTORS]).score(image(), target)
    assert score.extras.keys() == NUMBERS.keys() | VECTORS.keys()
    np.testing.assert_allclose(score.extras["own"], score.embedding, rtol=1e-5, atol=1e-9)
    assert not Scorer(network, CLASSES, "cpu").score(image(), target).extras
    with pytest.raises(ValueError, match="there is no extra"):
        Scorer(network, CLASSES, "cpu", ["surprise"])


def test_what_the_backbone_made_is_scored_like_the_image() -> None:
    scorer = Scorer(build("lraspp_efficientnet_lite0", 3), CLASSES, "cpu")
    target = np.random.default_rng(1).integers(0, CLASSES.any_row + 1, (64, 96))
    encoded = scorer.encode(image())
    assert isinstance(encoded, Encoded)
    one, other = scorer.score(image(), target), scorer.score(encoded, target)
    assert one.coarse_egl == other.coarse_egl
    np.testing.assert_array_equal(one.embedding, other.embedding)
    np.testing.assert_array_equal(one.features, other.features)
    with pytest.raises(ValueError, match=r"the image is \(64, 96\), its target \(64, 95\)"):
        scorer.score(encoded, target[:, 1:])


@pytest.mark.parametrize("layers", ["head", "all"])
def test_a_sketch_has_the_length_of_its_gradient(layers: str) -> None:
    network = build("lraspp_efficientnet_lite0", 3)
    scorer = Scorer(network, CLASSES, "cpu", layers=layers)
    target = np.random.default_rng(1).integers(0, 3, (64, 96))
    score = scorer.score(image(), target)
    assert score.embedding.shape == (WIDTH,)
    assert score.magnitude == pytest.approx(float(np.linalg.norm(score.embedding)))
    sketch = scorer._sketch
    assert sketch is not None
    logits = scorer.folded(torch.from_numpy(image()).permute(2, 0, 1)[None].float() / 255)
    loss = F.cross_entropy(logits, torch.from_numpy(target)[None])
    found = torch.autograd.grad(loss, sketch._parameters)
    # Scaled as the sketch scales them: by the root of the fan-in.
    fans = [g[0].numel() if g.dim() > 1 else 1 for g in found]
    length = sum(float(g.square().sum()) / fan for g, fan in zip(found, fans, strict=True)) ** 0.5
    assert score.magnitude == pytest.approx(length, rel=0.15)
    np.testing.assert_array_equal(
        Scorer(network, CLASSES, "cpu", layers=layers).score(image(), target).embedding, score.embedding
    )


def test_sketches_tell_images_apart_as_gradients_do() -> None:
    scorer = Scorer(build("lraspp_efficientnet_lite0", 3), CLASSES, "cpu", layers="head")
    soil, crop = (scorer.score(image(), np.full((64, 96), label)).embedding for label in (0, 1))
    again = scorer.score(image()[:, ::-1].copy(), np.zeros((64, 96))).embedding
    assert soil @ again > 0.5 * np.linalg.norm(soil) * np.linalg.norm(again)
    assert soil @ crop < 0


def test_all_layers_need_the_image() -> None:
    scorer = Scorer(build("lraspp_efficientnet_lite0", 3), CLASSES, "cpu", layers="all")
    with pytest.raises(ValueError, match="needs the image"):
        scorer.score(scorer.encode(image()), np.zeros((64, 96), int))


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="not of 'first'"):
        Scorer(build("lraspp_efficientnet_lite0", 3), CLASSES, "cpu", layers="first")
