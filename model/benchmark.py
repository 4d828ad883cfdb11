"""Learning curves: a strategy picks images from a pixel-labelled pool one after the other, a network learns them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.arena import Arena, Known, Learner, recipe_of
from model.effort import Effort, correct, from_scratch
from model.metrics import iou, mean_iou
from model.network import Network, save
from model.results import FULL, Row
from model.scoring import NUMBERS, ImageScore
from model.strategies import NEEDS, REFERENCES, STRATEGIES, Pool

#: Strategies that see nothing of coarse labels; where training does not either, none are given.
WITHOUT_COARSE = frozenset(
    {
        *("random", "entropy", "entropy-top", "least-confidence", "margin", "bald", "power-bald", "egl", "egl-settles"),
        *("egl-huang", "entropy-gradnorm", "badge", "bait", "class-stratified"),
    }
)
#: Steps of the reference that learns the whole pool, as a multiple of a round's.
FULL_STEPS = 5


@dataclass(frozen=True)
class Scale:
    """How large a benchmark is.

    Attributes:
        size: longer side of the images, in pixels.
        steps: optimiser steps of each training.
        batch: views in each.
        frozen: only the head learns, on features that are computed once.
    """

    size: int
    steps: int
    batch: int
    frozen: bool


SCALES = {
    "smoke": Scale(128, 15, 4, True),
    "head": Scale(256, 80, 4, True),
    "small": Scale(192, 60, 4, False),
    "gpu": Scale(640, 300, 8, False),
}


@dataclass(frozen=True)
class Curve:
    """What one learning curve needs; plain values only, so that it can travel as JSON.

    Attributes:
        data: folder of the data set.
        strategy: name of the query strategy, or `FULL`.
        seed: of everything.
        steps: numbers of labelled images to train at, rising.
        scale: a key of `SCALES`.
        network: a key of `model.network.NETWORKS`.
        start: "pretrained", "scratch", or a checkpoint of a source set.
        weak: coarsely labelled images are trained on too.
        layers: whose gradient is taken, "last", "head" or "all".
        commit: of the code.
    """

    data: str
    strategy: str
    seed: int
    steps: tuple[int, ...]
    scale: str
    network: str
    start: str
    weak: bool
    layers: str
    commit: str

    @property
    def setting(self) -> str:
        """What was trained from where, in words; all curves of a setting can be compared."""
        start = self.start if self.start in ("pretrained", "scratch") else "source"
        jumps = {b - a for a, b in zip((0, *self.steps), self.steps, strict=False)} if self.strategy != FULL else {1}
        parts = [f"{start} {self.scale}"]
        parts += [] if self.weak else ["no weak labels"]
        parts += [] if self.layers == "last" else [f"layers={self.layers}"]
        parts += [f"query size {min(jumps)}"] if min(jumps) > 1 else []
        return ", ".join(parts)

    @property
    def uses_coarse(self) -> bool:
        """Whether coarse labels are given, to the strategy or to training."""
        return self.weak or self.strategy not in WITHOUT_COARSE

    def to_json(self) -> dict[str, Any]:
        """For a job."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Curve:
        """The inverse of `to_json`."""
        return cls(**{**facts, "steps": tuple(facts["steps"])})


class Chosen(NamedTuple):
    """Images picked for a row: indices, the networks' masks of them, seconds it took."""

    images: list[int]
    prelabels: list[NDArray[np.uint8]]
    seconds: float


def run(curve: Curve, done: Sequence[Row], device: str) -> Iterator[Row]:
    """The rows of a curve that are not done yet, one after the other.

    Each row trains from the start again, so a curve goes on from its rows as if it had never stopped.

    Args:
        curve: what to run.
        done: rows of the same curve from a run before, rising n without a gap.
        device: as torch names it.

    Raises:
        ValueError: there is no such strategy, scale or layer.
        FolderError, ImageError: the data cannot be read.
    """
    arena = stage(curve.data, curve.scale, curve.network, curve.start, device)
    scale = SCALES[curve.scale]
    recipe = recipe_of(scale.steps, scale.batch, scale.size, scale.frozen)
    learner = Learner(arena, recipe, curve.seed, curve.weak)
    if curve.strategy == FULL:
        yield from [] if done else [full_row(curve, arena, learner)]
        return
    names, done = list(arena.names), without_gap(done, curve.steps)
    labelled = [names.index(name) for row in done for name in row.image.split()]
    if not done:
        network, seconds = learner.train([])
        yield make_row(curve, arena, 0, Chosen([], [], 0.0), network, seconds)
    elif len(labelled) < curve.steps[-1]:
        network, _ = learner.train(labelled)
    for n in [n for n in curve.steps if len(labelled) < n <= len(names)]:
        picks = choose(curve, arena, network, labelled, n - len(labelled))
        labelled += picks.images
        network, seconds = learner.train(labelled)
        yield make_row(curve, arena, n, picks, network, seconds)


def without_gap(done: Sequence[Row], steps: Sequence[int]) -> list[Row]:
    """The rows up to the first n that is missing."""
    by_n = {row.n: row for row in done}
    return [by_n[n] for n in itertools.takewhile(by_n.__contains__, (0, *steps))]


@lru_cache(maxsize=4)
def stage(data: str, scale: str, network: str, start: str, device: str) -> Arena:
    """A data set made ready once per process."""
    return Arena(Path(data), SCALES[scale].size, SCALES[scale].frozen, network, start, device)


def choose(curve: Curve, arena: Arena, network: Network, labelled: Sequence[int], count: int) -> Chosen:
    """The strategy's next images, and what the network would prelabel them with."""
    begin = time.perf_counter()
    pool = [i for i in range(len(arena.names)) if i not in set(labelled)]
    known = Known(coarse=curve.uses_coarse, labelled=frozenset(labelled))
    rng = np.random.default_rng([curve.seed, len(labelled)])
    if curve.strategy == "random":  # looks at nothing, so nothing is scored
        return chosen(arena, network, [pool[i] for i in rng.permutation(len(pool))[:count]], begin)
    extras = NEEDS.get(curve.strategy, ())
    scores = arena.score(network, known, extras, curve.layers)
    strategy = (STRATEGIES | REFERENCES)[curve.strategy]
    picked = strategy(as_pool([scores[i] for i in pool], [scores[i] for i in labelled], extras), rng).order[:count]
    return chosen(arena, network, [pool[int(i)] for i in picked], begin)


def chosen(arena: Arena, network: Network, images: list[int], begin: float) -> Chosen:
    """What was picked, with the network's masks of it and the seconds since `begin`."""
    seconds = time.perf_counter() - begin
    return Chosen(images, [arena.prelabel(network, i) for i in images], seconds)


def as_pool(scores: Sequence[ImageScore], labelled: Sequence[ImageScore], extras: Sequence[str]) -> Pool:
    """The arrays a strategy sees."""

    def columns(rows: Sequence[ImageScore]) -> dict[str, NDArray[np.float64]]:
        found = {name: np.array([getattr(s, name) for s in rows], np.float64) for name in NUMBERS}
        return found | {e: np.array([s.extras[e] for s in rows]) for e in extras if scores[0].extras[e].ndim == 0}

    def vectors(rows: Sequence[ImageScore]) -> dict[str, NDArray[np.float64]]:
        return {e: np.array([s.extras[e] for s in rows]) for e in extras if scores[0].extras[e].ndim}

    def stacked(rows: Sequence[ImageScore], name: str) -> NDArray[np.float32]:
        return np.stack([getattr(s, name) for s in rows]) if rows else np.zeros((0, 0), np.float32)

    return Pool(
        scores=columns(scores),
        embedding=stacked(scores, "embedding"),
        features=stacked(scores, "features"),
        labelled_embedding=stacked(labelled, "embedding"),
        labelled_features=stacked(labelled, "features"),
        vectors=vectors(scores),
        labelled_vectors=vectors(labelled),
        labelled_scores=columns(labelled),
    )


def make_row(curve: Curve, arena: Arena, n: int, picks: Chosen, network: Network, seconds: float) -> Row:
    """Test the network and write down what it took to get there."""
    table = arena.test(network)
    fixes, scratch = efforts(arena, picks)
    return Row(
        setting=curve.setting,
        set=arena.name,
        strategy=curve.strategy,
        seed=curve.seed,
        n=n,
        image=" ".join(arena.names[i] for i in picks.images),
        mIoU=mean_iou(table),
        iou=dict(zip(arena.classes.fine, iou(table).tolist(), strict=True)),
        coarse_seconds=arena.coarse.seconds if curve.uses_coarse else 0.0,
        # Whoever finds a prelabel worse than nothing deletes it.
        full_seconds=sum(min(a.seconds, b.seconds) for a, b in zip(fixes, scratch, strict=True)),
        scratch_seconds=sum(e.seconds for e in scratch),
        fix_clicks=sum(e.clicks for e in fixes),
        repaint_share=float(np.mean([e.repaint for e in fixes])) if fixes else 0.0,
        scratch_clicks=sum(e.clicks for e in scratch),
        scratch_repaint_share=float(np.mean([e.repaint for e in scratch])) if scratch else 0.0,
        train_seconds=seconds,
        score_seconds=picks.seconds,
        commit=curve.commit,
        device=arena.device_name,
    )


def efforts(arena: Arena, picks: Chosen) -> tuple[list[Effort], list[Effort]]:
    """Work on the chosen images: from the prelabel, and from an empty image."""
    scratch = [from_scratch(arena.masks[i]) for i in picks.images]
    fixes = [correct(prelabel, arena.masks[i]) for i, prelabel in zip(picks.images, picks.prelabels, strict=True)]
    return fixes, scratch


def full_row(curve: Curve, arena: Arena, learner: Learner) -> Row:
    """The reference: a network that learnt the whole pool, in `FULL_STEPS` times as many steps."""
    network, seconds = learner.train(range(len(arena.names)), FULL_STEPS)
    row = make_row(curve, arena, len(arena.names), Chosen([], [], 0.0), network, seconds)
    return replace(row, coarse_seconds=0.0)


def train_source(source: Path, scale: str, network: str, out: Path, device: str) -> Path:
    """Train a network on a source set, all its weights, from its pretrained backbone; once.

    Args:
        source: a pixel-labelled folder.
        scale: a key of `SCALES`.
        network: a key of `model.network.NETWORKS`.
        out: folder that the checkpoint is kept in.
        device: as torch names it.

    Returns:
        Its path.
    """
    path = out / f"source-{source.resolve().name}-{network}-{scale}.safetensors"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        size = SCALES[scale].size
        arena = Arena(source, size, False, network, "pretrained", device)
        recipe = recipe_of(SCALES[scale].steps, SCALES[scale].batch, size, frozen=False)
        trained, _ = Learner(arena, recipe, 0, False).train(range(len(arena.names)), FULL_STEPS)
        save(trained, path, {"classes": "\n".join(arena.classes.fine)})
    return path
