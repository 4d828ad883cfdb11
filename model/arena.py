"""A pixel-labelled folder made ready for a benchmark: a pool with hidden masks, its coarse labels, a test set."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.classes import Classes
from model.coarse import CoarseLabels, label_coarsely
from model.data import Folder, Pair
from model.frozen import STEP, EncodedViews, encode_views, evaluate_encoded, predict_encoded, train_head
from model.network import Encoded, Network, build, checkpoint_classes, load
from model.pseudo import fine_target
from model.scoring import ImageScore, Scorer
from model.training import Recipe, evaluate, predict, train

Map = NDArray[np.uint8]


class Known(NamedTuple):
    """What may be known when a pool is scored: coarse labels or not, and which images are labelled."""

    coarse: bool
    labelled: frozenset[int]


class Labelled(NamedTuple):
    """A pixel-labelled folder read at one size.

    Attributes:
        name: of the data set.
        classes: fine and coarse classes.
        names: of the pool's images.
        images: (H, W, 3) of the pool.
        masks: (H, W) fine classes of the pool's images.
        coarse: the pool's coarse labels.
        tests: image and mask of each test image.
    """

    name: str
    classes: Classes
    names: tuple[str, ...]
    images: list[Map]
    masks: list[Map]
    coarse: CoarseLabels
    tests: list[tuple[Map, Map]]

    @classmethod
    def read(cls, data: Path, size: int) -> Labelled:
        """Read the splits "train" (the pool) and "test", images with a longer side of `size` pixels.

        Raises:
            FolderError, ImageError: the data cannot be read.
        """
        folder = Folder(data)
        names = tuple(folder.names("train"))
        images, masks = [folder.image(n, size) for n in names], [folder.mask(n, size) for n in names]
        tests = [(folder.image(n, size), folder.mask(n, size)) for n in folder.names("test")]
        coarse = label_coarsely(images, masks, folder.classes)
        return cls(data.resolve().name, folder.classes, names, images, masks, coarse, tests)


class Arena:
    """One data set at one size, on one device.

    Attributes:
        name: of the data set.
        classes: fine and coarse classes.
        names: of the pool's images.
        masks: (H, W) fine classes of the pool's images, hidden from strategies until picked.
        coarse: the pool's coarse labels.
        device: as torch names it.
        frozen: backbone features are computed once.
    """

    def __init__(self, data: Path, size: int, frozen: bool, network: str, start: str, device: str) -> None:
        """Read and encode everything.

        Args:
            data: a pixel-labelled folder with the splits "train" (the pool) and "test".
            size: longer side of the images, in pixels.
            frozen: only the head will be trained.
            network: a key of `model.network.NETWORKS`.
            start: "pretrained", "scratch" or a checkpoint's path.
            device: as torch names it.

        Raises:
            FolderError, ImageError: the data cannot be read.
            PretrainedError: the weights cannot be had.
        """
        read = Labelled.read(data, size)
        self.name, self.classes, self.names, self._images, self.masks, self.coarse, self._test = read
        self.device, self.frozen = device, frozen
        self.size, self._network, self._start = size, network, start
        self._true = [fine_target(mask, self.classes) for mask in self.masks]
        self._any = [np.full(mask.shape, self.classes.any_row, np.uint8) for mask in self.masks]
        self._encoded: list[Encoded] = []
        self._encoded_test: list[Encoded] = []
        if frozen:
            scorer = Scorer(self.begin(0), self.classes, device)
            self._encoded = [scorer.encode(image) for image in self._images]
            shapes = [half(mask).shape for mask in self.masks]
            self._coarser = [Encoded(e.features, (h, w)) for e, (h, w) in zip(self._encoded, shapes, strict=True)]
            self._encoded_test = [scorer.encode(image) for image, _ in self._test]
            self._whole = self.begin(0)
            self.views = lru_cache(maxsize=2 * len(self.names))(self._views)

    @property
    def device_name(self) -> str:
        """What the times are of."""
        return device_title(self.device)

    def begin(self, seed: int) -> Network:
        """The network every training of that seed starts from."""
        network = build(self._network, len(self.classes.fine), self._start == "pretrained", seed)
        if self._start not in ("pretrained", "scratch"):
            source = load(Path(self._start))
            if checkpoint_classes(Path(self._start)) == self.classes.fine:
                network.load_state_dict(source.state_dict())
            else:  # other classes: a fresh head
                network.backbone().load_state_dict(source.backbone().state_dict())
        return network.to(self.device).eval()

    def target(self, index: int, known: Known) -> Map:
        """(H, W) what is known about an image's pixels."""
        if index in known.labelled:
            return self._true[index]
        return self.coarse.targets[index] if known.coarse else self._any[index]

    def score(self, network: Network, known: Known, extras: Collection[str], layers: str) -> list[ImageScore]:
        """The network's opinion of every image of the pool; the extra "oracle" looks at hidden masks.

        Where only the head is trained, every `STEP`-th pixel is looked at in both directions, as in its training.
        """
        asked = [name for name in extras if name != "oracle"]
        scorer = Scorer(network, self.classes, self.device, asked, layers)
        halved = self.frozen and layers != "all"
        sources: Sequence[Encoded | Map] = self._coarser if halved else self._images
        found = []
        for index, (image, true) in enumerate(zip(sources, self._true, strict=True)):
            target = self.target(index, known)
            if halved:
                target, true = half(target), half(true)
            score = scorer.score(image, target)
            if "oracle" in extras:
                length = scorer.score(image, true).magnitude
                score = replace(score, extras={**score.extras, "oracle": np.array(length)})
            found.append(score)
        return found

    def prelabel(self, network: Network, index: int) -> Map:
        """(H, W) the network's classes of one image of the pool."""
        if self.frozen:
            return predict_encoded(network, self._encoded[index])
        return predict(network, self._images[index], self.device)

    def test(self, network: Network) -> NDArray[np.int64]:
        """(C, C) confusion table summed over the test images."""
        if self.frozen:
            return evaluate_encoded(network, self._encoded_test, [mask for _, mask in self._test])
        pairs = [Pair(image, fine_target(mask, self.classes)) for image, mask in self._test]
        return evaluate(network, pairs, self.classes, self.device)

    def pair(self, index: int, weak: bool) -> Pair:
        """An image with its annotation mask, or with what its coarse label says."""
        return Pair(self._images[index], self.coarse.targets[index] if weak else self._true[index])

    def _views(self, index: int, weak: bool) -> EncodedViews:
        """Encoded views of an image, the same ones whenever they are asked for."""
        rng = np.random.default_rng(index)
        return encode_views(self._whole, self.pair(index, weak), self.classes, self.size, self.device, rng)


class Learner:
    """Trains on the arena's images, from the same start each time.

    Attributes:
        start: the network it starts from.
    """

    def __init__(self, arena: Arena, recipe: Recipe, seed: int, weak: bool) -> None:
        """Build where it starts.

        Args:
            arena: the data.
            recipe: how to train; its seed is replaced.
            seed: of initial head, order and views.
            weak: coarsely labelled images of the pool are trained on too.
        """
        self._arena, self._recipe, self._weak = arena, replace(recipe, seed=seed), weak
        self.start = arena.begin(seed)

    def train(self, labelled: Sequence[int], times: int = 1) -> tuple[Network, float]:
        """A network that learnt these images, and the seconds it took; the start itself where there is none.

        Args:
            labelled: indices into the pool.
            times: multiplies the recipe's steps.
        """
        arena, begin = self._arena, time.perf_counter()
        recipe = replace(self._recipe, steps=self._recipe.steps * times)
        rest = [i for i in range(len(arena.names)) if i not in set(labelled)] if self._weak else []
        told = [i for i in rest if (arena.coarse.targets[i] != arena.classes.any_row).any()]
        if not labelled and not told:
            return self.start, 0.0
        if arena.frozen:
            full, weak = [arena.views(i, False) for i in labelled], [arena.views(i, True) for i in told]
            network = train_head(self.start, full, weak, arena.classes, recipe)
        else:
            pairs, pale = [arena.pair(i, False) for i in labelled], [arena.pair(i, True) for i in told]
            network = train(self.start, pairs, pale, arena.classes, recipe, arena.device)
        return network, time.perf_counter() - begin


def device_title(device: str) -> str:
    """A device as people know it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)"


def half(rows: Map) -> Map:
    """Every `STEP`-th pixel in both directions."""
    return rows[::STEP, ::STEP]


def recipe_of(steps: int, batch: int, size: int, frozen: bool) -> Recipe:
    """The live recipe at a benchmark's size; a head alone learns well at twice the rate."""
    plain = Recipe(steps=steps, batch=batch, view=size)
    return replace(plain, head_rate=2 * plain.head_rate) if frozen else plain
