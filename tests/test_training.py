"""Training learns from few labels of either kind, the same way every time."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from model import field, network, training
from model.classes import IGNORE, Classes
from model.data import Folder, ImageError, Pair, Sample
from model.metrics import iou
from model.network import SHIPPED, Network
from model.training import Recipe, batches, check_finite, evaluate, row_weights, train, view_size

CLASSES = Classes(("soil", "crop", "weed"), ("background", "vegetation"), ((0,), (1, 2)))
SHORT = Recipe(steps=3, batch=2, view=64)


def cut_out(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A rendered image and its mask, smaller but with plants of full size."""
    image, mask = field.render(seed, "source")
    return image[100:228, 100:292], mask[100:228, 100:292]


def samples(count: int, first: int = 0, coarse: bool = False) -> list[Pair]:
    """Cut-outs of rendered images; with `coarse`, targets say only background or vegetation."""
    rows = np.array([CLASSES.coarse_row(0), CLASSES.coarse_row(1), CLASSES.coarse_row(1)], np.uint8)
    found = [cut_out(first + number) for number in range(count)]
    return [Pair(image, rows[mask] if coarse else mask) for image, mask in found]


@pytest.fixture(scope="module")
def start() -> Network:
    """The network that needs no download."""
    return network.build(SHIPPED, 3)


def test_five_images_teach_soil_and_crop(start: Network) -> None:
    losses: list[float] = []
    recipe = Recipe(steps=30, batch=4, view=192)
    trained = train(start, samples(5), [], CLASSES, recipe, "cpu", lambda _done, _all, loss: losses.append(loss))
    found = iou(evaluate(trained, samples(6, first=100), CLASSES, "cpu"))
    assert found[0] > 0.9
    assert found[1] > 0.55
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert iou(evaluate(start, samples(6, first=100), CLASSES, "cpu"))[1] < 0.3


def test_coarse_labels_alone_teach_soil_from_plants(start: Network) -> None:
    recipe = Recipe(steps=30, batch=4, view=192)
    trained = train(start, [], samples(5, coarse=True), CLASSES, recipe, "cpu")
    table = evaluate(trained, samples(6, first=100), CLASSES, "cpu")
    plants = np.array([[table[0, 0], table[0, 1:].sum()], [table[1:, 0].sum(), table[1:, 1:].sum()]])
    assert iou(plants).min() > 0.55


def test_the_given_network_and_the_global_generator_stay_as_they_were(start: Network) -> None:
    before = {key: value.clone() for key, value in start.state_dict().items()}
    state = torch.get_rng_state()
    trained = train(start, samples(2), [], CLASSES, SHORT, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in start.state_dict().items())
    assert not trained.training
    changed = [key for key, value in trained.state_dict().items() if not torch.equal(before[key], value)]
    assert any("backbone" in key for key in changed)
    assert any("low_classifier" in key for key in changed)
    assert not any("running" in key for key in changed)


@pytest.mark.parametrize("name", [SHIPPED, "deeplabv3_mobilenet_v3_large"])
def test_same_seed_same_network(name: str) -> None:
    made = network.build(name, 3, pretrained=False)
    first, same = (train(made, samples(2), samples(2, 50, True), CLASSES, SHORT, "cpu") for _ in range(2))
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, same.state_dict()[key])
    other = train(made, samples(2), [], CLASSES, Recipe(steps=3, batch=2, view=64, seed=1), "cpu")
    key = next(key for key, _ in first.named_parameters())
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_one_image_in_a_batch_is_enough() -> None:
    made = network.build("deeplabv3_mobilenet_v3_large", 3, pretrained=False)
    train(made, samples(1), [], CLASSES, Recipe(steps=1, batch=1, view=64), "cpu")


def test_pixels_of_any_class_teach_nothing(start: Network) -> None:
    image, mask = cut_out(0)
    unknown = Pair(image, np.full_like(mask, CLASSES.any_row))
    losses: list[float] = []
    train(start, [unknown], [], CLASSES, SHORT, "cpu", lambda _done, _all, loss: losses.append(loss))
    assert losses == [0.0] * 3


def test_progress_counts_to_the_end(start: Network) -> None:
    seen: list[tuple[int, int]] = []
    train(start, samples(1), [], CLASSES, SHORT, "cpu", lambda done, steps, _loss: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_no_image_and_no_number_are_errors(start: Network) -> None:
    with pytest.raises(ValueError, match="at least one labelled image"):
        train(start, [], [], CLASSES, SHORT, "cpu")
    broken = network.build(SHIPPED, 3)
    nn.init.constant_(broken.last_layers()[0].weight, float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan after 1 steps"):
        train(broken, samples(1), [], CLASSES, SHORT, "cpu")


def flat(value: int, size: tuple[int, int] = (60, 80)) -> Pair:
    """An image of one grey, whose target is the same number."""
    return Pair(np.full((*size, 3), 10 * value, np.uint8), np.full(size, value, np.uint8))


def kinds(targets: NDArray[np.uint8]) -> list[int]:
    """The one row in each view (besides "any")."""
    return [int(target[target != CLASSES.any_row][0]) for target in targets]


def test_batches_hold_both_kinds_and_every_image_in_turn() -> None:
    rng = np.random.default_rng(0)
    labelled, weak = [flat(0), flat(1), flat(2)], [flat(3), flat(4)]
    source = batches(labelled, weak, CLASSES, Recipe(view=64), rng)
    rows = []
    for _ in range(4):
        images, targets = next(source)
        assert images.shape == (4, 32, 64, 3) or images.shape == (4, 64, 64, 3)
        assert targets.shape == images.shape[:3]
        rows.append(kinds(targets))
    assert all(sum(row > 2 for row in batch) == 1 for batch in rows)
    strong = [row for batch in rows for row in batch if row <= 2]
    assert [sorted(strong[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4
    for strong_only, weak_only in [([flat(1)], []), ([], [flat(1)])]:
        _, targets = next(batches(strong_only, weak_only, CLASSES, Recipe(view=64), rng))
        assert kinds(targets) == [1] * 4


def test_images_of_different_shapes_make_one_batch(start: Network) -> None:
    mixed = [flat(0), flat(1, (90, 50)), flat(2, (40, 40))]
    train(start, mixed, [], CLASSES, SHORT, "cpu")


def test_rare_rows_count_more() -> None:
    weights = row_weights(torch.tensor([900.0, 0, 100, 0, 0, 5000]), any_row=5)
    assert float(weights[5]) == 0
    assert float(weights[2] / weights[0]) == pytest.approx(3)
    assert float(weights[1]) == pytest.approx(training.RAREST**-0.5)
    assert row_weights(torch.zeros(6), 5).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "longest", "wanted"),
    [
        ((480, 640), 320, (256, 320)),
        ((640, 480), 320, (320, 256)),
        ((120, 160), 320, (128, 160)),
        ((9, 9), 320, (32, 32)),
    ],
)
def test_views_are_shaped_like_images(shape: tuple[int, int], longest: int, wanted: tuple[int, int]) -> None:
    assert view_size(shape, longest) == wanted


def test_evaluation_counts_pixels_of_one_known_class(start: Network) -> None:
    image, mask = cut_out(0)
    part = mask.copy()
    part[:64] = CLASSES.any_row
    assert evaluate(start, [Pair(image, part)], CLASSES, "cpu").sum() == part.size // 2
    assert (part[:64] != IGNORE).all()


def test_training_on_a_folder(start: Network, tmp_path: Path) -> None:
    field.write_folder(tmp_path, 2, 1, "target", seed=1)
    folder = Folder(tmp_path)
    pairs = [Pair(folder.image(name, 96), folder.mask(name, 96)) for name in folder.names("train")]
    assert evaluate(train(start, pairs, [], folder.classes, SHORT, "cpu"), pairs, folder.classes, "cpu").shape == (3, 3)


class Broken:
    """An image that cannot be read."""

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        raise ImageError("it is gone")


def test_images_that_cannot_be_read_are_left_out(start: Network) -> None:
    mixed: list[Sample] = [Broken(), flat(1), Broken(), Broken(), flat(0)]
    source = batches(mixed, [], CLASSES, Recipe(view=64), np.random.default_rng(0))
    assert {row for _ in range(5) for row in kinds(next(source)[1])} == {0, 1}
    with pytest.raises(ImageError, match="it is gone"):
        train(start, [Broken(), Broken()], [], CLASSES, SHORT, "cpu")


def test_a_training_that_diverges_gives_no_network(start: Network) -> None:
    pairs = [flat(0), flat(1)]
    with pytest.raises(FloatingPointError, match="the loss is nan after 2 steps"):
        train(start, pairs, [], CLASSES, replace(SHORT, head_rate=1e30), "cpu")
    check_finite(start)
    poisoned = copy.deepcopy(start)
    with torch.no_grad():
        next(poisoned.parameters()).fill_(float("nan"))
    check_finite(start)
    with pytest.raises(FloatingPointError, match=r"of the network is not finite: lower the learning rates"):
        check_finite(poisoned)
    with pytest.raises(FloatingPointError, match=r"of the network is not finite: lower the learning rates"):
        check_finite(poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan after 1 steps"):
        train(poisoned, pairs, [], CLASSES, SHORT, "cpu")
