"""Which image next: the one that shows kinds of pixels that are frequent, doubtful and little seen so far.

The pixels of a pool fall into some kinds, found once by k-means on their features. A kind is worth its share of the
pool, foreground and background the same in sum, times how doubtful the head is of its pixels. An image shows a kind in
so far as the kind fills it; each showing halves what further ones are worth. The first image, when there is no head to
have doubts, is the one from which a linear head would predict the pool with the least variance.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

Floats = NDArray[np.floating]

#: Kinds of pixels, and the principal components of features that they are found in.
KINDS, COMPONENTS = 96, 32
#: Pixels of the pool that components and kinds are fitted to.
SAMPLE = 30_000
#: An image shows a kind well if the kind fills it this many times as much as the pool.
WELL_SHOWN = 2.0
#: What one good showing leaves of the worth of a kind.
LEFT = 0.5
#: Places that know those before them; the rest follows by gain.
GREEDY = 300
#: Ridge of the first image's design, as a share of the mean second moment.
DESIGN_RIDGE = 0.01
#: Images whose features are in single precision at the same time.
CHUNK = 64
#: Upper ends of hues in degrees of Lab, and what people call them; browns are dark oranges.
HUES = (
    (40, "red"),
    (75, "orange"),
    (105, "yellow"),
    (165, "green"),
    (210, "turquoise"),
    (300, "blue"),
    (340, "purple"),
)
#: Below this chroma a colour is grey; below and above these lightnesses it is dark and bright.
GREY, DARK, BRIGHT = 8.0, 40.0, 70.0
#: Shares of the highest possible entropy from which on the head is doubtful, and very doubtful.
DOUBTFUL, VERY_DOUBTFUL = 0.2, 0.5


@dataclass(frozen=True)
class Kinds:
    """The kinds of pixels of a pool.

    Attributes:
        mean: (D,) of the pool's features.
        axes: (D, E) their principal axes.
        centres: (K, E) of the kinds, along these axes.
        words: per kind its colour in words.
        examples: (K, 2) image and pixel that show each kind most typically, as numbered when the kinds were fitted.
    """

    mean: NDArray[np.float32]
    axes: NDArray[np.float32]
    centres: NDArray[np.float32]
    words: tuple[str, ...]
    examples: NDArray[np.intp]

    def reduced(self, features: Floats) -> NDArray[np.float32]:
        """(N, P, E) components of features (N, P, D)."""
        parts = [features[i : i + CHUNK].astype(np.float32) for i in range(0, len(features), CHUNK)]
        shift = self.mean @ self.axes
        return np.concatenate(
            [part @ self.axes - shift for part in parts] or [np.zeros((0, 0, len(shift)), np.float32)]
        )

    def of(self, reduced: Floats) -> NDArray[np.uint8]:
        """(N, P) the kind of each pixel, by its components (N, P, E)."""
        distance = (self.centres**2).sum(1) - 2 * reduced @ self.centres.T
        return np.asarray(distance.argmin(-1), np.uint8)


class Tables(NamedTuple):
    """What the images of a pool show of each kind; means over the pixels of an image.

    Attributes:
        share: (N, K) share of the image's pixels.
        doubt: (N, K) entropy of these pixels, in sum over all pixels.
        foreground: (N, K) probability of foreground of these pixels, in sum over all pixels.
    """

    share: NDArray[np.float64]
    doubt: NDArray[np.float64]
    foreground: NDArray[np.float64]


class Worth(NamedTuple):
    """What kinds are worth.

    Attributes:
        share: (K,) share of the pool's pixels.
        doubt: (K,) mean entropy of the head, nats; 1 while there is no head.
        worth: (K,) what the first good showing brings.
    """

    share: NDArray[np.float64]
    doubt: NDArray[np.float64]
    worth: NDArray[np.float64]


class Chosen(NamedTuple):
    """An order and what made it.

    Attributes:
        order: (N,) the most wanted image first.
        gain: (N,) by image, when it got its place.
        kind: (N,) by image, the kind that brought most of it.
        seen: (N,) by image, how many times that kind had been shown well by then.
    """

    order: NDArray[np.intp]
    gain: NDArray[np.float64]
    kind: NDArray[np.intp]
    seen: NDArray[np.float64]


def fit_kinds(features: Floats, colours: NDArray[np.uint8], rng: np.random.Generator) -> Kinds:
    """Find the kinds of pixels of a pool.

    Args:
        features: (N, P, D) standardised features of some pixels of each image.
        colours: (N, P, 3) RGB of the same pixels.
        rng: of the pixels that are looked at, and of the first centres.

    Raises:
        ValueError: there is no pixel.
    """
    pixels = features.shape[0] * features.shape[1]
    if not pixels:
        raise ValueError("no pixels to find kinds in")
    places = np.sort(rng.choice(pixels, SAMPLE, replace=False)) if pixels > SAMPLE else np.arange(pixels)
    image, pixel = np.divmod(places, features.shape[1])
    sample = features[image, pixel].astype(np.float32)
    mean = sample.mean(0)
    _, axes = np.linalg.eigh((sample - mean).T @ (sample - mean))
    axes = np.ascontiguousarray(axes[:, ::-1][:, :COMPONENTS])
    reduced = (sample - mean) @ axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct pixels than kinds: no harm
        model = KMeans(min(KINDS, len(sample)), n_init=1, random_state=int(rng.integers(2**31))).fit(reduced)
    centres = np.asarray(model.cluster_centers_, np.float32)
    typical = model.transform(reduced).argmin(0)
    shown = colours[image, pixel]
    words = tuple(colour_words(shown[model.labels_ == kind].mean(0)) for kind in range(len(centres)))
    return Kinds(mean, axes, centres, words, np.stack([image[typical], pixel[typical]], 1))


def colour_words(rgb: Floats) -> str:
    """A colour (3,) in bytes as people call it, such as "dark green"."""
    lightness, a, b = cv2.cvtColor(np.asarray(rgb, np.float32).reshape(1, 1, 3) / 255, cv2.COLOR_RGB2LAB)[0, 0]
    shade = "dark " if lightness < DARK else "bright " if lightness > BRIGHT else ""
    if np.hypot(a, b) < GREY:
        return f"{shade}grey"
    hue = (np.degrees(np.arctan2(b, a)) + 20) % 360 - 20
    name = next((word for end, word in HUES if hue < end), "red")
    return f"{shade}{'brown' if name == 'orange' and lightness < BRIGHT else name}"


def tabulate(kinds: NDArray[np.uint8], count: int, doubt: Floats, foreground: Floats) -> Tables:
    """What each image shows of each kind.

    Args:
        kinds: (N, P) kind of each pixel, below `count`.
        count: K.
        doubt: (N, P) entropy of the head at each pixel, nats; ones while there is no head.
        foreground: (N, P) probability that it is foreground; halves where nobody has said what that is.
    """
    images, pixels = kinds.shape
    cells = (np.arange(images)[:, None] * count + kinds).ravel()

    def total(values: Floats | None) -> NDArray[np.float64]:
        sums = np.bincount(cells, None if values is None else values.ravel(), minlength=images * count)
        return sums.reshape(images, count) / max(pixels, 1)

    return Tables(total(None), total(doubt), total(foreground))


def worth_of(tables: Tables) -> Worth:
    """What kinds are worth: share of the pool, foreground and background alike in sum, times doubt.

    Args:
        tables: of all images, labelled or not.
    """
    share, doubt, inside = (table.mean(0) for table in tables)
    outside = np.maximum(share - inside, 0)
    # Where there is no foreground at all, background is all there is.
    halves = [side / side.sum() for side in (inside, outside) if side.sum() > 1e-9]
    mean_doubt = np.divide(doubt, share, out=np.zeros_like(share), where=share > 0)
    return Worth(share, mean_doubt, np.mean(halves, axis=0) * mean_doubt)


def choose(share: Floats, labelled: Floats, worth: Worth, rng: np.random.Generator) -> Chosen:
    """Order images by what they show.

    Args:
        share: (N, K) of each image's pixels.
        labelled: (M, K) the same of the labelled images.
        worth: of kinds.
        rng: of ties.

    Returns:
        The first `GREEDY` places know each other; the rest follows by gain.
    """
    images = len(share)
    seen = shown(labelled, worth).sum(0)
    bright, left, tie = shown(share, worth), np.ones(images, bool), rng.permutation(images)
    gain, kind, times = np.zeros(images), np.zeros(images, np.intp), np.zeros(images)
    order: list[int] = []
    brings = 1 - LEFT**bright
    for _ in range(min(images, GREEDY)):
        now = worth.worth * LEFT**seen
        gain[left] = (brings @ now)[left]
        best = best_of(np.where(left, gain, -1), tie)
        kind[best] = int((brings[best] * now).argmax())
        times[best] = seen[kind[best]]
        order.append(best)
        left[best] = False
        seen = seen + bright[best]
    rest = np.flatnonzero(left)
    now = worth.worth * LEFT**seen
    kind[rest] = (brings[rest] * now).argmax(1)
    times[rest] = seen[kind[rest]]
    return Chosen(np.array([*order, *rest[np.argsort(-gain[rest], kind="stable")]], np.intp), gain, kind, times)


def shown(share: Floats, worth: Worth) -> NDArray[np.float64]:
    """(N, K) how well images show kinds, 0 to 1, by the kinds' shares of their pixels."""
    enough = np.maximum(WELL_SHOWN * worth.share, 1e-12)
    bright: NDArray[np.float64] = np.minimum(np.asarray(share, np.float64).reshape(-1, len(enough)) / enough, 1)
    return bright


def best_of(values: Floats, tie: NDArray[np.intp]) -> int:
    """Where the highest value is; among equal ones where `tie`, a permutation, is highest."""
    ties = np.flatnonzero(values == values.max())
    return int(ties[tie[ties].argmax()])


def design_variance(reduced: Floats, foreground: Floats) -> NDArray[np.float64]:
    """Expected variance over the pool of a linear head that has learnt one image; low = wanted first.

    Args:
        reduced: (N, P, E) components of pixels, from `Kinds.reduced`.
        foreground: (N, P) probability of foreground. It counts as much as the background, in the pool and in an image.

    Returns:
        (N,) trace of (A + ridge)^-1 B, where A is the image's matrix of second moments and B that of the pool
        (V-optimal design).
    """
    x = np.concatenate([reduced, np.ones_like(reduced[..., :1])], -1)
    inside = np.asarray(foreground, np.float32)
    sides = (inside, 1 - inside)
    pool = sum(side / max(float(side.sum()), 1e-9) for side in sides)
    own = sum(side / np.maximum(side.sum(1, keepdims=True), 1e-9) for side in sides)
    target = np.tensordot(x * np.asarray(pool)[..., None], x, axes=([0, 1], [0, 1])).astype(np.float64)
    moments = (x.transpose(0, 2, 1) @ (x * np.asarray(own)[..., None])).astype(np.float64)
    ridge = DESIGN_RIDGE * np.trace(moments, axis1=1, axis2=2).mean() / x.shape[2]
    spread = np.linalg.solve(moments + ridge * np.eye(x.shape[2]), target)
    return np.asarray(np.trace(spread, axis1=1, axis2=2), np.float64)


def reason(chosen: Chosen, image: int, share: Floats, worth: Worth, words: Sequence[str], classes: int) -> str:
    """Why an image has its place, for people.

    Args:
        chosen: the order.
        image: which one.
        share: (K,) of its pixels.
        worth: of kinds.
        words: per kind its colour.
        classes: how many the head tells apart.
    """
    kind = int(chosen.kind[image])
    doubt = worth.doubt[kind] / np.log(max(classes, 2))
    sure = "very doubtful" if doubt > VERY_DOUBTFUL else "doubtful" if doubt > DOUBTFUL else "hardly doubtful"
    times = round(float(chosen.seen[image]))
    before = "not shown so far" if not times else f"shown {times} time{'s' * (times > 1)} so far"
    return f"shows {words[kind]} pixels ({share[kind]:.0%} of it), {before}, {sure}"
