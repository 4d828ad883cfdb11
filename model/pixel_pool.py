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
from torch.nn.functional import linear

from model.classes import Classes
from model.features import Maps, Pixels, Scaling, spread_pixels
from model.heads import Head, foreground_probability
from model.kinds import Chosen, Kinds, Tables, Worth, choose, design_variance, fit_kinds, reason, tabulate, worth_of
from model.pixel_scores import few_at_a_time

#: Pixels that are kept of an image.
PIXELS = 224
#: Side of the squares in which pictures show kinds, in pixels.
SQUARE = 8


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
        tables: of all images.
        worth: of the kinds.
        chosen: the order; its indices are those of `images`.
        images: which images of the pool were ordered.
    """

    def __init__(
        self,
        tables: Tables,
        kinds: Kinds,
        classes: int,
        labelled: Sequence[int],
        rng: np.random.Generator,
        first: int | None = None,
    ) -> None:
        """Order the images that have no label.

        Args:
            tables: of all images.
            kinds: of pixels.
            classes: how many the head tells apart.
            labelled: indices of labelled images.
            rng: of ties.
            first: the image that goes first whatever it shows; by `first_by_design` while nothing is labelled.
        """
        self.tables, self._kinds, self._classes = tables, kinds, classes
        self.worth: Worth = worth_of(tables)
        self.images = np.setdiff1d(np.arange(len(tables.share)), np.asarray(labelled, np.intp))
        self._place = {image: place for place, image in enumerate(self.images.tolist())}
        share, seen = tables.share[self.images], tables.share[list(labelled)]
        self.chosen: Chosen = choose(share, seen, self.worth, rng)
        if first is not None:
            place = self._place[first]
            rest = choose(np.delete(share, place, 0), np.concatenate([seen, share[[place]]]), self.worth, rng)
            self.chosen = put_first(place, rest, self.chosen)

    @classmethod
    def of(
        cls,
        pool: PixelPool,
        head: Head | None,
        coarse: Head | None,
        classes: Classes,
        labelled: Sequence[int],
        rng: np.random.Generator,
    ) -> FirstRow:
        """The rule on a pool whose features are at hand.

        Args:
            pool: all images.
            head: of the fine classes; none while nothing is labelled.
            coarse: of background and foreground; none where nobody has named both.
            classes: fine and coarse classes.
            labelled: indices of labelled images.
            rng: of ties.
        """
        inside, tables = opinions(pool.features, pool.kind_of, pool.kinds, head, coarse, classes)
        first = int(design_variance(pool.reduced, inside).argmin()) if len(pool.reduced) and not labelled else None
        return cls(tables, pool.kinds, len(classes.fine), labelled, rng, first)

    @property
    def order(self) -> NDArray[np.intp]:
        """Images without a label, the most wanted first."""
        order: NDArray[np.intp] = self.images[self.chosen.order]
        return order

    def gain(self, image: int) -> float:
        """What an image without a label brings, when it got its place."""
        return float(self.chosen.gain[self._place[image]])

    def why(self, image: int) -> str:
        """Why an image without a label has its place, in words."""
        return reason(
            self.chosen, self._place[image], self.tables.share[image], self.worth, self._kinds.words, self._classes
        )

    def kind(self, image: int) -> int:
        """The kind of pixels that an image has its place for; its pixels in the image make a picture of the reason."""
        return int(self.chosen.kind[self._place[image]])


def opinions(
    features: Tensor, kind_of: NDArray[np.uint8], kinds: Kinds, head: Head | None, coarse: Head | None, classes: Classes
) -> tuple[NDArray[np.float32], Tables]:
    """What the heads think of some images: (N, P) probability of foreground, and their tables."""
    shape = (len(features), features.shape[1])
    found = probabilities_of(features, [known for known in (head, coarse) if known is not None])
    fine, rough = found[0] if head else None, found[-1] if coarse else None
    inside = foreground_of(fine, rough, classes, shape)
    return inside, tabulate(kind_of, len(kinds.centres), doubt_of(fine, shape), inside)


def pool_pixels(values: NDArray[np.uint8]) -> Pixels:
    """(P, 2) row and column of the pixels that are kept of an image or a map (H, W, ...)."""
    return spread_pixels((values.shape[0], values.shape[1]), PIXELS)


def at_pool_pixels(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(P, ...) what an image or a map (H, W, ...) has at the pixels that are kept of it."""
    rows, columns = pool_pixels(values).T
    taken: NDArray[np.uint8] = values[rows, columns]
    return taken


def kind_map(maps: Maps, scaling: Scaling, kinds: Kinds) -> NDArray[np.uint8]:
    """(H, W) the kind of every pixel of one image, in squares of `SQUARE` pixels; for pictures of reasons.

    Args:
        maps: of that one image.
        scaling: of the features that the kinds were found in.
        kinds: of pixels.
    """
    height, width = maps.size
    rows, columns = (np.minimum(np.arange(0, side, SQUARE) + SQUARE // 2, side - 1) for side in (height, width))
    places = torch.from_numpy(np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(1, -1, 2))
    with torch.inference_mode():
        features = scaling(maps.at(places.to(maps.images.device)).cpu())
    small = kinds.of(kinds.reduced(features.numpy())).reshape(len(rows), len(columns))
    return np.asarray(small.repeat(SQUARE, 0)[:height].repeat(SQUARE, 1)[:, :width], np.uint8)


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


def probabilities_of(features: Tensor, heads: Sequence[Head]) -> list[Tensor]:
    """(N, P, C) probabilities of stored features by each head, a few images at a time, which all heads read at once."""
    if not heads:
        return []
    weights, bias = torch.cat([head.weights for head in heads]), torch.cat([head.bias for head in heads])
    with torch.inference_mode():
        logits = torch.cat([linear(part.float(), weights, bias) for part in few_at_a_time(features)])
        by_class = logits.movedim(-1, 0).contiguous()  # a softmax over the last of many short rows is slow
        parts = torch.split(by_class, [len(head.bias) for head in heads])
        return [part.softmax(0).movedim(0, -1) for part in parts]


def doubt_of(fine: Tensor | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    """(N, P) entropy of the fine head's probabilities (N, P, C), nats; ones while there is no head."""
    if fine is None:
        return np.ones(shape, np.float32)
    return (-torch.xlogy(fine, fine).sum(-1)).numpy()


def foreground_of(
    fine: Tensor | None, coarse: Tensor | None, classes: Classes, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """(N, P) probability of foreground: the larger of the coarse head's and the fine head's; a half without either.

    The coarse head misses what no coarse answer showed, the fine head what no label has shown yet.

    Args:
        fine: (N, P, C) probabilities by the fine head; None without one.
        coarse: (N, P, 2) the same by the coarse head.
        classes: fine and coarse classes.
        shape: N and P.
    """
    found = [] if coarse is None else [coarse[..., 1]]
    found += [] if fine is None else [foreground_probability(fine, classes)]
    if not found:
        return np.full(shape, 0.5, np.float32)
    return torch.stack(found).amax(0).numpy()


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
