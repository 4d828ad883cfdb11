"""A network's opinion of one image: everything that a query strategy can use, in one forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.classes import Classes
from model.gradients import gradient_embedding, label_variance, log_posteriors, posteriors, squared_features
from model.network import Network


@dataclass(frozen=True)
class ImageScore:
    """What a strategy can use about one image; means are over its pixels, entropies and losses in nats.

    Attributes:
        magnitude: |G|, norm of the last-layer gradient of the mean loss against the pseudo ground truth; 0 without one.
        variance: what the fine classes inside the coarse ones add to the expected |G|^2 (pixels independent).
        coarse_egl: magnitude^2 + variance, the expected |G|^2 given the pseudo ground truth.
        egl: the expected |G|^2 given nothing; coarse_egl is the same for an image without coarse label.
        entropy: mean entropy; the sum of the following two.
        coarse_entropy: mean entropy of the coarse class.
        fine_entropy: mean entropy of the fine class once the coarse class is known.
        least_confidence: mean of 1 - the highest probability.
        margin: mean of the highest minus the second probability; low = uncertain.
        pseudo_loss: mean loss against the pseudo ground truth.
        foreground: share of pixels outside the first coarse class, by the target; where that allows any, by prediction.
        embedding: (E,) the gradient whose norm is `magnitude`. An image whose target allows any class everywhere has
            none: there it is the gradient against the network's own arg-max classes, as in BADGE.
        features: (2 F,) the backbone's output, its mean over the image, then over the foreground (over the image again
            if there is none).
        prediction: (H, W) most probable fine class.
        confidence: (H, W) its probability, 255 = certain.
    """

    magnitude: float
    variance: float
    coarse_egl: float
    egl: float
    entropy: float
    coarse_entropy: float
    fine_entropy: float
    least_confidence: float
    margin: float
    pseudo_loss: float
    foreground: float
    embedding: NDArray[np.float32]
    features: NDArray[np.float32]
    prediction: NDArray[np.uint8]
    confidence: NDArray[np.uint8]


class Seen(NamedTuple):
    """What a forward pass leaves behind: logits (C, H, W), inputs (D, h, w) of the last layers, backbone output."""

    logits: Tensor
    layers: list[Tensor]
    backbone: Tensor


class Scorer:
    """Scores images by one network on one device, with a faster copy of it; the network itself is left alone.

    Attributes:
        network: as given.
        classes: fine and coarse classes.
    """

    def __init__(self, network: Network, classes: Classes, device: str) -> None:
        """Make the copy.

        Args:
            network: gives one logit per fine class; in whatever mode, it is scored in evaluation mode.
            classes: fine and coarse classes.
            device: as torch names it; on CUDA the forward pass runs in half precision.

        Raises:
            ValueError: the network has another number of classes.
        """
        if network.num_classes != len(classes.fine):
            raise ValueError(f"the network knows {network.num_classes} classes, not {', '.join(classes.fine)}")
        self.network, self.classes, self._device = network, classes, torch.device(device)
        self._sets = torch.from_numpy(classes.sets()).to(self._device)
        self._coarse_of = torch.from_numpy(classes.coarse_of()).to(self._device)
        # Coarse class that a row of the target names; -1 for "any class".
        named = [*classes.coarse_of(), *range(len(classes.coarse)), -1]
        self._named = torch.tensor(named, device=self._device)
        folded = fold_batch_norms(copy.deepcopy(network).eval())
        self._copy = folded.to(self._device).to(memory_format=torch.channels_last)
        self._layers: list[Tensor] = []
        self._backbone: list[Tensor] = []
        for layer in self._copy.last_layers():
            layer.register_forward_pre_hook(lambda _, inputs: self._layers.append(inputs[0]))
        self._copy.backbone().register_forward_hook(
            lambda _, __, out: self._backbone.append(out.get("high", out.get("out")))
        )

    def score(self, image: NDArray[np.uint8], target: NDArray[np.integer]) -> ImageScore:
        """Score one image.

        Args:
            image: (H, W, 3) RGB.
            target: (H, W) rows of `classes.sets()`: a pseudo ground truth or an annotation mask.

        Raises:
            ValueError: sizes differ, or the network's output is not finite.
        """
        if image.shape[:2] != target.shape:
            raise ValueError(f"the image is {image.shape[:2]}, its target {target.shape}")
        with torch.inference_mode():
            return self._score(self._look(image), torch.from_numpy(target.astype(np.int64)).to(self._device))

    def score_many(
        self, images: Iterable[NDArray[np.uint8]], targets: Iterable[NDArray[np.integer]]
    ) -> Iterator[ImageScore]:
        """Score images one at a time, which on a CPU is faster than a batch of them."""
        for image, target in zip(images, targets, strict=True):
            yield self.score(image, target)

    def _look(self, image: NDArray[np.uint8]) -> Seen:
        """Forward pass."""
        self._layers.clear()
        self._backbone.clear()
        with torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
            logits = self._copy(as_input(image, self._device))
        # The last layers' gradient is taken in single precision whatever the forward pass ran in.
        return Seen(
            logits[0].float().contiguous(), [layer[0].float() for layer in self._layers], self._backbone[0][0].float()
        )

    def _score(self, seen: Seen, rows: Tensor) -> ImageScore:
        log_p, log_q = (x[0] for x in log_posteriors(seen.logits[None], rows[None], self._sets))
        p, q = log_p.exp(), log_q.exp()
        best, prediction = p.max(0)
        named = self._named[rows]
        foreground = torch.where(named >= 0, named, self._coarse_of[prediction]) != 0
        gradient = embedding = gradient_embedding(p - q, seen.layers)
        if (named < 0).all():
            own = F.one_hot(prediction, len(p)).movedim(-1, 0)
            embedding = gradient_embedding(p - own, seen.layers)
        numbers = {
            # Inside the set q is p times a factor, whose logarithm is the loss.
            "pseudo_loss": (log_q - log_p).amax(0).mean(),
            "foreground": foreground.float().mean(),
            **expected_squares(gradient, p, q, squared_features(seen.layers, (rows.shape[0], rows.shape[1]))),
            **uncertainty(log_p, p, self.classes),
        }
        return ImageScore(
            **finite(numbers),
            embedding=embedding.cpu().numpy(),
            features=pooled(seen.backbone, foreground).cpu().numpy(),
            prediction=prediction.to(torch.uint8).cpu().numpy(),
            confidence=(255 * best).round().to(torch.uint8).cpu().numpy(),
        )


def gradient_map(
    network: Network, image: NDArray[np.uint8], target: NDArray[np.integer], classes: Classes, device: str
) -> NDArray[np.float32]:
    """How strongly each pixel pulls at the network, for pictures.

    Args:
        network: a copy of it in evaluation mode is asked; itself it stays as and where it is.
        image: (H, W, 3) RGB.
        target: (H, W) rows of `classes.sets()`.
        classes: fine and coarse classes.
        device: as torch names it.

    Returns:
        (H, W) norm of the loss's gradient at the pixel's logits, |p - q|. Where any class is allowed that is 0, and the
        root of its expected square is given instead, sqrt(1 - |p|^2): what a label drawn from p would pull.
    """
    place = torch.device(device)
    with torch.inference_mode():
        logits = copy.deepcopy(network).eval().to(place)(as_input(image, place))
        rows = torch.from_numpy(target.astype(np.int64)).to(place)
        p, q = (x[0] for x in posteriors(logits, rows[None], torch.from_numpy(classes.sets()).to(place)))
        expected = (1 - p.square().sum(0)).clamp_min(0).sqrt()
        pull: NDArray[np.float32] = torch.where(rows == classes.any_row, expected, (p - q).norm(dim=0)).cpu().numpy()
        return pull


def expected_squares(gradient: Tensor, p: Tensor, q: Tensor, squared: Tensor) -> dict[str, Tensor]:
    """Sizes that the gradient has or is expected to have, by their names in `ImageScore`."""
    magnitude, variance = gradient.norm(), label_variance(q, squared)
    return {
        "magnitude": magnitude,
        "variance": variance,
        "coarse_egl": magnitude.square() + variance,
        "egl": label_variance(p, squared),
    }


def uncertainty(log_p: Tensor, p: Tensor, classes: Classes) -> dict[str, Tensor]:
    """Mean uncertainties of probabilities (C, H, W) and their logarithms, by their names in `ImageScore`."""
    log_group = torch.stack([reduce(torch.logaddexp, log_p[list(group)]) for group in classes.groups])
    entropy, coarse_entropy = (-(x * log_x).sum(0).mean() for x, log_x in ((p, log_p), (log_group.exp(), log_group)))
    best, index = p.max(0, keepdim=True)
    second = p.scatter(0, index, 0).amax(0)
    return {
        "entropy": entropy,
        "coarse_entropy": coarse_entropy,
        # The chain rule; rounding may leave it just below 0.
        "fine_entropy": (entropy - coarse_entropy).clamp_min(0),
        "least_confidence": 1 - best.mean(),
        "margin": (best[0] - second).mean(),
    }


def pooled(features: Tensor, foreground: Tensor) -> Tensor:
    """(2 F,) means of features (F, h, w) over the image and over the foreground, a bool map (H, W)."""
    share = F.adaptive_avg_pool2d(foreground.float()[None], (features.shape[1], features.shape[2]))[0]
    whole = features.mean((1, 2))
    inside = (features * share).sum((1, 2)) / share.sum() if share.any() else whole
    return torch.cat([whole, inside])


def fold_batch_norms(network: Network) -> Network:
    """Merge each batch normalisation into the convolution before it: same output, less work.

    Args:
        network: in evaluation mode; is changed.
    """
    for parent in list(network.modules()):
        for (before, conv), (after, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, before, fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, nn.Identity())
    return network


def as_input(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(1, 3, H, W) in [0, 1], channels last in memory, of an image (H, W, 3)."""
    # A copy, since torch warns about arrays that it must not write to.
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 255


def finite(numbers: Mapping[str, Tensor]) -> dict[str, Any]:
    """The numbers as floats.

    Raises:
        ValueError: one of them is not finite.
    """
    values = torch.stack(list(numbers.values())).tolist()
    if not np.isfinite(values).all():
        raise ValueError("the network's output is not finite: its training diverged, or its checkpoint is damaged")
    return dict(zip(numbers, values, strict=True))
