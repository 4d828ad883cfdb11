"""Coarse labels of a pool as a person would give them, played from hidden masks: a benchmark's n = 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.classes import IGNORE, MIXED, UNKNOWN, Classes
from model.clusters import DEFAULT_K, cluster_map, cover, fit, sample_pixels, vegetation_guess
from model.effort import CLICK, OPEN
from model.pseudo import decide, image_votes, pseudo_ground_truth

Map = NDArray[np.uint8]

#: Images that get coarse labels, as many as a live project asks for.
ASKED = 5
#: Pixels of each image that the codebook is fitted to.
PIXELS = 500


@dataclass(frozen=True)
class CoarseLabels:
    """What coarse labels of a few images say about the whole pool.

    Attributes:
        targets: per image (H, W) rows of `Classes.sets()`.
        clicks: clusters whose guess had to be changed.
        seconds: a person's work on them.
        asked: the images, by index.
    """

    targets: list[Map]
    clicks: int
    seconds: float
    asked: list[int]


def label_coarsely(images: Sequence[Map], masks: Sequence[Map], classes: Classes, seed: int = 0) -> CoarseLabels:
    """Cluster a pool, ask for coarse labels of the images that cover it best, vote.

    Args:
        images: (H, W, 3) each.
        masks: (H, W) hidden fine classes, IGNORE where unknown.
        classes: fine and coarse classes.
        seed: of the codebook.
    """
    rng = np.random.default_rng(seed)
    book = fit(np.concatenate([sample_pixels(image, PIXELS, rng) for image in images]), DEFAULT_K, rng)
    k = len(book.centres)
    maps = [cluster_map(image, book) for image in images]
    asked = [int(i) for i in cover(np.array([np.bincount(m.ravel(), minlength=k)[:k] for m in maps]), (), ASKED)]
    own = {i: answers(maps[i], masks[i], classes, k) for i in asked}
    clicks = sum(wrong_guesses(images[i], maps[i], own[i], k, len(classes.coarse)) for i in asked)
    votes = np.array([image_votes(maps[i], own[i], k, len(classes.coarse)) for i in asked])
    decided = decide(votes)
    targets = [pseudo_ground_truth(labels, decided, own.get(i), classes) for i, labels in enumerate(maps)]
    return CoarseLabels(targets, clicks, OPEN * len(asked) + CLICK * clicks, asked)


def answers(clusters: Map, mask: Map, classes: Classes, k: int) -> Map:
    """(H, W) the coarse class of most of each cluster's known pixels, UNKNOWN where none is known."""
    known, coarse = mask != IGNORE, classes.coarse_table()[mask].astype(np.intp)
    table = np.bincount(clusters[known] * len(classes.coarse) + coarse[known], minlength=k * len(classes.coarse))
    table = table.reshape(k, len(classes.coarse))
    return np.where(table.any(1), table.argmax(1), UNKNOWN).astype(np.uint8)[clusters]


def wrong_guesses(image: Map, clusters: Map, own: Map, k: int, num_coarse: int) -> int:
    """How many of an image's clusters were guessed wrong: by greenness where there are two classes, else the first."""
    green = vegetation_guess(image, clusters, k) if num_coarse == 2 else None
    guess = np.zeros(k, np.intp) if green is None else (np.nan_to_num(green) > 0.5).astype(np.intp)
    truth = np.array([own[clusters == c][0] if (clusters == c).any() else UNKNOWN for c in range(k)])
    return int(((truth != UNKNOWN) & (truth != MIXED) & (truth != guess)).sum())
