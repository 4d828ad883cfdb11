"""A pixel-labelled folder made ready for the instant learner: features once, then heads and orders in milliseconds."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.arena import Labelled, device_title
from model.classes import IGNORE
from model.features import Dense, Extractor, fit_scaling
from model.heads import (
    BACKGROUND,
    FOREGROUND,
    Head,
    LabelledPixels,
    Sums,
    choose_pixels,
    coarse_sums,
    names_foreground,
    no_sums,
    solve,
)
from model.instant import (
    LABELLED,
    READS,
    WEAK,
    WEAK_UNTIL,
    head_from_coarse,
    head_of,
    left_out_of,
    no_opinion,
    pool_of,
)
from model.masks import STRIDE, Layer, layer_of, strongest_of
from model.metrics import confusion
from model.pixel_pool import FirstRow, PixelPool, make_pool, pool_pixels
from model.pixel_scores import score_pool
from model.pool import Pool
from model.pseudo import fine_target
from model.sharpen import Guide, guide_of
from model.strategies import DEFAULT, REFERENCES, STRATEGIES

Map = NDArray[np.uint8]

#: Share of the pool that a seed may pick from: what a start is by chance, since learning has no chance in it.
DRAWN = 0.7


class Experiment:
    """One data set at one size: its pool as sampled pixels, its annotations as sums, its test images as maps.

    Attributes:
        name: of the data set.
        classes: fine and coarse classes.
        names: of the pool's images.
        masks: (H, W) fine classes of the pool's images, hidden from strategies until picked.
        coarse: the pool's coarse labels.
        device: as torch names it; features are computed there.
    """

    def __init__(self, data: Path, size: int, network: str, device: str) -> None:
        """Read everything and compute features.

        Args:
            data: a pixel-labelled folder with the splits "train" (the pool) and "test".
            size: longer side of the images, in pixels.
            network: a key of `model.network.NETWORKS`, whose backbone is used.
            device: as torch names it.

        Raises:
            FolderError, ImageError: the data cannot be read.
            PretrainedError: the weights cannot be had.
        """
        self.name, self.classes, self.names, images, self.masks, self.coarse, tests = Labelled.read(data, size)
        self.device = device
        extractor = Extractor(network, device)
        self._pixels = [pool_pixels(mask) for mask in self.masks]
        raw = torch.stack(list(extractor.sample(images, self._pixels)))
        self._scaling = fit_scaling(raw.flatten(0, 1), extractor.widths)
        colours = np.stack(
            [image[places[:, 0], places[:, 1]] for image, places in zip(images, self._pixels, strict=True)]
        )
        self.pool: PixelPool = make_pool(self._scaling(raw), colours, np.random.default_rng(0))
        self._annotations = self._annotate(extractor, images)
        self._images = [self._ready(extractor, image).half() for image in images]
        self._test = [(self._ready(extractor, image), mask) for image, mask in tests]
        answers = no_sums((BACKGROUND, FOREGROUND), self._scaling.dimensions)
        for index in self.coarse.asked:
            answers = answers + self._coarse_answer(index)
        #: Of background and foreground; none where no coarse answer names both.
        self.coarse_head = solve(answers) if names_foreground(answers) else None
        #: (N, P) what annotations and coarse labels say of the pool's pixels, rows of `Classes.sets()`.
        self._annotated = np.stack(
            [self._at(fine_target(m[None], self.classes)[0], i) for i, m in enumerate(self.masks)]
        )
        self._answers = np.stack([self._at(target, i) for i, target in enumerate(self.coarse.targets)])
        self.drawn, self.sums = lru_cache(maxsize=1)(self._drawn), lru_cache(maxsize=64)(self._sums)
        self._nothing = no_sums(self.classes.fine, self._scaling.dimensions)
        self._latest: tuple[tuple[int, ...], Sums] = (), self._nothing

    def _ready(self, extractor: Extractor, image: Map) -> Ready:
        """An image of which masks will be made."""
        dense = extractor.maps([image]).dense(self._scaling, STRIDE).cpu()
        return Ready(dense, guide_of(image, dense.size))

    def _annotate(self, extractor: Extractor, images: Sequence[Map]) -> list[LabelledPixels]:
        """What is kept of each image's annotation."""
        drawn = [choose_pixels(mask, LABELLED, np.random.default_rng(i)) for i, mask in enumerate(self.masks)]
        features = extractor.sample(images, [pixels for pixels, _, _ in drawn])
        pairs = zip(features, drawn, strict=True)
        return [LabelledPixels(self._scaling(raw).half(), labels, weights) for raw, (_, labels, weights) in pairs]

    def _coarse_answer(self, index: int) -> Sums:
        """The sums of a coarsely answered image."""
        named = self.classes.named()[self._at(self.coarse.targets[index], index)]
        answer = np.where(named < 0, IGNORE, named).astype(np.uint8)
        return coarse_sums(self.pool.features[index].float(), answer, len(self.classes.coarse))

    def _at(self, target: Map, index: int) -> Map:
        """(P,) the values of a map (H, W) at an image's pixels."""
        rows, columns = self._pixels[index].T
        values: Map = target[rows, columns]
        return values

    def _sums(self, index: int) -> Sums:
        return self._annotations[index].sums(self.classes.fine)

    def _total(self, labelled: tuple[int, ...]) -> Sums:
        """The sums of these images; where those of all but the last were asked for before, one is added."""
        known, sums = self._latest if self._latest[0] == labelled[: len(self._latest[0])] else ((), self._nothing)
        for index in labelled[len(known) :]:
            sums = sums + self.sums(index)
        self._latest = labelled, sums
        return sums

    @property
    def device_name(self) -> str:
        """What the times are of."""
        return device_title(self.device)

    def available(self, seed: int) -> list[int]:
        """The images that a seed may pick from."""
        drawn = np.random.default_rng(seed).permutation(len(self.names))
        return sorted(int(i) for i in drawn[: max(1, math.ceil(DRAWN * len(drawn)))])

    def train(self, labelled: Sequence[int], weak: bool) -> tuple[Head, float]:
        """A head that learnt these images, and the seconds it took.

        Args:
            labelled: indices into the pool.
            weak: the pool's other pixels teach too, as the coarse head guesses them, while few images are labelled.
        """
        begin = time.perf_counter()
        sums = self._total(tuple(labelled))
        if not sums.labelled.any():
            return self.start(weak), time.perf_counter() - begin
        few, coarse = left_out_of(labelled), self.coarse_head if weak and len(labelled) <= WEAK_UNTIL else None
        pixels = self.pool.features[:, :WEAK].flatten(0, 1).float() if coarse else torch.zeros(0)
        images, own = [self._annotations[i] for i in few], [self.sums(i) for i in few]
        head = head_of(sums, images, own, coarse, pixels, self.classes)
        return head, time.perf_counter() - begin

    def start(self, coarse: bool) -> Head:
        """The head before any label: the coarse head, each side shared by its classes alike; else no opinion."""
        if not coarse or self.coarse_head is None:
            return no_opinion(self.classes, self._scaling.dimensions)
        return head_from_coarse(self.coarse_head, self.classes)

    def order(
        self,
        strategy: str,
        head: Head,
        rest: Sequence[int],
        labelled: Sequence[int],
        coarse: bool,
        seed: int,
        count: int | None = None,
    ) -> list[int]:
        """Images without a label as a strategy wants them, the most wanted first.

        Args:
            strategy: a key of `STRATEGIES` or `REFERENCES`.
            head: the current one.
            rest: images that may be picked.
            labelled: images with an annotation.
            coarse: whether coarse labels are known.
            seed: of ties and of what the strategy draws.
            count: how many of the first images will be taken, if that is known.
        """
        rng, drawn = np.random.default_rng([seed, len(labelled)]), self.drawn(seed)
        if strategy == DEFAULT:
            known, places = head if labelled else None, drawn.places(labelled)
            first_row = FirstRow.of(drawn.pool, known, self.coarse_head, self.classes, places, rng)
            return [drawn.images[int(i)] for i in first_row.order]
        pool = self._as_pool(READS.get(strategy, ()), head, drawn, drawn.places(rest), drawn.places(labelled), coarse)
        ranked = {**STRATEGIES, **REFERENCES}[strategy](replace(pool, places=count), rng)
        return [rest[int(i)] for i in ranked.order]

    def _drawn(self, seed: int) -> Drawn:
        images = self.available(seed)
        features = self.pool.features[images].float()
        kind_of, reduced = self.pool.kind_of[images], self.pool.reduced[images]
        return Drawn(images, PixelPool(features, self.pool.kinds, kind_of, reduced))

    def _as_pool(
        self, names: Sequence[str], head: Head, drawn: Drawn, rest: list[int], labelled: list[int], coarse: bool
    ) -> Pool:
        """What a strategy sees; `rest` and `labelled` are places among the drawn images."""
        scores = self._scores(names, head, drawn, labelled, coarse)
        mine, theirs = ({n: values[part] for n, values in scores.items()} for part in (rest, labelled))
        return pool_of(mine, theirs, len(rest), len(labelled))

    def _scores(
        self, names: Sequence[str], head: Head, drawn: Drawn, labelled: list[int], coarse: bool
    ) -> dict[str, NDArray[np.float64]]:
        """Scores of drawn images by name: against annotations where labelled, else coarse labels or nothing."""

        def score(wanted: Sequence[str], rows: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
            found = score_pool(drawn.pool.features, head, self.classes, wanted, rows)
            return {name: values.astype(np.float64) for name, values in found.items()}

        annotated = self._annotated[drawn.images]
        rows = self._answers[drawn.images] if coarse else np.full_like(annotated, self.classes.any_row)
        rows[labelled] = annotated[labelled]
        plain = score([name for name in names if name != "oracle"], rows) if names else {}
        return plain | ({"oracle": score(["magnitude"], annotated)["magnitude"]} if "oracle" in names else {})

    def prelabel(self, head: Head, index: int) -> Map:
        """(H, W) the head's classes of one image of the pool."""
        return self._images[index].mask(layer_of(head, self._scaling))

    def test(self, head: Head) -> NDArray[np.int64]:
        """(C, C) confusion table summed over the test images, at full resolution."""
        count = len(self.classes.fine)
        table, layer = np.zeros((count, count), np.int64), layer_of(head, self._scaling)
        for image, mask in self._test:
            table += confusion(image.mask(layer), mask, count)
        return table


class Drawn(NamedTuple):
    """The part of the pool that a seed may pick from.

    Attributes:
        images: which images these are, rising.
        pool: of them, in single precision: so no pick has to convert them.
    """

    images: list[int]
    pool: PixelPool

    def places(self, images: Sequence[int]) -> list[int]:
        """Where images are among those that were drawn."""
        return [bisect_left(self.images, image) for image in images]


class Ready(NamedTuple):
    """An image made ready for heads, and for sharpening what they say."""

    dense: Dense
    guide: Guide

    def mask(self, layer: Layer) -> Map:
        """(H, W) the classes of a head."""
        return strongest_of(self.dense, self.guide, layer)[0]

    def half(self) -> Ready:
        """The same in less memory."""
        return Ready(self.dense.half(), self.guide)
