"""Scores of images from sampled pixels: all that query strategies ask for, in closed form.

An image is its sampled pixels here, P of them. The head is a softmax layer on their features, so the gradient of a
pixel's loss at its weights and bias is (p - q) f', with f the features and a constant 1. Notation as in
`model.gradients`: p class probabilities, q the same given that the class is in the pixel's set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.classes import Classes
from model.heads import Head

#: Images whose features are in single precision at the same time: so few stay in the processor's cache.
CACHED = 4
#: ... and where several threads share them, each of which has to be woken for each part.
CACHED_TOGETHER = 16
#: Images whose scores are computed together.
CHUNK = 64
#: Passes with dropout, the share of features that each leaves out, and the passes whose masks are taken as labelings.
PASSES, DROPPED, LABELINGS = 10, 0.25, 4
#: Share of the pixels that count as the most uncertain ones.
TOP = 0.1
#: Features that the Fisher matrix keeps, besides the constant 1.
FISHER_FEATURES = 15
#: Numbers that a gradient is folded into by `sketch`; norms and angles come out within a few per cent.
SKETCH = 512


@dataclass(frozen=True)
class View:
    """Some images as the head sees them; N images of P pixels.

    Attributes:
        stored: (N, P, D) standardised features, in whatever precision they are kept.
        head: C classes.
        classes: the same fine classes and their coarse ones.
        rows: (N, P) what is known of each pixel, rows of `Classes.sets()`.
        segments: (N, P) pixels of an image with the same number get their label together; those of one predicted class
            do where it is not given.
    """

    stored: Tensor
    head: Head
    classes: Classes
    rows: Tensor
    segments: Tensor | None = None

    @cached_property
    def log_p(self) -> Tensor:
        """(N, P, C) log of the class probabilities."""
        return logits_of(self.stored, self.head).log_softmax(-1)

    @cached_property
    def p(self) -> Tensor:
        """(N, P, C) class probabilities."""
        return self.log_p.exp()

    @cached_property
    def sets(self) -> Tensor:
        """(N, P, C) bool, the classes that each pixel may have."""
        return torch.from_numpy(self.classes.sets())[self.rows]

    @cached_property
    def q(self) -> Tensor:
        """(N, P, C) probabilities given that the class is in the pixel's set."""
        inside = self.log_p.masked_fill(~self.sets, -torch.inf).softmax(-1)
        return torch.where((self.rows == self.classes.any_row)[..., None], self.p, inside)

    @cached_property
    def own(self) -> Tensor:
        """(N, P) the most probable class, of equal ones the first."""
        return self.p.argmax(-1)

    @cached_property
    def entropy(self) -> Tensor:
        """(N, P) nats."""
        return -(self.p * self.log_p).sum(-1)

    @cached_property
    def coarse(self) -> Tensor:
        """(N, P, G) probabilities of the coarse classes."""
        return torch.stack([self.p[..., list(members)].sum(-1) for members in self.classes.groups], -1)

    @cached_property
    def foreground(self) -> Tensor:
        """(N, P) bool: not of the first coarse class, by what is known; where that is nothing, by prediction."""
        named = torch.from_numpy(self.classes.named())[self.rows]
        return torch.where(named >= 0, named, torch.from_numpy(self.classes.coarse_of())[self.own]) != 0

    @cached_property
    def features(self) -> Tensor:
        """(N, P, D) in single precision."""
        return self.stored.float()

    @cached_property
    def squared(self) -> Tensor:
        """(N, P) squared norm of the features and of the constant 1."""
        return self.features.square().sum(-1) + 1

    def gradient(self, residual: Tensor) -> Tensor:
        """(N, C * (D + 1)) mean over pixels of residuals (N, P, C) times features: of weights, then of biases."""
        mean = residual / residual.shape[1]
        weights = mean.transpose(1, 2) @ self.features
        return torch.cat([weights.flatten(1), mean.sum(1)], 1)

    @cached_property
    def pseudo_gradient(self) -> Tensor:
        """(N, C * (D + 1)) of the loss against what is known."""
        return self.gradient(self.p - self.q)

    @cached_property
    def own_gradient(self) -> Tensor:
        """(N, C * (D + 1)) of the loss against the head's own classes."""
        return self.gradient(self.p - one_hot(self.own, self.p))

    def label_variance(self, probabilities: Tensor) -> Tensor:
        """(N,) variance of the gradient when each pixel's class is drawn by itself from (N, P, C)."""
        spread = (1 - probabilities.square().sum(-1)).clamp_min(0)
        return (spread * self.squared).sum(-1) / self.squared.shape[1] ** 2

    def dropout_passes(self, count: int) -> Sequence[Tensor]:
        """(N, P, C) logits of passes that each leave out other features, for every image the same ones."""
        draw, bias = torch.Generator().manual_seed(0), self.head.bias
        kept = [torch.rand(self.stored.shape[-1], generator=draw) >= DROPPED for _ in range(count)]
        weights = torch.cat([self.head.weights * some / (1 - DROPPED) for some in kept])
        # The features are read once for all passes.
        logits = logits_of(self.stored, Head(self.head.classes, weights, bias.repeat(count)))
        return torch.split(logits, len(bias), -1)


def magnitude(view: View) -> Tensor:
    """Norm of the gradient of the mean loss against what is known; 0 where nothing is."""
    return view.pseudo_gradient.square().sum(1).sqrt()


def variance(view: View) -> Tensor:
    """How much the fine classes inside the coarse ones add to the expected square of that norm."""
    return view.label_variance(view.q)


def coarse_egl(view: View) -> Tensor:
    """Expected squared gradient length with labels drawn from what is known."""
    return magnitude(view).square() + variance(view)


def egl(view: View) -> Tensor:
    """Expected squared gradient length with labels drawn from the head (Settles et al. 2008, squared form)."""
    return view.label_variance(view.p)


def egl_settles(view: View) -> Tensor:
    """Expected gradient length per pixel, its mean: sum over y of p_y |p - e_y| |f| (Settles et al. 2008)."""
    away = (view.p.square().sum(-1, keepdim=True) - 2 * view.p + 1).clamp_min(0).sqrt()
    return ((view.p * away).sum(-1) * view.squared.sqrt()).mean(1)


def egl_huang(view: View) -> Tensor:
    """Expected squared gradient length over likely labelings of the whole image (Huang et al. 2016).

    Their beam search has no counterpart for images; the labelings are masks of passes with dropout, equally likely.
    """
    labels = [logits.argmax(-1) for logits in view.dropout_passes(LABELINGS)]
    residuals = torch.cat([view.p - one_hot(own, view.p) for own in labels], -1)
    return view.gradient(residuals).square().sum(1) / LABELINGS


def entropy(view: View) -> Tensor:
    """Mean entropy; the sum of the following two."""
    return view.entropy.mean(1)


def coarse_entropy(view: View) -> Tensor:
    """Mean entropy of the coarse class."""
    return -torch.xlogy(view.coarse, view.coarse).sum(-1).mean(1)


def fine_entropy(view: View) -> Tensor:
    """Mean entropy of the fine class once the coarse class is known."""
    return (entropy(view) - coarse_entropy(view)).clamp_min(0)


def entropy_top(view: View) -> Tensor:
    """Mean entropy of the most uncertain pixels."""
    return view.entropy.topk(math.ceil(TOP * view.entropy.shape[1]), 1).values.mean(1)


def entropy_foreground(view: View) -> Tensor:
    """Mean entropy of the foreground; 0 without one."""
    return (view.entropy * view.foreground).sum(1) / view.foreground.sum(1).clamp_min(1)


def class_entropy(view: View) -> Tensor:
    """(N, C) entropy summed over the pixels of each predicted class, over all pixels."""
    return (one_hot(view.own, view.p) * view.entropy[..., None]).mean(1)


def entropy_gradnorm(view: View) -> Tensor:
    """Length of the gradient of the mean entropy; dH/dz = -p (log p + H)."""
    return view.gradient(-view.p * (view.log_p + view.entropy[..., None])).square().sum(1).sqrt()


def least_confidence(view: View) -> Tensor:
    """Mean of 1 - the highest probability."""
    return 1 - view.p.amax(-1).mean(1)


def margin(view: View) -> Tensor:
    """Mean of the highest minus the second probability; low = uncertain."""
    first = view.p.amax(-1)
    second = view.p.masked_fill(one_hot(view.own, view.p).bool(), 0).amax(-1)
    return (first - second).mean(1)


def pseudo_loss(view: View) -> Tensor:
    """Mean loss against what is known: minus the log of the probability of the pixel's set, nats."""
    return -view.log_p.masked_fill(~view.sets, -torch.inf).logsumexp(-1).mean(1)


def foreground(view: View) -> Tensor:
    """Share of pixels outside the first coarse class."""
    return view.foreground.float().mean(1)


def bald(view: View) -> Tensor:
    """What passes with dropout disagree about: entropy of their mean less their mean entropy (Houlsby et al. 2011)."""
    total, spread = torch.zeros(()), torch.zeros(())
    for logits in view.dropout_passes(PASSES):
        log_p = logits.log_softmax(-1)
        total, spread = total + log_p.exp(), spread - (log_p.exp() * log_p).sum(-1)
    disagreement = -torch.xlogy(total / PASSES, total / PASSES).sum(-1) - spread / PASSES
    return disagreement.mean(1).clamp_min(0)


def segment_egl(view: View) -> Tensor:
    """Expected squared gradient length when the pixels of a segment have one label, drawn from what is known.

    (1 / P^2) [sum_m (1 - |pi_m|^2) |phi_m|^2 + |sum_m (A_m - pi_m phi_m')|^2] with pi_m the mean of p in segment m,
    restricted to what is known and normalised, phi_m the sum of its features, A_m that of p f'.
    """
    member = F.one_hot(view.own if view.segments is None else view.segments).float().transpose(1, 2)
    f = torch.cat([view.features, torch.ones_like(view.features[..., :1])], -1)
    allowed = (member @ view.sets.float()) > 0
    mean = (member @ view.p) * allowed
    pi, phi = mean / mean.sum(-1, keepdim=True).clamp_min(1e-12), member @ f
    spread = (1 - pi.square().sum(-1)).clamp_min(0) * phi.square().sum(-1)
    # A segment that has no pixel has no features either, and adds nothing.
    shift = view.p.transpose(1, 2) @ f - pi.transpose(1, 2) @ phi
    return (spread.sum(1) + shift.square().sum((1, 2))) / f.shape[1] ** 2


def embedding(view: View) -> Tensor:
    """(N, C * (D + 1)) gradient against what is known; where nothing is, against the head's own classes (BADGE)."""
    nothing = (view.rows == view.classes.any_row).all(1)
    if not nothing.any():
        return view.pseudo_gradient
    return torch.where(nothing[:, None], view.own_gradient, view.pseudo_gradient)


def own(view: View) -> Tensor:
    """(N, C * (D + 1)) gradient against the head's own most probable classes (BADGE, Ash et al. 2020)."""
    return view.own_gradient


def sketch(view: View) -> Tensor:
    """(N, `SKETCH`) the embedding in few numbers: each of its numbers gets a random sign and one of the places."""
    whole = embedding(view)
    signs = 2 * torch.randint(0, 2, (whole.shape[1],), generator=torch.Generator().manual_seed(0)) - 1
    padded = F.pad(whole * signs, (0, -whole.shape[1] % SKETCH))
    return padded.view(len(whole), -1, SKETCH).sum(1)


def pooled(view: View) -> Tensor:
    """(N, 2 D) mean of the features over the image, then over its foreground (over the image again without one)."""
    inside = view.foreground.float()
    inside = torch.where(inside.any(1, keepdim=True), inside, torch.ones_like(inside))
    weights = torch.stack([torch.ones_like(inside) / inside.shape[1], inside / inside.sum(1, keepdim=True)], 1)
    return (weights @ view.features).flatten(1)


def fisher(view: View) -> Tensor:
    """(N, K, K) Fisher matrix, mean over pixels of (diag p - p p') (x) f f' (BAIT, Ash et al. 2021).

    Features are projected at random, always alike, to a few dimensions and a constant: K = C * 16.
    """
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(view.features.shape[-1], FISHER_FEATURES, generator=draw) / math.sqrt(FISHER_FEATURES)
    x = view.features @ projection
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    images, pixels, size = x.shape
    products = (x[..., :, None] * x[..., None, :]).view(images, pixels, size * size) / pixels
    classes = view.p.shape[-1]
    first, second = torch.triu_indices(classes, classes)
    p = view.p.transpose(1, 2)
    weight = (first == second)[None, :, None] * p[:, first] - p[:, first] * p[:, second]
    blocks = torch.empty(images, classes, classes, size, size)
    blocks[:, first, second] = (weight @ products).view(images, len(first), size, size)
    blocks[:, second, first] = blocks[:, first, second]
    return blocks.transpose(2, 3).reshape(images, classes * size, classes * size)


Score = Callable[[View], Tensor]
#: One number of each image, by name.
NUMBERS: Mapping[str, Score] = {
    score.__name__: score
    for score in (
        *(magnitude, variance, coarse_egl, egl, egl_settles, egl_huang, entropy, coarse_entropy, fine_entropy),
        *(entropy_top, entropy_foreground, entropy_gradnorm, least_confidence, margin, pseudo_loss, foreground),
        *(bald, segment_egl),
    )
}
#: An array of each image, by name.
VECTORS: Mapping[str, Score] = {
    score.__name__: score for score in (embedding, own, sketch, pooled, fisher, class_entropy)
}


def score_pool(
    features: Tensor,
    head: Head,
    classes: Classes,
    names: Collection[str],
    rows: NDArray[np.integer] | None = None,
    segments: NDArray[np.integer] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Score many images by one head.

    Args:
        features: (N, P, D) standardised features of their pixels; half precision is enough.
        head: of the fine classes.
        classes: fine and coarse classes.
        names: what is wanted, keys of `NUMBERS` and `VECTORS`.
        rows: (N, P) what is known of each pixel, rows of `Classes.sets()`; nothing if it is not given.
        segments: (N, P) pixels of an image that get their label together, numbered from 0; for "segment_egl". If it
            is not given, an image's pixels of one predicted class do.

    Returns:
        by name (N,) or (N, ...).

    Raises:
        ValueError: the head has other classes, or there is no such score.
    """
    if head.classes != classes.fine:
        raise ValueError(f"the head knows {', '.join(head.classes)}, not {', '.join(classes.fine)}")
    scores = {**NUMBERS, **VECTORS}
    if unknown := set(names) - scores.keys():
        raise ValueError(f"there is no score {', '.join(sorted(unknown))}; choose from {', '.join(scores)}")
    known = np.full(features.shape[:2], classes.any_row) if rows is None else rows
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.inference_mode():
        for start in range(0, len(features), CHUNK):
            part = slice(start, start + CHUNK)
            together = None if segments is None else as_integers(segments[part])
            view = View(features[part], head, classes, as_integers(known[part]), together)
            for name, values in parts.items():
                values.append(scores[name](view))
    return {name: torch.cat(values).numpy() if values else np.zeros(0, np.float32) for name, values in parts.items()}


def logits_of(stored: Tensor, head: Head) -> Tensor:
    """(N, P, C) logits of features (N, P, D), a few images at a time."""
    return torch.cat([head.logits(part.float()) for part in few_at_a_time(stored)])


def few_at_a_time(features: Tensor) -> Sequence[Tensor]:
    """Parts of some images' features (N, P, D) that stay in the processor's cache."""
    return torch.split(features, CACHED if torch.get_num_threads() == 1 else CACHED_TOGETHER)


def as_integers(array: NDArray[np.integer]) -> Tensor:
    """As torch wants indices."""
    return torch.from_numpy(array.astype(np.int64))


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """(N, P, C) of labels (N, P), in the precision of `like`."""
    return F.one_hot(labels, like.shape[-1]).to(like.dtype)
