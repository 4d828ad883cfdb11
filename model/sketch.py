"""Gradients of many layers in little memory: each layer's gradient folded into a few hundred numbers."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.gradients import marginal_cross_entropy
from model.network import Encoded, Network

#: Numbers that a gradient is folded into; norms and angles come out within a few per cent.
WIDTH = 512
#: Which layers' gradient can be sketched.
LAYERS = ("head", "all")


class Sketch:
    """Sketches the gradient of an image's loss at many layers of one network.

    Every number of the gradient gets a random sign and one of `WIDTH` places; the numbers of a place are added. Layers
    are scaled by the root of their fan-in, else one of them would outweigh the others. Signs are drawn from a fixed
    seed by layer: sketches of one network's versions can be compared, of different networks never.

    Attributes:
        head_only: whether the backbone is left out, so that its output can be reused.
    """

    def __init__(self, network: Network, layers: str, sets: Tensor) -> None:
        """Draw the signs.

        Args:
            network: in evaluation mode; its weights stay, but all of them get gradients.
            layers: one of `LAYERS`.
            sets: (K, C) bool, what each row of a target allows.

        Raises:
            ValueError: layers is something else.
        """
        if layers not in LAYERS:
            raise ValueError(f"gradients are of the last layer, the head or all layers, not of {layers!r}")
        self.head_only = layers == "head"
        pretrained = {id(parameter) for parameter in network.backbone().parameters()} if self.head_only else set()
        self._network, self._sets = network.requires_grad_(), sets
        self._parameters = [p for p in network.parameters() if id(p) not in pretrained]
        draw = torch.Generator().manual_seed(0)
        self._signs = [signs(parameter, draw) for parameter in self._parameters]

    def gradient(self, image: Tensor | Encoded, rows: Tensor) -> NDArray[np.float32]:
        """(WIDTH,) sketch of the gradient of an image's mean loss.

        Args:
            image: (1, 3, H, W) in [0, 1]; for the head what the backbone made of it will do.
            rows: (H, W) the target. Where it allows any class everywhere, the network's own classes are taken instead.
        """
        with torch.enable_grad():
            features = self._network.encode(image) if isinstance(image, Tensor) else image.features
            logits = self._network.decode(features, (rows.shape[0], rows.shape[1]))
            if (rows == len(self._sets) - 1).all():
                rows = logits[0].argmax(0)
            loss = marginal_cross_entropy(logits, rows[None], self._sets).mean()
            found = torch.autograd.grad(loss, self._parameters)
        parts = [folded(gradient, sign) for gradient, sign in zip(found, self._signs, strict=True)]
        sketch: NDArray[np.float32] = torch.stack(parts).sum(0).float().cpu().numpy()
        return sketch


def signs(parameter: Tensor, draw: torch.Generator) -> Tensor:
    """Random signs like a parameter, divided by the root of its fan-in."""
    fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
    drawn = torch.randint(0, 2, parameter.shape, generator=draw, dtype=torch.int8).to(parameter)
    return (2 * drawn - 1) / math.sqrt(fan_in)


def folded(gradient: Tensor, sign: Tensor) -> Tensor:
    """(WIDTH,) sums of the signed numbers, each of a row of `WIDTH` to its own place."""
    flat = (gradient * sign).flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % WIDTH)).view(-1, WIDTH).sum(0)
