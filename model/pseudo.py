"""Clusters and people's votes -> a set of fine classes per pixel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.classes import IGNORE, MIXED, UNKNOWN, Classes


def cluster_votes(clusters: NDArray[np.uint8], coarse: NDArray[np.uint8], k: int, num_coarse: int) -> NDArray[np.int64]:
    """What one image's coarse mask says about each cluster.

    Args:
        clusters: (H, W) cluster of every pixel, below k.
        coarse: (H, W) coarse class, MIXED or UNKNOWN.
        k: number of clusters.
        num_coarse: number of coarse classes.

    Returns:
        (k,) the answer given to most pixels of the cluster: a coarse class, MIXED, or UNKNOWN for a cluster that is
        absent or without a label.

    Raises:
        ValueError: sizes differ.
    """
    if clusters.shape != coarse.shape:
        raise ValueError(f"clusters are {clusters.shape}, the coarse mask is {coarse.shape}")
    answers = np.array([*range(num_coarse), MIXED, UNKNOWN])
    column = np.full(256, num_coarse + 1)
    column[answers] = np.arange(num_coarse + 2)
    counts = np.bincount(
        clusters.ravel().astype(np.int64) * (num_coarse + 2) + column[coarse].ravel(), minlength=k * (num_coarse + 2)
    ).reshape(k, num_coarse + 2)
    votes = answers[counts.argmax(1)]
    votes[counts.sum(1) == 0] = UNKNOWN
    return np.asarray(votes, np.int64)


def decide(votes: NDArray[np.integer]) -> NDArray[np.uint8]:
    """What the votes of many images agree on.

    Args:
        votes: (T, k) as from `cluster_votes`.

    Returns:
        (k,) the coarse class that all votes name; MIXED when they differ or one says so; UNKNOWN without a vote.
    """
    decided = np.full(votes.shape[1], UNKNOWN, np.uint8)
    for cluster, column in enumerate(votes.T):
        said = np.unique(column[column != UNKNOWN])
        if said.size:
            decided[cluster] = said[0] if said.size == 1 else MIXED
    return decided


def pseudo_ground_truth(
    clusters: NDArray[np.uint8], decided: NDArray[np.uint8], own: NDArray[np.uint8] | None, classes: Classes
) -> NDArray[np.uint8]:
    """The set of fine classes that each pixel may have.

    Args:
        clusters: (H, W) cluster of every pixel.
        decided: (k,) coarse class of each cluster, MIXED or UNKNOWN.
        own: (H, W) coarse mask that a person gave this very image; wins where it is not UNKNOWN.
        classes: fine and coarse classes.

    Returns:
        (H, W) rows of `classes.sets()`; MIXED and UNKNOWN allow any class, so that they pull the network nowhere.

    Raises:
        ValueError: sizes differ.
    """
    coarse = decided[clusters]
    if own is not None:
        if own.shape != clusters.shape:
            raise ValueError(f"clusters are {clusters.shape}, the image's own coarse mask is {own.shape}")
        coarse = np.where(own == UNKNOWN, coarse, own)
    rows = np.full(256, classes.any_row, np.uint8)
    rows[: len(classes.coarse)] = [classes.coarse_row(g) for g in range(len(classes.coarse))]
    return rows[coarse]


def fine_target(mask: NDArray[np.uint8], classes: Classes) -> NDArray[np.uint8]:
    """An annotation mask as rows of `classes.sets()`.

    Args:
        mask: (H, W) fine class of every pixel, IGNORE where nothing is known.
        classes: fine and coarse classes.

    Returns:
        (H, W) the row of that one class; any class for IGNORE.

    Raises:
        ValueError: the mask has a class that is not there.
    """
    known = mask != IGNORE
    if known.any() and int(mask[known].max()) >= len(classes.fine):
        raise ValueError(f"the mask has class {mask[known].max()}, but there are only {len(classes.fine)}")
    return np.where(known, mask, classes.any_row).astype(np.uint8)
