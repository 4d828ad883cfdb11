"""Train a network on a few labelled images and on many that are only coarsely labelled."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.classes import IGNORE, Classes
from model.data import ImageError, Sample, augment
from model.gradients import marginal_cross_entropy
from model.metrics import confusion
from model.network import Network

Progress = Callable[[int, int, float], None]
Batch = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Item = TypeVar("Item")

WEIGHT_DECAY = 1e-4
#: Steps over which the learning rates rise, so that a fresh head does not shake the backbone.
WARM_UP = 5
#: No class counts more than if it covered this share of the pixels.
RAREST = 1e-3


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimiser steps.
        batch: views in each.
        view: longer side of a view in pixels: the same seconds per step for images of every size.
        head_rate: highest learning rate of the layers that are new.
        backbone_rate: highest learning rate of the pretrained layers.
        weak_share: share of a batch from coarsely labelled images, where there are both kinds.
        seed: of order and views.
    """

    steps: int = 100
    batch: int = 4
    view: int = 320
    head_rate: float = 5e-3
    backbone_rate: float = 3e-4
    weak_share: float = 0.25
    seed: int = 0


def train(
    network: Network,
    labelled: Sequence[Sample],
    weak: Sequence[Sample],
    classes: Classes,
    recipe: Recipe,
    device: str,
    progress: Progress | None = None,
) -> Network:
    """A trained copy of a network: a `Training` from beginning to end.

    Args:
        network: where to start; stays as it is.
        labelled: images whose pixels have one class each (or any).
        weak: images whose pixels have sets of classes.
        classes: what the rows of the targets mean.
        recipe: how.
        device: "cpu" or "cuda".
        progress: called after every step with steps done, all steps and the loss.

    Returns:
        The copy, on the device and in evaluation mode.

    Raises:
        ValueError: there is no image at all.
        ImageError: none of the images can be read; one that cannot be is left out.
        FloatingPointError: the loss, or what was learnt, is no longer a number.
    """
    training = Training(network, labelled, weak, classes, recipe, device)
    for done, loss in enumerate(training, 1):
        if progress:
            progress(done, recipe.steps, loss)
    return training.result()


class Training:
    """A training that goes on step by step, and may rest between any two.

    One loss serves both kinds of image: minus the log of the probability of the classes that a pixel may have. For a
    single class it is the cross-entropy, for "any class" zero. Rare rows count more, by the root of their share.

    Batch normalisation keeps the statistics of the pretrained network: those of four crops of a few images are worse.
    """

    def __init__(
        self,
        network: Network,
        labelled: Sequence[Sample],
        weak: Sequence[Sample],
        classes: Classes,
        recipe: Recipe,
        device: str,
    ) -> None:
        """Begin; see `train` for the arguments.

        Raises:
            ValueError: there is no image at all.
        """
        if not labelled and not weak:
            raise ValueError("training needs at least one labelled image")
        self.recipe = recipe
        self._network = copy.deepcopy(network).to(device)
        self._network.to(memory_format=torch.channels_last)
        training_mode(self._network)
        source = ahead(batches(labelled, weak, classes, recipe, np.random.default_rng(recipe.seed)))
        self._losses = learn(self._network, forwarded(self._network, source), classes, recipe)

    def __iter__(self) -> Iterator[float]:
        """The loss after each step that is left.

        Raises:
            ImageError: none of the images can be read.
            FloatingPointError: the loss is no longer a number.
        """
        return self._losses  # itself: a generator around it would end it where a loop over it is left

    def result(self) -> Network:
        """What was learnt, in evaluation mode.

        Raises:
            FloatingPointError: it is no longer a number.
        """
        check_finite(self._network)
        return self._network.eval()


def check_finite(network: Network) -> None:
    """Refuse a network with weights that are no numbers: everything it says would be none either.

    Raises:
        FloatingPointError: naming the first of them.
    """
    for name, values in network.state_dict().items():
        if not bool(torch.isfinite(values).all()):
            raise FloatingPointError(f"{name} of the network is not finite: lower the learning rates, or start anew")


def forwarded(network: Network, source: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and targets of batches, each computed when it is asked for."""
    device = next(network.parameters()).device
    for images, targets in source:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(as_input(images, device))
        yield logits, torch.from_numpy(targets).to(device).long()


def learn(
    network: Network, source: Iterator[tuple[Tensor, Tensor]], classes: Classes, recipe: Recipe
) -> Iterator[float]:
    """The loop: a batch, its loss, a step down; gives the loss of each step.

    Args:
        network: its parameters are changed.
        source: logits (N, C, H, W) that the network gives as it then is, and targets (N, H, W).
        classes: what the rows of the targets mean.
        recipe: how.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    device = next(network.parameters()).device
    sets = torch.from_numpy(classes.sets()).to(device)
    seen = torch.zeros(len(sets), device=device)
    optimiser, schedule = descent(network, recipe)
    for step in range(recipe.steps):
        with torch.random.fork_rng():
            torch.manual_seed(
                100_003 * recipe.seed + step
            )  # dropout, whatever else this process does between two steps
            logits, target = next(source)
            seen += torch.bincount(target.flatten(), minlength=len(sets))
            weights = row_weights(seen, classes.any_row)[target]
            loss = (marginal_cross_entropy(logits.float(), target, sets) * weights).sum() / weights.sum().clamp(min=1)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} after {step + 1} steps: lower the learning rates")
        yield value


def training_mode(network: Network) -> None:
    """Dropout on, batch normalisation with the statistics it has."""
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def descent(network: Network, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW whose rates rise for a few steps and then fall to zero along a cosine."""
    backbone = list(network.backbone().parameters())
    pretrained = {id(parameter) for parameter in backbone}
    head = [parameter for parameter in network.parameters() if id(parameter) not in pretrained]
    optimiser = torch.optim.AdamW(
        [{"params": head, "lr": recipe.head_rate}, {"params": backbone, "lr": recipe.backbone_rate}],
        weight_decay=WEIGHT_DECAY,
    )

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / recipe.steps)) / 2

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def row_weights(seen: Tensor, any_row: int) -> Tensor:
    """(K,) weight of a pixel by its row: one over the root of the row's share so far; 0 where any class may be."""
    known = seen.clone()
    known[any_row] = 0
    weights = (known / known.sum().clamp(min=1)).clamp(min=RAREST) ** -0.5
    weights[any_row] = 0
    return weights


def as_input(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(N, 3, H, W) float in [0, 1], channels last in memory, of (N, H, W, 3) bytes."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div(255)


def batches(
    labelled: Sequence[Sample], weak: Sequence[Sample], classes: Classes, recipe: Recipe, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless batches of views: images (N, H, W, 3), targets (N, H, W)."""
    coarse = weak_views(labelled, weak, recipe)
    sources = [shuffled(weak, rng)] * coarse + [shuffled(labelled, rng)] * (recipe.batch - coarse)
    size: tuple[int, int] | None = None
    while True:
        views = []
        for source in sources:
            image, target = next_usable(source, 2 * (len(labelled) + len(weak)))
            size = size or view_size((image.shape[0], image.shape[1]), recipe.view)
            views.append(augment(image, target, size, classes.any_row, rng))
        yield np.stack([image for image, _ in views]), np.stack([target for _, target in views])


def next_usable(source: Iterator[Sample], most: int) -> Batch:
    """Image and target of the next sample that can be read.

    Raises:
        ImageError: of the last of `most` samples, none of which can be.
    """
    fault = ImageError("there is no image")
    for sample in islice(source, most):
        try:
            return sample.load()
        except ImageError as error:
            fault = error
    raise fault


def weak_views(labelled: Sequence[object], weak: Sequence[object], recipe: Recipe) -> int:
    """How many views of a batch are of coarsely labelled images."""
    return round(recipe.batch * (recipe.weak_share if labelled and weak else float(bool(weak))))


def ahead(source: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made while the network works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source)
        while True:
            batch = coming.result()
            coming = thread.submit(next, source)
            yield batch


def shuffled(samples: Sequence[Item], rng: np.random.Generator) -> Iterator[Item]:
    """Each sample once in random order, again and again."""
    while samples:
        for index in rng.permutation(len(samples)):
            yield samples[index]


def view_size(shape: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width like those of an image, the longer at most `longest`, in whole steps of the network's stride."""
    factor = min(1.0, longest / max(shape))
    return max(32, round(shape[0] * factor / 32) * 32), max(32, round(shape[1] * factor / 32) * 32)


def evaluate(network: Network, samples: Iterable[Sample], classes: Classes, device: str) -> NDArray[np.int64]:
    """Confusion table (C, C) summed over images; pixels without a single class do not count."""
    count = len(classes.fine)
    table = np.zeros((count, count), np.int64)
    network = network.to(device).eval()
    for sample in samples:
        image, target = sample.load()
        mask = np.where(target < count, target, IGNORE).astype(np.uint8)
        table += confusion(predict(network, image, device), mask, count)
    return table


def predict(network: Network, image: NDArray[np.uint8], device: str) -> NDArray[np.uint8]:
    """(H, W) most probable class of each pixel of an image (H, W, 3), by a network in evaluation mode."""
    with torch.no_grad():
        return mask_of(network(as_input(image[None], torch.device(device))))


def predict_surely(
    network: Network, image: NDArray[np.uint8], device: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(H, W) most probable class of each pixel of an image (H, W, 3), and (H, W) its probability, 255 = certain."""
    with torch.inference_mode():
        best, classes = network(as_input(image[None], torch.device(device))).float().softmax(1)[0].max(0)
        sure = (255 * best).round()
    return classes.to(torch.uint8).cpu().numpy(), sure.to(torch.uint8).cpu().numpy()


def mask_of(logits: Tensor) -> NDArray[np.uint8]:
    """(H, W) most probable class of each pixel, of logits (1, C, H, W)."""
    found: NDArray[np.uint8] = logits.argmax(1)[0].cpu().numpy().astype(np.uint8)
    return found
