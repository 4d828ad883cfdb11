"""Training in seconds: only the head learns, on backbone features that are computed once per image."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.classes import IGNORE, Classes
from model.data import Sample, augment
from model.gradients import marginal_cross_entropy
from model.metrics import confusion
from model.network import Network
from model.scoring import Encoded
from model.training import Recipe, as_input, descent, report, row_weights, shuffled, view_size

#: Views of an image that are encoded: more teach the head little.
VIEWS = 4
#: The loss is taken at every second pixel of a view, in both directions.
STEP = 2


@dataclass(frozen=True)
class EncodedViews:
    """Random views of one image after the backbone.

    Attributes:
        features: by name (V, D, h, w).
        targets: (V, H, W) rows of `Classes.sets()`, every `STEP`-th pixel of the views.
    """

    features: dict[str, Tensor]
    targets: Tensor


def encode_views(
    network: Network, sample: Sample, classes: Classes, view: int, device: str, rng: np.random.Generator
) -> EncodedViews:
    """Augmented views of an image, after the network's backbone.

    Args:
        network: in evaluation mode, on the device.
        sample: image and target.
        classes: what the target's rows mean.
        view: longer side of a view, in pixels.
        device: as torch names it.
        rng: of the views.
    """
    image, target = sample.load()
    size = view_size((image.shape[0], image.shape[1]), view)
    views = [augment(image, target, size, classes.any_row, rng) for _ in range(VIEWS)]
    with torch.no_grad():
        features = network.encode(as_input(np.stack([image for image, _ in views]), torch.device(device)))
    targets = torch.from_numpy(np.stack([rows[::STEP, ::STEP] for _, rows in views])).to(device)
    return EncodedViews(features, targets)


def train_head(
    network: Network,
    labelled: Sequence[EncodedViews],
    weak: Sequence[EncodedViews],
    classes: Classes,
    recipe: Recipe,
) -> Network:
    """A copy of a network whose head was trained; its backbone is the given one's.

    The loss, its weights, the optimiser and the schedule are those of `model.training.train`.

    Args:
        network: where to start, on the device of the views; stays as it is.
        labelled: images whose pixels have one class each (or any).
        weak: images whose pixels have sets of classes.
        classes: what the rows of the targets mean.
        recipe: how; its view was used when the views were encoded.

    Raises:
        ValueError: there is no image at all.
        FloatingPointError: the loss is no longer a number.
    """
    if not labelled and not weak:
        raise ValueError("training needs at least one labelled image")
    trained = copy.deepcopy(network).eval()
    device = next(trained.parameters()).device
    sets = torch.from_numpy(classes.sets()).to(device)
    seen = torch.zeros(len(sets), device=device)
    optimiser, schedule = descent(trained, recipe)
    source = batches(labelled, weak, recipe, np.random.default_rng(recipe.seed))
    for step, (features, target) in zip(range(recipe.steps), source, strict=False):
        seen += torch.bincount(target.flatten(), minlength=len(sets))
        logits = trained.decode(features, (target.shape[1], target.shape[2]))
        weights = row_weights(seen, classes.any_row)[target]
        loss = (marginal_cross_entropy(logits, target, sets) * weights).sum() / weights.sum().clamp(min=1)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        report(step + 1, recipe.steps, loss.item(), None)
    return trained


def batches(
    labelled: Sequence[EncodedViews], weak: Sequence[EncodedViews], recipe: Recipe, rng: np.random.Generator
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Endless batches: features by name (N, D, h, w), targets (N, H, W)."""
    share = recipe.weak_share if labelled and weak else float(bool(weak))
    coarse = round(recipe.batch * share)
    sources = [sample(weak, rng)] * coarse + [sample(labelled, rng)] * (recipe.batch - coarse)
    while True:
        drawn = [next(source) for source in sources]
        names = drawn[0][0].features
        features = {name: torch.stack([views.features[name][v] for views, v in drawn]) for name in names}
        yield features, torch.stack([views.targets[v] for views, v in drawn]).long()


def sample(images: Sequence[EncodedViews], rng: np.random.Generator) -> Iterator[tuple[EncodedViews, int]]:
    """An image after the other in random order, again and again, each time in one of its views."""
    order = shuffled(range(len(images)), rng)  # type: ignore[arg-type]
    for index in order:
        views = images[int(index)]  # type: ignore[call-overload]
        yield views, int(rng.integers(len(views.targets)))


def evaluate_encoded(
    network: Network, images: Sequence[Encoded], masks: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Confusion table (C, C) summed over images.

    Args:
        network: in evaluation mode.
        images: after its backbone.
        masks: (H, W) fine classes, IGNORE where unknown.
    """
    table = np.zeros((network.num_classes, network.num_classes), np.int64)
    for image, mask in zip(images, masks, strict=True):
        with torch.no_grad():
            prediction = network.decode(image.features, image.size).argmax(1)[0].cpu().numpy().astype(np.uint8)
        table += confusion(prediction, np.where(mask < network.num_classes, mask, IGNORE).astype(np.uint8), len(table))
    return table
