"""What `firstrow perf` prints, and that the fast ways give what the plain ones give."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend import cli, perf
from backend.perf import Item, compare, missing, read, table
from backend.publish import CHANGES, HEAD, SMALL, full_score, head_score, moved
from backend.score import ahead
from model import spread
from model.classes import Classes
from model.gradients import marginal_cross_entropy
from model.network import build
from model.scoring import NUMBERS, ImageScore, Scorer, as_input
from model.spread import farthest_first, projected, unit

CLASSES = Classes(("soil", "crop", "weed", "stone"), ("ground", "plant"), ((0, 3), (1, 2)))
SIZES = ((48, 64), (75, 101), (97, 33))
CPU = torch.device("cpu")


def picture(size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def rows(size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, CLASSES.any_row + 1, size, np.uint8)


def both_ways(scorer: Scorer, image: NDArray[np.uint8], target: NDArray[np.uint8]) -> tuple[ImageScore, ImageScore]:
    """Scores by the compiled walk and by torch."""
    by_walk = scorer.score(image, target)
    scorer._walks = False
    by_torch = scorer.score(image, target)
    scorer._walks = True
    return by_walk, by_torch


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
@pytest.mark.parametrize("size", SIZES)
def test_the_walk_finds_what_torch_finds(name: str, size: tuple[int, int]) -> None:
    network = build(name, 4, pretrained=False)
    with torch.no_grad():  # far from ties, which rounding decides
        for layer in network.last_layers():
            layer.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 0.5]))
    scorer = Scorer(network, CLASSES, "cpu")
    for target in (rows(size), np.full(size, CLASSES.any_row, np.uint8), np.full(size, 1, np.uint8)):
        ours, theirs = both_ways(scorer, picture(size), target)
        for number in NUMBERS:
            assert getattr(ours, number) == pytest.approx(getattr(theirs, number), rel=2e-4, abs=1e-6), number
        np.testing.assert_allclose(ours.embedding, theirs.embedding, rtol=0, atol=1e-5 * np.abs(theirs.embedding).max())
        np.testing.assert_allclose(ours.features, theirs.features, rtol=1e-4, atol=1e-5)
        assert (ours.prediction == theirs.prediction).mean() > 0.999
        assert np.abs(ours.confidence.astype(int) - theirs.confidence).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_the_walk_is_exact_and_finite_at_any_span_of_logits(scale: float) -> None:
    network = build("lraspp_mobilenet_v3_large", 4, pretrained=False)
    with torch.no_grad():
        for layer in network.last_layers():
            layer.weight *= scale
            layer.bias.copy_(torch.linspace(-scale / 2, scale / 2, 4))
    scorer, image, target = Scorer(network, CLASSES, "cpu"), picture((48, 64)), rows((48, 64))
    found = scorer.score(image, target)
    scorer.folded.requires_grad_()
    logits = scorer.folded(as_input(image, CPU))
    loss = marginal_cross_entropy(logits, torch.from_numpy(target.astype(np.int64))[None], scorer._sets).mean()
    wanted = [p for layer in scorer.folded.last_layers() for p in layer.parameters()]
    true = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, wanted)]).numpy()
    assert np.linalg.norm(found.embedding - true) <= 1e-5 * np.linalg.norm(true)
    assert found.pseudo_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert np.isfinite([getattr(found, number) for number in NUMBERS]).all()


def test_a_network_that_diverged_is_told_by_the_walk_too() -> None:
    network = build("lraspp_mobilenet_v3_large", 4, pretrained=False)
    with torch.no_grad():
        network.last_layers()[0].bias[1] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        Scorer(network, CLASSES, "cpu").score(picture((48, 64)), rows((48, 64)))


def test_looking_ahead_gives_the_greedy_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 24))
    vectors = unit(centres[rng.integers(0, 40, 6000)] + 0.5 * rng.normal(size=(6000, 24)))
    weight = rng.random(6000) + 0.5
    ahead = farthest_first(vectors, vectors[:3], weight, np.random.default_rng(1))
    monkeypatch.setattr(spread, "LARGE", 10**9)
    plain = farthest_first(vectors, vectors[:3], weight, np.random.default_rng(1))
    assert ahead.order[: spread.GREEDY].tolist() == plain.order[: spread.GREEDY].tolist()
    np.testing.assert_allclose(ahead.utility, plain.utility, atol=1e-5)


def test_projected_features_keep_their_distances() -> None:
    points = np.random.default_rng(0).normal(size=(50, 2000))
    small = projected(points)
    ratio = np.linalg.norm(small[1:] - small[:-1], axis=1) / np.linalg.norm(points[1:] - points[:-1], axis=1)
    assert small.shape == (50, spread.NARROW)
    assert 0.7 < ratio.min() <= ratio.max() < 1.3
    np.testing.assert_array_equal(projected(points[:, :10]), points[:, :10])


@pytest.mark.parametrize(
    ("head", "order", "first"),
    [
        ([1, 2, 3], [1, 2, 3, 4], []),
        ([3, 1, 2], [1, 2, 3, 4], [3]),
        ([4, 1, 3], [1, 2, 3, 4], [4, 1, 3]),
        ([2, 1, 3], [1, 2, 3, 4], [2]),
        ([5], [1, 2, 5], [5]),
        ([], [1, 2], []),
    ],
)
def test_as_few_tasks_as_possible_are_moved(head: list[int], order: list[int], first: list[int]) -> None:
    assert moved(head, order) == first
    rest = [task for task in order if task not in first]
    assert [*first, *rest][: len(head)] == head


def test_each_head_comes_before_all_earlier_ones() -> None:
    scores = [head_score(change, place) for change in range(CHANGES, 0, -1) for place in range(HEAD)]
    whole = [full_score(place, SMALL + 1) for place in range(SMALL + 1)]
    assert scores + whole == sorted({*scores, *whole})
    assert scores[0] >= 0
    assert whole[-1] <= 1
    assert [full_score(place, 4) for place in range(4)] == [0, 0.25, 0.5, 0.75]


def test_rounds_are_interleaved_and_come_out_as_ratios() -> None:
    calls: list[str] = []
    times = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4, "here")
    assert "".join(calls) == "ab" + "abbaabba"
    item = times.item("a/b", 0.5, "a", "b", "another way")
    assert item.low <= item.ratio <= item.high
    assert item.base.startswith("another way, ")


def test_what_cannot_be_measured_says_why_and_misses() -> None:
    item = missing("publish/import", 1.3, "no Label Studio", "here")
    assert not item.met
    assert math.isnan(item.ratio)
    assert table([item]).row_count == 1


def test_a_line_of_json_for_each_item(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["perf", "--json", "--only", "images"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["name"] for line in lines] == [
        "decode/full 12 MP",
        "clusters/straight codebook",
        "clusters/straight fit",
        "rle-encode/sdk",
        "rle-decode/sdk",
    ]
    for line in lines:
        item: Item = read(line)
        assert 0 < item.ratio < 100
        assert {"name", "ratio", "target", "base", "device"} <= json.loads(line).keys()


def test_unknown_groups_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["perf", "--only", "weather"])
    assert ", ".join(perf.GROUPS) in capsys.readouterr().err


def test_images_are_read_ahead_in_order_and_a_fault_comes_when_it_is_its_turn() -> None:
    def source() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    found = ahead(source())
    assert list(itertools.islice(found, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(found)
    assert list(ahead(iter([]))) == []
