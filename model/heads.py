"""A head made of sums: linear discriminant analysis on features of pixels, retrained exactly in milliseconds.

All that a linear discriminant needs of its labelled pixels are three sums per class: their weight, their features and
the products of these. An annotation that comes, changes or goes adds or subtracts its own. There is no chance in it, no
schedule and no order.

Source: Fisher 1936; with the ridge it is scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import ssyrk
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from model.classes import IGNORE, Classes
from model.compiled import compiled
from model.features import Pixels, spread_pixels

#: Classes count in proportion to this power of their share of the labelled pixels: rare ones a little more.
PRIOR_POWER = 0.75
#: Ridge, as a share of the mean variance: `RIDGE + RIDGE_FEW / n` with n labelled images.
RIDGE, RIDGE_FEW = 0.15, 0.6
#: Below this weight of a class its sums are rounding errors of what was subtracted.
NOTHING = 1e-9
#: Guessed shares of a pixel below this are left out: most are, and they say next to nothing.
FAINT = 1e-3
#: Logit of a class without a label: its probability is exactly 0, and no infinity disturbs sums.
NEVER = -1e4
#: Images that are left out in turn to find how sure a head may be, and what it is divided by where one image is all.
LEFT_OUT, ALONE = 8, 5.0
#: Bounds of that divisor.
COLDEST, HOTTEST = 0.3, 30.0
#: Names of the classes of a coarse head.
BACKGROUND, FOREGROUND = "background", "foreground"


@dataclass(frozen=True)
class Sums:
    """Labelled pixels in sum; those of two images added are those of both.

    Attributes:
        classes: names, C of them.
        weight: (C,) float64, of the pixels of each class.
        first: (C, D) float64, weighted sum of their features.
        second: (C, D, D) weighted sum of the features' products; float64, but float32 of one image alone.
        images: how many annotations went in, each of which weighs 1 in all.
    """

    classes: tuple[str, ...]
    weight: Tensor
    first: Tensor
    second: Tensor
    images: int

    def __add__(self, other: Sums) -> Sums:
        """With other images.

        Raises:
            ValueError: their classes are others; see `for_classes`.
        """
        return self._combined(other, 1)

    def __sub__(self, other: Sums) -> Sums:
        """Without images that were added before.

        Raises:
            ValueError: their classes are others; see `for_classes`.
        """
        return self._combined(other, -1)

    def _combined(self, other: Sums, sign: int) -> Sums:
        if self.classes != other.classes:
            raise ValueError(f"sums of {', '.join(self.classes)} and of {', '.join(other.classes)} cannot be combined")
        return Sums(
            self.classes,
            self.weight + sign * other.weight,
            self.first + sign * other.first,
            torch.add(self.second.double(), other.second, alpha=sign),
            self.images + sign * other.images,
        )

    def for_classes(self, classes: Sequence[str]) -> Sums:
        """The same pixels under other classes, by name: new ones have none yet, missing ones are dropped."""
        old = {name: number for number, name in enumerate(self.classes)}
        result = no_sums(classes, self.first.shape[1])
        for number, name in enumerate(classes):
            if name in old:
                for mine, theirs in zip(result.arrays, self.arrays, strict=True):
                    mine[number] = theirs[old[name]]
        return replace(result, images=self.images)

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, first and second moment."""
        return self.weight, self.first, self.second

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """(C,) which classes have a labelled pixel."""
        return (self.weight > NOTHING).numpy()


def no_sums(classes: Sequence[str], dimensions: int) -> Sums:
    """The sums of no image."""
    weight, first, second = (
        torch.zeros(len(classes), *shape, dtype=torch.float64) for shape in ((), (dimensions,), (dimensions,) * 2)
    )
    return Sums(tuple(classes), weight, first, second, images=0)


@dataclass(frozen=True)
class LabelledPixels:
    """What is kept of an annotation: some of its pixels, which together weigh 1.

    Attributes:
        features: (P, D) standardised.
        labels: (P,) class of each.
        weights: (P,) how much of the image each stands for.
    """

    features: Tensor
    labels: NDArray[np.uint8]
    weights: NDArray[np.float32]

    def sums(self, classes: Sequence[str]) -> Sums:
        """Their sums, whose classes have these names."""
        shares = np.zeros((len(self.labels), len(classes)), np.float32)
        shares[np.arange(len(self.labels)), self.labels] = self.weights
        return sum_up(self.features, torch.from_numpy(shares), classes, 1)


def choose_pixels(
    mask: NDArray[np.uint8], count: int, rng: np.random.Generator
) -> tuple[Pixels, NDArray[np.uint8], NDArray[np.float32]]:
    """Pixels of an annotation that say as much as all of them: half spread evenly, half an equal number per class.

    Args:
        mask: (H, W) class of every pixel, IGNORE where unknown.
        count: how many; fewer come out where much is unknown.
        rng: of the half by class.

    Returns:
        (P, 2) row and column, (P,) class, and (P,) weight: one over the chance of being chosen, 1 in all.
    """
    even = spread_pixels((mask.shape[0], mask.shape[1]), count // 2)
    even = even[mask[even[:, 0], even[:, 1]] != IGNORE]
    sizes = np.bincount(mask.ravel(), minlength=256)[:IGNORE]
    present, known = np.flatnonzero(sizes), sizes.sum()
    if not known:
        return even, np.zeros(0, np.uint8), np.zeros(0, np.float32)
    share = (count - count // 2) // len(present)
    drawn = [rng.choice(np.flatnonzero(mask == c), share) for c in present]
    pixels = np.concatenate([even, np.stack(np.unravel_index(np.concatenate(drawn), mask.shape), 1)]).astype(np.int64)
    labels = mask[pixels[:, 0], pixels[:, 1]]
    expected = len(even) / known + share / np.maximum(sizes, 1)[labels]
    weights = 1 / expected
    return pixels, labels, (weights / weights.sum()).astype(np.float32)


def sum_up(features: Tensor, shares: Tensor, classes: Sequence[str], images: int) -> Sums:
    """Sums of pixels that belong to classes by shares.

    Args:
        features: (P, D) standardised.
        shares: (P, C) weight with which each pixel belongs to each class.
        classes: names.
        images: how many annotations the pixels are of.

    Raises:
        FloatingPointError: a feature or a share is not finite; in sums it would be there for ever.
    """
    need_finite("pixels", features, shares)
    second = torch.zeros(shares.shape[1], *[features.shape[1]] * 2)
    for number, share in enumerate(shares.T):
        inside = share > 0
        if inside.any():
            scaled = features[inside].float() * share[inside].sqrt()[:, None]
            half = torch.from_numpy(ssyrk(1.0, scaled.numpy().T)).T  # its lower triangle; nothing is computed twice
            torch.add(half, half.tril(-1).T, out=second[number])
    first = (shares.T @ features.float()).double()
    return Sums(tuple(classes), shares.double().sum(0), first, second, images)


def need_finite(what: str, *numbers: Tensor) -> None:
    """Refuse numbers that are not finite.

    Raises:
        FloatingPointError: one is not; the message begins with `what`.
    """
    if not all(part.isfinite().all() for part in numbers):
        raise FloatingPointError(f"{what} with numbers that are not finite")


@dataclass(frozen=True)
class Head:
    """A last layer: logits are linear in the features, probabilities their softmax.

    Attributes:
        classes: names, C of them.
        weights: (C, D).
        bias: (C,); `NEVER` for a class without a label.
    """

    classes: tuple[str, ...]
    weights: Tensor
    bias: Tensor

    @property
    def finite(self) -> bool:
        """Whether all its numbers are."""
        return bool(self.weights.isfinite().all() and self.bias.isfinite().all())

    def logits(self, features: Tensor) -> Tensor:
        """(..., C) of standardised features (..., D)."""
        return F.linear(features, self.weights, self.bias)

    def probabilities(self, features: Tensor) -> Tensor:
        """(..., C) of standardised features (..., D)."""
        return self.logits(features).softmax(-1)

    def tempered(self, temperature: float) -> Head:
        """The same head less sure of itself by that factor: same classes, other probabilities."""
        known = self.bias > NEVER
        return Head(self.classes, self.weights / temperature, torch.where(known, self.bias / temperature, NEVER))


def solve(sums: Sums, without: Sums | None = None) -> Head:
    """The linear discriminant of labelled pixels.

    With class means m, prior shares s and the pooled covariance S within classes, to which a ridge is added, the
    logits of features f are m' S^-1 f - m' S^-1 m / 2 + log s.

    Args:
        sums: of the pixels.
        without: of an image among them that does not count, as if it were subtracted; the system is solved in single
            precision then, which is enough to see what the head makes of that image.

    Raises:
        FloatingPointError: the sums are not finite.
        ValueError: there is no labelled pixel.
    """
    weight, first, images = sums.weight, sums.first, sums.images
    if without is not None:
        weight, first, images = weight - without.weight, first - without.first, images - without.images
    need_finite("sums of labelled pixels", weight, first)
    labelled = weight > NOTHING
    if not labelled.any():
        raise ValueError("a head needs at least one labelled pixel")
    prior = torch.where(labelled, weight / weight[labelled].sum(), 0).clamp_min(0) ** PRIOR_POWER
    prior = prior / prior.sum()
    means = torch.where(labelled[:, None], first / weight[:, None], 0)
    scale = torch.where(labelled, prior / weight, 0).numpy()
    part = (without or sums).second.numpy()
    within = torch.from_numpy(combined(sums.second.numpy(), part, without is not None, scale))
    within.addmm_(means.T * -prior, means)
    need_finite("sums of labelled pixels", within)
    system = ridged(within, images).to(torch.float64 if without is None else torch.float32)
    factor = torch.linalg.cholesky(system)
    slopes = torch.cholesky_solve(means.T.to(system.dtype), factor).T.double()
    bias = torch.where(labelled, prior.log() - (means * slopes).sum(1) / 2, NEVER)
    return Head(sums.classes, slopes.float(), bias.float())


@compiled
def combined(
    whole: NDArray[np.floating], part: NDArray[np.floating], less: bool, scale: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(D, D) scaled sum over classes of `whole` (C, D, D), less `part` where it says so; only the lower triangle."""
    classes, size, _ = whole.shape
    result = np.zeros((size, size), np.float64)
    for row in range(size):
        for c in range(classes):
            if scale[c] != 0:
                for column in range(row + 1):
                    value = whole[c, row, column]
                    if less:
                        value -= part[c, row, column]
                    result[row, column] += scale[c] * value
    return result


def ridged(covariance: Tensor, images: int) -> Tensor:
    """A covariance (D, D) plus a multiple of the unit matrix, in place: less of it, the more images are labelled."""
    strength = RIDGE + RIDGE_FEW / max(images, 1)
    covariance.diagonal().add_(strength * covariance.diagonal().mean().clamp_min(1e-12))
    return covariance


def fit(images: Sequence[LabelledPixels], sums: Sums, own: Sequence[Sums] | None = None) -> Head:
    """A head whose probabilities can be believed: `solve` of the sums, divided by its temperature.

    Args:
        images: the labelled ones, or some of them.
        sums: of all labelled images, and of weak labels where there are any.
        own: the sums of each of the images, if they are at hand.

    Raises:
        FloatingPointError: the sums are not finite.
        ValueError: there is no labelled pixel.
    """
    return solve(sums).tempered(temperature(images, sums, own))


def temperature(images: Sequence[LabelledPixels], sums: Sums, own: Sequence[Sums] | None = None) -> float:
    """What logits must be divided by, so that a head is as sure as it is right on images it has not learnt.

    A few images are left out in turn, each by subtracting its sums; the divisor with the least cross-entropy on all
    of them is taken. Pixels of a class that no other image has do not count.

    Args:
        images: the labelled ones, or some of them.
        sums: of all labelled images, and of weak labels where there are any.
        own: the sums of each of the images, if they are at hand.

    Source: Guo et al. 2017, temperature scaling.
    """
    if sums.images < 2:
        return ALONE
    chosen = range(0, len(images), max(1, len(images) // LEFT_OUT))[:LEFT_OUT]
    unseen = [left_out(images[i], own[i] if own else images[i].sums(sums.classes), sums) for i in chosen]
    logits, labels, weights = (torch.cat(parts) for parts in zip(*unseen, strict=True))
    if not len(labels):
        return ALONE

    def loss(log_temperature: float) -> float:
        wrong = F.cross_entropy(logits / math.exp(log_temperature), labels, reduction="none")
        return float((weights * wrong).sum())

    bounds = math.log(COLDEST), math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3}).x)


def left_out(image: LabelledPixels, own: Sums, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (P, C), labels (P,) and weights (P,) of an image's pixels under the head of all other images."""
    others = (sums.weight - own.weight > NOTHING).numpy()
    if not others.any():
        return torch.zeros(0, len(sums.classes)), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    known = others[image.labels]
    logits = solve(sums, own).logits(image.features[torch.from_numpy(known)].float())
    return logits, torch.from_numpy(image.labels[known]).long(), torch.from_numpy(image.weights[known])


def coarse_sums(features: Tensor, coarse: NDArray[np.uint8], num_coarse: int) -> Sums:
    """Sums of a coarsely answered image for the head that tells foreground from background.

    Args:
        features: (P, D) standardised, of pixels spread over the image.
        coarse: (P,) coarse class of each; the first is the background. MIXED and UNKNOWN do not count.
        num_coarse: how many coarse classes there are.
    """
    known = coarse < num_coarse
    shares = np.stack([coarse == 0, (coarse > 0) & known], 1) / max(int(known.sum()), 1)
    return sum_up(features, torch.from_numpy(shares.astype(np.float32)), (BACKGROUND, FOREGROUND), int(known.any()))


def names_foreground(sums: Sums) -> bool:
    """Whether coarse answers name both foreground and background; if not, they teach nothing about either."""
    return bool(sums.labelled.all())


def foreground_probability(probabilities: Tensor, classes: Classes) -> Tensor:
    """(...) that a pixel is not of the first coarse class, of probabilities of fine classes (..., C)."""
    return probabilities[..., torch.from_numpy(classes.coarse_of()) != 0].sum(-1)


def weak_sums(head: Head, coarse: Head, features: Tensor, classes: Classes, weight: float) -> Sums:
    """Sums of pixels without a label, as the coarse head and the fine head together guess them.

    The coarse head says how likely a pixel is foreground; the fine head divides that among the classes of either side.

    Args:
        head: of fine classes.
        coarse: of background and foreground.
        features: (P, D) standardised, of pixels from all over the pool.
        classes: fine and coarse classes.
        weight: of all these pixels together.
    """
    fine, outside = head.probabilities(features), torch.from_numpy(classes.coarse_of()) != 0
    inside = coarse.probabilities(features)[:, 1:]
    sides = torch.where(outside, inside, 1 - inside)
    own = torch.where(outside, fine[:, outside].sum(1, keepdim=True), fine[:, ~outside].sum(1, keepdim=True))
    shares = sides * torch.where(own > NOTHING, fine / own.clamp_min(NOTHING), 0)
    kept = torch.where(shares > FAINT, shares, 0)
    kept = kept * (shares.sum(1) / kept.sum(1).clamp_min(FAINT))[:, None]
    return sum_up(features, kept * (weight / len(features)), head.classes, 0)
