"""The mask that a head gives an image, at full resolution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.features import Dense, Maps, Scaling
from model.heads import NEVER, Head, need_finite
from model.sharpen import Guide, guide_of, sharpen, strongest

#: Pixels of the image per logit before sharpening; finer ones are slower and no better.
STRIDE = 4


def predict(maps: Maps, scaling: Scaling, head: Head) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Class and confidence of every pixel of one image.

    Args:
        maps: of that one image.
        scaling: of the features that the head was fitted to.
        head: C classes, one of which at least has a label.

    Returns:
        (H, W) most probable class, and (H, W) its probability, 255 = certain.

    Raises:
        FloatingPointError: what the network computes of the image is not finite.
    """
    with torch.inference_mode():
        dense = maps.dense(scaling, STRIDE)
    guide = guide_of(maps.images[0].cpu().numpy(), dense.size)
    best, probability = strongest_of(dense, guide, layer_of(head, scaling))
    return best, np.round(255 * np.clip(probability, 0, 1)).astype(np.uint8)


class Layer(NamedTuple):
    """A head as masks need it, without the classes that have no label.

    Attributes:
        parts: its weights, stage by stage.
        bias: (L,).
        classes: (L,) which classes these are.
    """

    parts: list[Tensor]
    bias: Tensor
    classes: NDArray[np.uint8]


def layer_of(head: Head, scaling: Scaling) -> Layer:
    """A head that was fitted to features of this scaling, made ready for masks."""
    labelled = head.bias > NEVER
    classes = np.flatnonzero(labelled.numpy()).astype(np.uint8)
    return Layer(scaling.parts(head.weights[labelled]), head.bias[labelled], classes)


def strongest_of(dense: Dense, guide: Guide, layer: Layer) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(H, W) most probable class of every pixel, and (H, W) its probability, of an image that was made ready.

    Raises:
        FloatingPointError: what the network computes of the image is not finite.
    """
    with torch.inference_mode():
        probabilities = dense.logits(layer.parts, layer.bias)[0].softmax(0).cpu()
        need_finite("an image", probabilities)
    return strongest(sharpen(probabilities.numpy(), guide), layer.classes)
