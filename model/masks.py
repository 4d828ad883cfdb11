"""The mask that a head gives an image, at full resolution."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.features import Maps, Scaling
from model.heads import NEVER, Head
from model.sharpen import sharpen

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
    labelled = np.flatnonzero((head.bias > NEVER).numpy())
    sharpened = sharpen(logits[torch.from_numpy(labelled)].softmax(0).cpu().numpy(), maps.images[0].cpu().numpy())
    best = sharpened.argmax(0)
    confidence = np.clip(np.take_along_axis(sharpened, best[None], 0)[0], 0, 1)
    return labelled.astype(np.uint8)[best], np.round(255 * confidence).astype(np.uint8)
