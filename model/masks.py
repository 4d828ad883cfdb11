"""The mask that a head gives an image, at full resolution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.features import Maps, Scaling
from model.heads import NEVER, Head
from model.sharpen import Guide, guide_of, sharpen

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
    """
    with torch.inference_mode():
        logits = maps.logits(scaling, head.weights, head.bias, STRIDE)[0]
    guide = guide_of(maps.images[0].cpu().numpy(), (logits.shape[1], logits.shape[2]))
    sharpened, labelled = sharpened_logits(logits, head, guide)
    best = sharpened.argmax(0)
    confidence = np.clip(sharpened.max(0), 0, 1)
    return labelled[best], np.round(255 * confidence).astype(np.uint8)


def mask_of(logits: Tensor, head: Head, guide: Guide) -> NDArray[np.uint8]:
    """(H, W) most probable class of every pixel of an image, by its coarse logits (C, h, w)."""
    sharpened, labelled = sharpened_logits(logits, head, guide)
    mask: NDArray[np.uint8] = labelled[sharpened.argmax(0)]
    return mask


def sharpened_logits(logits: Tensor, head: Head, guide: Guide) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Sharpened probabilities (L, H, W) of the classes that have a label, and which these are (L,)."""
    labelled = head.bias > NEVER
    return sharpen(logits[labelled].softmax(0).cpu().numpy(), guide), np.flatnonzero(labelled.numpy()).astype(np.uint8)
