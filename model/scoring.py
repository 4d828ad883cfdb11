"""A network's opinion of one image: everything that a query strategy can use, in one forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.classes import Classes
from model.extras import View, extra
from model.folded import fold_batch_norms
from model.gradients import (
    gradient_embedding,
    label_variance,
    log_posteriors,
    posteriors,
    squared_features,
)
from model.grids import embedding as embedding_of
from model.grids import grid, looked_up, neighbour_products
from model.grids import pooled as pooled_grid
from model.network import Encoded, Network
from model.pixels import Pixels, walk
from model.rows import axis
from model.sketch import Sketch

#: Below any probability that counts; its logarithm is finite.
TINY = 1e-30
NOT_FINITE = "the network's output is not finite: its training diverged, or its checkpoint is damaged"


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
        extras: numbers and arrays that were asked for besides; see `model.extras`.
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
    extras: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


#: The numbers of an `ImageScore`, by name.
NUMBERS = tuple(f.name for f in fields(ImageScore) if f.type == "float")


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

    def __init__(
        self, network: Network, classes: Classes, device: str, extras: Iterable[str] = (), layers: str = "last"
    ) -> None:
        """Make the copy.

        Args:
            network: gives one logit per fine class; in whatever mode, it is scored in evaluation mode.
            classes: fine and coarse classes.
            device: as torch names it; on CUDA the forward pass runs in half precision.
            extras: names of further numbers and arrays, from `model.extras`.
            layers: whose gradient `embedding` and `magnitude` are of: "last", "head" (all that is not backbone) or
                "all", these two by a backward pass; see `model.sketch`.

        Raises:
            ValueError: the network has another number of classes, or there is no such extra.
        """
        if network.num_classes != len(classes.fine):
            raise ValueError(f"the network knows {network.num_classes} classes, not {', '.join(classes.fine)}")
        self.network, self.classes, self._device = network, classes, torch.device(device)
        self._extras = {name: extra(name) for name in extras}
        # More extras than numbers, or another device: torch's way; see `pixels.py`.
        self._walks = self._device.type == "cpu" and not self._extras
        self._sets = torch.from_numpy(classes.sets()).to(self._device)
        self._coarse_of = torch.from_numpy(classes.coarse_of()).to(self._device)
        self._named = torch.from_numpy(classes.named()).to(self._device)
        folded = fold_batch_norms(copy.deepcopy(network).eval())
        #: The copy: batch norms folded, channels last.
        self.folded = folded.to(self._device).to(memory_format=torch.channels_last)
        values = torch.arange(256, device=self._device).view(1, 1, 256, 1) / 255
        # (256, 3) what the network makes of each value of each channel before its first layer.
        self._colours = np.ascontiguousarray(self.folded.normalised(values)[0, :, :, 0].T.cpu().numpy())
        self._sketch = None if layers == "last" else Sketch(self.folded, layers, self._sets)
        self._last = self.folded.last_layers()
        self._layers: list[Tensor] = []
        for layer in self._last:
            layer.register_forward_pre_hook(lambda _, inputs: self._layers.append(inputs[0]))

    def encode(self, image: NDArray[np.uint8]) -> Encoded:
        """What the backbone makes of an image (H, W, 3); as long as it does not change, `score` takes this instead."""
        size = image.shape[0], image.shape[1]
        with torch.no_grad(), torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
            if self._device.type != "cpu":
                return Encoded(self.folded.encode(as_input(image, self._device)), size)
            ready = torch.from_numpy(looked_up(image, self._colours)).permute(2, 0, 1)[None]
            return Encoded(self.folded.backbone()(ready), size)

    def score(self, image: NDArray[np.uint8] | Encoded, target: NDArray[np.integer]) -> ImageScore:
        """Score one image.

        Args:
            image: (H, W, 3) RGB, or what `encode` made of it.
            target: (H, W) rows of `classes.sets()`: a pseudo ground truth or an annotation mask.

        Raises:
            ValueError: sizes differ, or the network's output is not finite.
        """
        encoded = image if isinstance(image, Encoded) else self.encode(image)
        if encoded.size != target.shape:
            raise ValueError(f"the image is {encoded.size}, its target {target.shape}")
        with torch.inference_mode():
            score = self._walk(encoded, target) if self._walks else self._score(self._look(encoded), target)
        if self._sketch is None:
            return score
        embedding = self.sketch(encoded if self._sketch.head_only else image, target)
        return replace(score, embedding=embedding, magnitude=float(np.linalg.norm(embedding)))

    def sketch(self, image: NDArray[np.uint8] | Encoded, target: NDArray[np.integer]) -> NDArray[np.float32]:
        """The gradient of the head or of all layers, folded; see `model.sketch`.

        Args:
            image: as in `score`.
            target: as in `score`.

        Raises:
            ValueError: the scorer was made for the last layer, or has not what the gradient needs.
        """
        if self._sketch is None:
            raise ValueError('the scorer was made for the last layer alone: give it layers="head" or "all"')
        if isinstance(image, Encoded) and not self._sketch.head_only:
            raise ValueError("the gradient of all layers needs the image, not what the backbone made of it")
        rows = torch.from_numpy(target.astype(np.int64)).to(self._device)
        if isinstance(image, Encoded):
            return self._sketch.gradient(image, rows)
        source = self.encode(image) if self._sketch.head_only else as_input(image, self._device)
        return self._sketch.gradient(source, rows)

    def score_many(
        self, images: Iterable[NDArray[np.uint8]], targets: Iterable[NDArray[np.integer]]
    ) -> Iterator[ImageScore]:
        """Score images one at a time, which on a CPU is faster than a batch of them."""
        for image, target in zip(images, targets, strict=True):
            yield self.score(image, target)

    def _look(self, encoded: Encoded) -> Seen:
        """The head's forward pass."""
        self._layers.clear()
        with torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
            logits = self.folded.decode(encoded.features, encoded.size)
        # The last layers' gradient is taken in single precision whatever the forward pass ran in.
        return Seen(
            logits[0].float().contiguous(),
            [layer[0].float() for layer in self._layers],
            backbone_output(encoded).float(),
        )

    def _walk(self, encoded: Encoded, target: NDArray[np.integer]) -> ImageScore:
        """The CPU's way."""
        self._layers.clear()
        logits = self.folded.head(encoded.features)[0].contiguous().numpy()
        if not np.isfinite(logits).all():
            raise ValueError(NOT_FINITE)  # here, since comparisons below would pass over it
        layers = [layer[0] for layer in self._layers]
        rows = target.astype(np.uint8)
        grids = [grid(layer) for layer in layers]
        seen = walk(logits, rows, self.classes, neighbour_products(grids), len(grids))
        vector = embedding_of(seen.wide, axis(logits.shape[2], rows.shape[1]), grids, rows.size)
        # Where any class is allowed the gradient is 0; the embedding is another one there.
        magnitude = 0.0 if seen.own else float(np.linalg.norm(vector))
        return ImageScore(
            **finite(measures(seen, magnitude)),
            embedding=vector,
            features=pooled_grid(grid(backbone_output(encoded)), seen.maps.foreground),
            prediction=seen.maps.prediction,
            confidence=seen.maps.confidence,
        )

    def _score(self, seen: Seen, target: NDArray[np.integer]) -> ImageScore:
        """The way by torch: on GPUs, and where more is asked for than the numbers."""
        rows = torch.from_numpy(target.astype(np.int64)).to(self._device)
        log_p, log_q = (x[0] for x in log_posteriors(seen.logits[None], rows[None], self._sets))
        p, q = log_p.exp(), log_q.exp()
        best, own = most_probable(p)
        prediction = class_of(own)
        named = self._named[rows]
        foreground = torch.where(named >= 0, named, self._coarse_of[prediction]) != 0
        gradient = embedding = gradient_embedding(p - q, seen.layers)
        if (named < 0).all():
            embedding = gradient_embedding(p - own.float(), seen.layers)
        squared = squared_features(seen.layers, (rows.shape[0], rows.shape[1]))
        numbers = {
            # Inside the set q is p times a factor, whose logarithm is the loss.
            "pseudo_loss": (log_q - log_p).amax(0).mean(),
            "foreground": foreground.float().mean(),
            **expected_squares(gradient, p, q, squared),
            **uncertainty(log_p, p, best, own, self.classes),
        }
        view = View(log_p, p, own, rows, self._sets, foreground, seen.layers, squared, self._last)
        return ImageScore(
            **finite(dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))),
            embedding=embedding.cpu().numpy(),
            features=pooled(seen.backbone, foreground).cpu().numpy(),
            prediction=prediction.to(torch.uint8).cpu().numpy(),
            confidence=(255 * best).round().to(torch.uint8).cpu().numpy(),
            extras={name: ask(view).double().cpu().numpy() for name, ask in self._extras.items()},
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


def most_probable(p: Tensor) -> tuple[Tensor, Tensor]:
    """The highest probability (H, W), and which class has it: (C, H, W) bool, of equal ones the first.

    Ten times as fast as `max` over the leading axis, which torch does element by element.
    """
    best = p.amax(0)
    rank = torch.arange(len(p), 0, -1, dtype=torch.uint8, device=p.device)[:, None, None]
    ranks = rank * (p == best)
    return best, ranks == ranks.amax(0).clamp_min(1)


def class_of(own: Tensor) -> Tensor:
    """(H, W) int64 index of the class that is true in (C, H, W)."""
    index = torch.arange(len(own), dtype=torch.uint8, device=own.device)[:, None, None]
    return (index * own).amax(0).long()


def uncertainty(log_p: Tensor, p: Tensor, best: Tensor, own: Tensor, classes: Classes) -> dict[str, Tensor]:
    """Mean uncertainties of probabilities (C, H, W) and their logarithms, by their names in `ImageScore`."""
    group = torch.stack([reduce(torch.add, p[list(members)]) for members in classes.groups])
    entropy = -(p * log_p).sum(0).mean()
    coarse_entropy = -(group * group.clamp_min(TINY).log()).sum(0).mean()
    return {
        "entropy": entropy,
        "coarse_entropy": coarse_entropy.clamp_min(0),  # rounding may leave it, and the rest, just below
        # The chain rule.
        "fine_entropy": (entropy - coarse_entropy).clamp_min(0),
        "least_confidence": 1 - best.mean(),
        "margin": (best - p.masked_fill(own, 0).amax(0)).mean(),
    }


def measures(seen: Pixels, magnitude: float) -> dict[str, float]:
    """The numbers of an `ImageScore` by name."""
    pixels = seen.maps.prediction.size
    mean = {name: total / pixels for name, total in seen.sums.items()}
    variance, fine = mean["variance"] / pixels, mean["entropy"] - mean["coarse_entropy"]
    return mean | {
        "magnitude": magnitude,
        "variance": variance,
        "coarse_egl": magnitude**2 + variance,
        "egl": mean["egl"] / pixels,
        "coarse_entropy": max(mean["coarse_entropy"], 0.0),
        "fine_entropy": max(fine, 0.0),
    }


def backbone_output(encoded: Encoded) -> Tensor:
    """(F, h, w) the deepest features of an image."""
    return encoded.features.get("high", encoded.features.get("out", next(iter(encoded.features.values()))))[0]


def pooled(features: Tensor, foreground: Tensor) -> Tensor:
    """(2 F,) means of features (F, h, w) over the image and over the foreground, a map (H, W)."""
    share = F.adaptive_avg_pool2d(foreground.float()[None], (features.shape[1], features.shape[2])).flatten()
    whole = torch.full_like(share, 1 / len(share))
    weights = torch.stack([whole, share / share.sum() if share.any() else whole])
    return (weights @ features.permute(1, 2, 0).flatten(0, 1)).flatten()


def as_input(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(1, 3, H, W) in [0, 1], channels last in memory, of an image (H, W, 3)."""
    # A copy, since torch warns about arrays that it must not write to.
    return torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float() / 255


def finite(numbers: Mapping[str, float]) -> dict[str, Any]:
    """The numbers as they are.

    Raises:
        ValueError: one of them is not finite.
    """
    if not np.isfinite(list(numbers.values())).all():
        raise ValueError(NOT_FINITE)
    return dict(numbers)
