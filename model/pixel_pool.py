"""A pool as its sampled pixels: what is computed once per image, and the default rule on it.

After a label no image is opened again: heads, scores and the order of the pool come from what is kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.classes import Classes
from model.heads import Head, foreground_probability
from model.kinds import Chosen, Kinds, Tables, Worth, choose, design_variance, fit_kinds, reason, tabulate, worth_of
from model.pixel_scores import CACHED

#: Pixels that are kept of an image.
PIXELS = 224


@dataclass(frozen=True)
class PixelPool:
    """N images of P pixels each, labelled or not.

    Attributes:
        features: (N, P, D) standardised, in half precision.
        kinds: of pixels, found in this pool.
        kind_of: (N, P) the kind of each pixel.
        reduced: (N, P, E) components of the features.
    """

    features: Tensor
    kinds: Kinds
    kind_of: NDArray[np.uint8]
    reduced: NDArray[np.float32]


class FirstRow:
    """The default rule: kinds of pixels times doubt, the first image by design; see `model.kinds`.

    Attributes:
        pool: all images.
        tables: of all images.
        worth: of the kinds.
        chosen: the order; its indices are those of `images`.
        images: which images of the pool were ordered.
    """

    def __init__(
        self,
        pool: PixelPool,
        head: Head | None,
        coarse: Head | None,
        classes: Classes,
        labelled: Sequence[int],
        rng: np.random.Generator,
    ) -> None:
        """Order the images that have no label.

        Args:
            pool: all images.
            head: of the fine classes; none while nothing is labelled.
            coarse: of background and foreground; none where nobody has named both.
            classes: fine and coarse classes.
            labelled: indices of labelled images.
            rng: of ties.
        """
        self.pool, self._classes = pool, len(classes.fine)
        inside, doubt = foreground_of(pool.features, head, coarse, classes), doubt_of(pool.features, head)
        self.tables: Tables = tabulate(pool.kind_of, len(pool.kinds.centres), doubt, inside)
        self.worth: Worth = worth_of(self.tables)
        self.images = np.setdiff1d(np.arange(len(pool.kind_of)), np.asarray(labelled, np.intp))
        share = self.tables.share
        self.chosen: Chosen = choose(share[self.images], share[list(labelled)], self.worth, rng)
        if not labelled and len(self.images):
            first = int(design_variance(pool.reduced, inside).argmin())
            rest = choose(np.delete(share, first, 0), share[[first]], self.worth, rng)
            self.chosen = put_first(first, rest, self.chosen)

    @property
    def order(self) -> NDArray[np.intp]:
        """Images without a label, the most wanted first."""
        order: NDArray[np.intp] = self.images[self.chosen.order]
        return order

    def why(self, image: int) -> str:
        """Why an image without a label has its place, in words."""
        place, share = int(np.searchsorted(self.images, image)), self.tables.share[self.images]
        return reason(self.chosen, place, share, self.worth, self.pool.kinds.words, self._classes)

    def shows(self, image: int) -> NDArray[np.bool_]:
        """(P,) which of an image's pixels are of the kind that it has its place for; for a picture of the reason."""
        kind = self.chosen.kind[int(np.searchsorted(self.images, image))]
        return np.asarray(self.pool.kind_of[image] == kind)


def make_pool(features: Tensor, colours: NDArray[np.uint8], rng: np.random.Generator) -> PixelPool:
    """A pool of images.

    Args:
        features: (N, P, D) standardised.
        colours: (N, P, 3) RGB of the same pixels.
        rng: of the kinds.
    """
    stored = features.half()
    kinds = fit_kinds(stored.numpy(), colours, rng)
    reduced = kinds.reduced(stored.numpy())
    return PixelPool(stored, kinds, kinds.of(reduced), reduced)


def probabilities_of(features: Tensor, head: Head) -> Tensor:
    """(N, P, C) probabilities of stored features, a few images at a time."""
    with torch.inference_mode():
        return torch.cat([head.probabilities(part.float()) for part in torch.split(features, CACHED)])


def doubt_of(features: Tensor, head: Head | None) -> NDArray[np.float32]:
    """(N, P) entropy of a head at each pixel, nats; ones while there is none."""
    if head is None:
        return np.ones(features.shape[:2], np.float32)
    p = probabilities_of(features, head)
    return (-torch.xlogy(p, p).sum(-1)).numpy()


def foreground_of(features: Tensor, head: Head | None, coarse: Head | None, classes: Classes) -> NDArray[np.float32]:
    """(N, P) probability of foreground: the larger of the coarse head's and the fine head's; a half without either.

    The coarse head misses what no coarse answer showed, the fine head what no label has shown yet.
    """
    opinions = [] if coarse is None else [probabilities_of(features, coarse)[..., 1]]
    opinions += [] if head is None else [foreground_probability(probabilities_of(features, head), classes)]
    if not opinions:
        return np.full(features.shape[:2], 0.5, np.float32)
    return torch.stack(opinions).amax(0).numpy()


def put_first(first: int, rest: Chosen, alone: Chosen) -> Chosen:
    """An order that begins with one image.

    Args:
        first: its index.
        rest: the order of all others, indices without it.
        alone: gains and kinds of all images by themselves.
    """
    others = np.delete(np.arange(len(alone.order)), first)
    gain, kind, seen = alone.gain.copy(), alone.kind.copy(), alone.seen.copy()
    gain[others], kind[others], seen[others] = rest.gain, rest.kind, rest.seen
    gain[first], seen[first] = alone.gain.max(), 0
    return Chosen(np.array([first, *others[rest.order]], np.intp), gain, kind, seen)
