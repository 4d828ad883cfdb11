"""Scoring and gradients beside the forward and backward passes that anybody would write."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from backend.perf import ROUNDS, Item, compare, processor, ratio
from model.classes import Classes
from model.field import render
from model.gradients import marginal_cross_entropy
from model.network import Network, build
from model.scoring import Scorer, as_input

#: Networks, and how many rounds each gets.
NETWORKS = {"lraspp_mobilenet_v3_large": 25, "deeplabv3_mobilenet_v3_large": 15, "deeplabv3_resnet50": 7}
CLASSES = Classes(("soil", "crop", "weed"), ("soil", "plant"), ((0,), (1, 2)))
SIZE = (640, 480)
PASSES, BATCH = 20, 8
CPU = torch.device("cpu")


def items() -> Iterator[Item]:
    """Every figure about scoring."""
    for name, rounds in NETWORKS.items():
        yield from network_items(name, rounds)
    yield from sketch_items("lraspp_mobilenet_v3_large")
    yield memory_item("lraspp_mobilenet_v3_large")


def network_items(name: str, rounds: int) -> Iterator[Item]:
    """Scoring one image beside forward passes of the same network, and last-layer autograd."""
    network, (image, target) = calibrated(name), sample()
    scorer = Scorer(network, CLASSES, "cpu")
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: scorer.score(image, target),
        "forward": lambda: forward(scorer.folded, image),
        "eager": lambda: forward(network, image),
        "naive": lambda: last_layer_gradient(network, image, target),
    }
    times = compare(calls, rounds, processor())
    small = "mobilenet" in name
    yield times.item(f"score/forward {name}", 1.06, "score", "forward", "folded channels-last forward, one image")
    yield times.item(f"score/eager {name}", 0.70 if small else 0.88, "score", "eager", "eager forward, one image")
    if small:
        yield times.item(f"score/naive {name}", 0.52, "score", "naive", "autograd at the last layer, one image")
        passes = {"score": calls["score"], "dropout": lambda: dropout_passes(network, image)}
        few = compare(passes, 3, processor())
        yield few.item(f"score/dropout {name}", 1 / 15, "score", "dropout", f"{PASSES} passes with dropout")


def sketch_items(name: str) -> Iterator[Item]:
    """Gradients of all layers beside a forward and backward pass of the same folded network."""
    scorer, (image, target) = Scorer(calibrated(name), CLASSES, "cpu", layers="all"), sample()
    calls: dict[str, Callable[[], object]] = {
        "sketch": lambda: scorer.sketch(image, target),
        "backward": lambda: all_layers_gradient(scorer.folded, image, target),
    }
    times = compare(calls, ROUNDS, processor())
    yield times.item(f"sketch/backward {name}", 1.15, "sketch", "backward", "forward and backward pass, one image")


def memory_item(name: str) -> Item:
    """Peak memory of scoring beside that of an eager forward of a batch, each in a process of its own."""
    found = {way: [peak(name, way) for _ in range(3)] for way in ("score", "eager")}
    ratios = [ours / base for ours, base in zip(found["score"], found["eager"], strict=True)]
    said = f"eager forward of {BATCH} images, {np.median(found['eager']) / 1e6:.0f} MB above rest"
    return ratio(f"memory/eager {name}", 0.3, ratios, said, processor())


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


def dropout_passes(network: Network, image: NDArray[np.uint8]) -> object:
    """Monte Carlo dropout: what BALD and its kin need."""
    for module in network.modules():
        module.train(isinstance(module, nn.Dropout))
    found = [forward(network, image) for _ in range(PASSES)]
    network.eval()
    return found


def peak(name: str, way: str) -> float:
    """Bytes that a process needs at most, above what it held before."""
    done = subprocess.run(
        [sys.executable, "-m", "backend.perf_scoring", name, way], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def resident(field: str) -> int:
    """Bytes by the system's own account: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """The process whose memory is measured."""
    name, way = sys.argv[1:]
    network, (image, target) = calibrated(name), sample()
    small = np.ascontiguousarray(image[:48, :64]), np.ascontiguousarray(target[:48, :64])
    scorer = Scorer(network, CLASSES, "cpu")
    batch = np.stack([image] * BATCH)
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: scorer.score(image, target),
        "eager": lambda: eager_batch(network, batch),
    }
    scorer.score(*small)
    eager_batch(network, small[0][None])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what is measured takes memory that is kept from before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    calls[way]()
    sys.stdout.write(str(resident("VmHWM") - before))


def eager_batch(network: Network, images: NDArray[np.uint8]) -> object:
    """Logits of a batch (B, H, W, 3)."""
    with torch.inference_mode():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


if __name__ == "__main__":
    main()
