"""Gradients of a network that is trained beside the forward and backward passes that anybody would write."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from backend.perf import ROUNDS, Item, compare, processor
from model.classes import Classes
from model.field import render
from model.gradients import marginal_cross_entropy
from model.network import Network, build
from model.scoring import Scorer, as_input

#: The network that is measured, and the rounds.
NETWORK, MANY = "lraspp_mobilenet_v3_large", 25
CLASSES = Classes(("soil", "crop", "weed"), ("soil", "plant"), ((0,), (1, 2)))
SIZE = (640, 480)
CPU = torch.device("cpu")


def items() -> Iterator[Item]:
    """Every figure about the gradients of a network."""
    network, (image, target) = calibrated(NETWORK), sample()
    scorer = Scorer(network, CLASSES, "cpu")
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: scorer.score(image, target),
        "forward": lambda: forward(scorer.folded, image),
        "naive": lambda: last_layer_gradient(network, image, target),
    }
    times = compare(calls, MANY, processor())
    yield times.item(f"score/forward {NETWORK}", 1.06, "score", "forward", "folded channels-last forward, one image")
    yield times.item(f"score/naive {NETWORK}", 0.52, "score", "naive", "autograd at the last layer, one image")
    yield from sketch_items(NETWORK)


def sketch_items(name: str) -> Iterator[Item]:
    """Gradients of all layers beside a forward and backward pass of the same folded network."""
    scorer, (image, target) = Scorer(calibrated(name), CLASSES, "cpu", layers="all"), sample()
    calls: dict[str, Callable[[], object]] = {
        "sketch": lambda: scorer.sketch(image, target),
        "backward": lambda: all_layers_gradient(scorer.folded, image, target),
    }
    times = compare(calls, ROUNDS, processor())
    yield times.item(f"sketch/backward {name}", 1.15, "sketch", "backward", "forward and backward pass, one image")


def calibrated(name: str) -> Network:
    """A network with random weights whose batch statistics are those of images, so that nothing over- or underflows."""
    network = build(name, len(CLASSES.fine), pretrained=False).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = np.stack([render(seed, "source", (320, 240))[0] for seed in range(4)])
    with torch.no_grad():
        network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    return network.eval()


def sample() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its pseudo ground truth: coarse classes, and in one corner any."""
    image, mask = render(0, "source", SIZE)
    target = np.where(mask == 0, CLASSES.coarse_row(0), CLASSES.coarse_row(1)).astype(np.uint8)
    target[: SIZE[1] // 4, : SIZE[0] // 4] = CLASSES.any_row
    return image, target


def forward(network: nn.Module, image: NDArray[np.uint8]) -> object:
    """Logits at the size of the image."""
    with torch.inference_mode():
        return network(as_input(image, CPU))


def last_layer_gradient(network: Network, image: NDArray[np.uint8], target: NDArray[np.uint8]) -> object:
    """The usual way: forward, loss, autograd for the last layer's parameters."""
    network.requires_grad_(False)
    wanted = [p for layer in network.last_layers() for p in layer.requires_grad_().parameters()]
    return torch.autograd.grad(loss(network, image, target), wanted)


def all_layers_gradient(network: Network, image: NDArray[np.uint8], target: NDArray[np.uint8]) -> object:
    """Forward, loss, autograd for all parameters."""
    return torch.autograd.grad(loss(network, image, target), list(network.parameters()))


def loss(network: Network, image: NDArray[np.uint8], target: NDArray[np.uint8]) -> torch.Tensor:
    """Mean loss of an image."""
    rows, sets = torch.from_numpy(target.astype(np.int64))[None], torch.from_numpy(CLASSES.sets())
    return marginal_cross_entropy(network(as_input(image, CPU)), rows, sets).mean()
