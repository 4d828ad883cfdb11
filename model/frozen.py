"""Training in seconds: only the head learns, on backbone features that are computed once per image."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.classes import IGNORE, Classes
from model.data import Sample, augment
from model.metrics import confusion
from model.network import Encoded, Network
from model.training import Recipe, as_input, learn, mask_of, shuffled, view_size, weak_views

Batch = tuple[dict[str, Tensor], Tensor]

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
    rng = np.random.default_rng(recipe.seed)
    for _ in learn(trained, decoded(trained, batches(labelled, weak, recipe, rng)), classes, recipe):
        pass
    return trained


def decoded(network: Network, source: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of batches, each computed when it is asked for."""
    for features, target in source:
        yield network.decode(features, (target.shape[1], target.shape[2])), target


def batches(
    labelled: Sequence[EncodedViews], weak: Sequence[EncodedViews], recipe: Recipe, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless batches: features by name (N, D, h, w), targets (N, H, W)."""
    coarse = weak_views(labelled, weak, recipe)
    sources = [sample(weak, rng)] * coarse + [sample(labelled, rng)] * (recipe.batch - coarse)
    while True:
        drawn = [next(source) for source in sources]
        names = drawn[0][0].features
        features = {name: torch.stack([views.features[name][v] for views, v in drawn]) for name in names}
        yield features, torch.stack([views.targets[v] for views, v in drawn]).long()


def sample(images: Sequence[EncodedViews], rng: np.random.Generator) -> Iterator[tuple[EncodedViews, int]]:
    """An image after the other in random order, again and again, each time in one of its views."""
    for views in shuffled(images, rng):
        yield views, int(rng.integers(len(views.targets)))


def predict_encoded(network: Network, image: Encoded) -> NDArray[np.uint8]:
    """(H, W) most probable class of each pixel of an image after the backbone, by a network in evaluation mode."""
    with torch.no_grad():
        return mask_of(network.decode(image.features, image.size))


def evaluate_encoded(
    network: Network, images: Sequence[Encoded], masks: Sequence[NDArray[np.uint8]]
) -> NDArray[np.int64]:
    """Confusion table (C, C) summed over images.

    Args:
        network: in evaluation mode.
        images: after its backbone.
        masks: (H, W) fine classes, IGNORE where unknown.
    """
    count = network.num_classes
    table = np.zeros((count, count), np.int64)
    for image, mask in zip(images, masks, strict=True):
        known = np.where(mask < count, mask, IGNORE).astype(np.uint8)
        table += confusion(predict_encoded(network, image), known, count)
    return table
