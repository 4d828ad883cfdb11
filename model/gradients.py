"""Loss over sets of classes, its gradient at the last layer in closed form, and the size it may be expected to have.

Notation: z logits, p = softmax(z), S the set of classes that a pixel may have, q = p restricted to S and normalised,
f the input of a last layer, U the bilinear enlargement of its output to the image, N pixels of the image.
The gradient of the loss at the logits is G = (p - q) / N, at the weights dW = (U'G) f', at the bias db = sum of U'G.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def marginal_cross_entropy(logits: Tensor, target: Tensor, sets: Tensor) -> Tensor:
    """Minus the log of the probability that the class is in the pixel's set.

    A set of one class makes this the ordinary cross-entropy; for the set of all, loss and gradient are exactly 0.

    Args:
        logits: (N, C, H, W) of any size; half precision is computed in single.
        target: (N, H, W) integers, rows of `sets`.
        sets: (K, C) bool, no row empty.

    Returns:
        (N, H, W), nats.
    """
    full = _full(logits)
    return full.logsumexp(1) - _inside(full, target, sets).logsumexp(1)


def posteriors(logits: Tensor, target: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """The class probabilities p, and q: the same, given that the class is in the pixel's set.

    Args:
        logits: (N, C, H, W).
        target: (N, H, W) integers, rows of `sets`.
        sets: (K, C) bool, no row empty.

    Returns:
        two of (N, C, H, W), each summing to 1 over C; p - q is the gradient of `marginal_cross_entropy`.
    """
    log_p, log_q = log_posteriors(logits, target, sets)
    return log_p.exp(), log_q.exp()


def log_posteriors(logits: Tensor, target: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of what `posteriors` gives; that of q is minus infinity outside the set."""
    full = _full(logits)
    # Not p * M / sum(p * M), which is 0 / 0 where the network is certain of a class outside the set.
    return full.log_softmax(1), _inside(full, target, sets).log_softmax(1)


def gradient_embedding(residual: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Gradient of an image's mean loss at its last layers, through the enlargement of their output: exact.

    Args:
        residual: (C, H, W), p - q of every pixel.
        features: per last layer (D, h, w), its input; the outputs are added, then enlarged bilinearly to (H, W).

    Returns:
        (sum of C * (D + 1),) per layer the gradient of its weights (C, D), then of its bias (C,).

    Source: Ash et al. 2020 (BADGE), gradient embedding; here over all pixels and for a set of classes.
    """
    down, across = _enlargements(features[0], residual)
    # U is the same along rows and columns separately, so its adjoint is two small products.
    low = (down.T @ residual @ across) / residual[0].numel()
    bias = low.sum((1, 2))
    weights = [low.flatten(1) @ layer.flatten(1).T for layer in features]
    return torch.cat([part for weight in weights for part in (weight.flatten(), bias)])


def squared_features(features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Squared norm of what multiplies a pixel's p - q in its gradient: the enlarged features, and 1 for each bias.

    An enlarged feature mixes four neighbours, so its squared norm is a mix of their ten inner products; these are
    taken at the low resolution and enlarged, which is exact and never holds features at the size of the image.

    Args:
        features: per last layer (D, h, w), its input.
        size: (H, W) of the image.

    Returns:
        (H, W), at least the number of layers but for rounding.
    """
    f = torch.cat(list(features))
    rows, columns = (interpolation(low, high, f) for low, high in zip(f.shape[1:], size, strict=True))
    own, right, below = f.square().sum(0), (f[:, :, :-1] * f[:, :, 1:]).sum(0), (f[:, :-1] * f[:, 1:]).sum(0)
    falling, rising = f[:, :-1, :-1] * f[:, 1:, 1:], f[:, 1:, :-1] * f[:, :-1, 1:]
    diagonal = (falling + rising).sum(0) / 2
    # The weight of a pixel with itself, and (twice) with its next neighbour.
    (same_y, next_y), (same_x, next_x) = ((m.square(), 2 * m[:, :-1] * m[:, 1:]) for m in (rows, columns))
    upper = own @ same_x.T + right @ next_x.T
    lower = below @ same_x.T + diagonal @ next_x.T
    return same_y @ upper + next_y @ lower + len(features)


def label_variance(probabilities: Tensor, squared: Tensor) -> Tensor:
    """Variance of an image's gradient embedding when each pixel's class is drawn independently.

    With q it is what the fine classes inside the coarse ones could add to the squared gradient: the expected squared
    norm is |embedding|^2 + this. With p, where the mean gradient is 0, it is the whole expected squared norm.

    Args:
        probabilities: (C, H, W) that classes are drawn from.
        squared: (H, W) from `squared_features`.

    Returns:
        a number >= 0.
    """
    spread = (1 - probabilities.square().sum(0)).clamp_min(0)
    return (spread * squared).sum() / squared.numel() ** 2


def interpolation(low: int, high: int, like: Tensor) -> Tensor:
    """(high, low) the matrix by which torch enlarges one axis linearly, without aligning corners."""
    return _interpolation(low, high, like.dtype, like.device)


@lru_cache(maxsize=32)
def _interpolation(low: int, high: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later, when gradients may be wanted
        return F.interpolate(torch.eye(low, dtype=dtype, device=device)[None], size=high, mode="linear")[0].T


def _enlargements(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of both axes between two maps (channels, height, width)."""
    down, across = (interpolation(a, b, high) for a, b in zip(low.shape[1:], high.shape[1:], strict=True))
    return down, across


def _full(logits: Tensor) -> Tensor:
    """At least single precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _inside(logits: Tensor, target: Tensor, sets: Tensor) -> Tensor:
    """Logits, minus infinity for classes outside the pixel's set."""
    # Rows are picked whole and then turned: ten times as fast as picking class by class.
    outside = (~sets).index_select(0, target.long().flatten()).T.contiguous()
    return logits.masked_fill(outside.view(-1, *target.shape).movedim(0, 1), -torch.inf)
