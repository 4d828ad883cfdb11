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

from model.arena import Arena, Learner, recipe_of
from model.effort import Effort, correct, from_scratch
from model.experiment import Experiment
from model.metrics import iou, mean_iou
from model.network import save
from model.results import FULL, Row
from model.trials import DeepTrial, InstantTrial, Trial

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
        learner: "instant", a head made of sums on frozen features, or "deep", a network trained by descent.
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
    learner: str = "deep"

    @property
    def setting(self) -> str:
        """What was trained from where, in words; all curves of a setting can be compared."""
        start = self.start if self.start in ("pretrained", "scratch") else "source"
        jumps = {b - a for a, b in zip((0, *self.steps), self.steps, strict=False)} if self.strategy != FULL else {1}
        parts = [f"instant {SCALES[self.scale].size} px" if self.learner == "instant" else f"{start} {self.scale}"]
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
    trial = begin(curve, device)
    if curve.strategy == FULL:
        yield from [] if done else [full_row(curve, trial)]
        return
    names, done = list(trial.data.names), without_gap(done, curve.steps)
    labelled = [names.index(name) for row in done for name in row.image.split()]
    if not done:
        yield make_row(curve, trial, 0, Chosen([], [], 0.0), trial.learn([]))
    elif len(labelled) < curve.steps[-1]:
        trial.learn(labelled)
    for n in [n for n in curve.steps if len(labelled) < n <= len(trial.candidates)]:
        picks = choose(trial, labelled, n - len(labelled))
        labelled += picks.images
        yield make_row(curve, trial, n, picks, trial.learn(labelled))


def begin(curve: Curve, device: str) -> Trial:
    """What a curve runs on, before its first label.

    Raises:
        ValueError: there is no such learner or scale.
        FolderError, ImageError: the data cannot be read.
    """
    scale = SCALES[curve.scale]
    if curve.learner == "instant":
        experiment = experiment_for(curve.data, scale.size, curve.network, device)
        return InstantTrial(experiment, curve.strategy, curve.seed, curve.weak, curve.uses_coarse)
    if curve.learner != "deep":
        raise ValueError(f"there is no learner {curve.learner!r}: choose instant or deep")
    arena = stage(curve.data, curve.scale, curve.network, curve.start, device)
    learner = Learner(arena, recipe_of(scale.steps, scale.batch, scale.size, scale.frozen), curve.seed, curve.weak)
    return DeepTrial(arena, learner, curve.strategy, curve.seed, curve.uses_coarse, curve.layers)


def without_gap(done: Sequence[Row], steps: Sequence[int]) -> list[Row]:
    """The rows up to the first n that is missing."""
    by_n = {row.n: row for row in done}
    return [by_n[n] for n in itertools.takewhile(by_n.__contains__, (0, *steps))]


@lru_cache(maxsize=4)
def stage(data: str, scale: str, network: str, start: str, device: str) -> Arena:
    """A data set made ready once per process."""
    return Arena(Path(data), SCALES[scale].size, SCALES[scale].frozen, network, start, device)


@lru_cache(maxsize=4)
def experiment_for(data: str, size: int, network: str, device: str) -> Experiment:
    """A data set made ready for the instant learner, once per process."""
    return Experiment(Path(data), size, network, device)


def choose(trial: Trial, labelled: Sequence[int], count: int) -> Chosen:
    """The strategy's next images, and how they would be prelabelled."""
    start = time.perf_counter()
    images = trial.pick(labelled, count)
    seconds = time.perf_counter() - start
    return Chosen(images, [trial.prelabel(index) for index in images], seconds)


def make_row(curve: Curve, trial: Trial, n: int, picks: Chosen, seconds: float) -> Row:
    """Test what was learnt and write down what it took to get there."""
    arena, table = trial.data, trial.test()
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


def efforts(arena: Arena | Experiment, picks: Chosen) -> tuple[list[Effort], list[Effort]]:
    """Work on the chosen images: from the prelabel, and from an empty image."""
    scratch = [from_scratch(arena.masks[i]) for i in picks.images]
    fixes = [correct(prelabel, arena.masks[i]) for i, prelabel in zip(picks.images, picks.prelabels, strict=True)]
    return fixes, scratch


def full_row(curve: Curve, trial: Trial) -> Row:
    """The reference: the whole pool was learnt, `FULL_STEPS` times as long as usual."""
    seconds = trial.learn(range(len(trial.data.names)), FULL_STEPS)
    row = make_row(curve, trial, len(trial.data.names), Chosen([], [], 0.0), seconds)
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
