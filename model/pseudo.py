"""Clusters and people's votes -> a set of fine classes per pixel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.classes import IGNORE, MIXED, UNKNOWN, Classes

#: A region smaller than this share of an image says little about what its cluster is.
SMALLEST_VOTE = 0.001


def cluster_votes(clusters: NDArray[np.uint8], coarse: NDArray[np.uint8], k: int, num_coarse: int) -> NDArray[np.int64]:
    """What one image's coarse mask says about each cluster.

    Args:
        clusters: (H, W) cluster of every pixel, below k.
        coarse: (H, W) coarse class, MIXED or UNKNOWN.
        k: number of clusters.
        num_coarse: number of coarse classes.

    Returns:
        (k,) the answer given to most pixels of the cluster: a coarse class, MIXED, or UNKNOWN for a cluster that is
        absent or mostly without a label. Of equal counts the first in that order.

    Raises:
        ValueError: sizes differ, or there is a cluster or a coarse class that is not known.
    """
    if clusters.shape != coarse.shape:
        raise ValueError(f"clusters are {clusters.shape}, the coarse mask is {coarse.shape}")
    answers = np.array([*range(num_coarse), MIXED, UNKNOWN])
    cells = clusters.ravel().astype(np.intp) * 256 + coarse.ravel()
    table = np.bincount(cells, minlength=256**2).reshape(256, 256)
    check(table.sum(1), k, "cluster")
    check(np.delete(table.sum(0), [MIXED, UNKNOWN]), num_coarse, "coarse class")
    # An absent cluster has zeros only: the first answer would win.
    return np.where(table[:k].any(1), answers[table[:k, answers].argmax(1)], UNKNOWN)


def image_votes(clusters: NDArray[np.uint8], coarse: NDArray[np.uint8], k: int, num_coarse: int) -> NDArray[np.int64]:
    """The same as `cluster_votes`, but clusters that hardly occur in the image say nothing."""
    votes = cluster_votes(clusters, coarse, k, num_coarse)
    votes[np.bincount(clusters.ravel(), minlength=k)[:k] < SMALLEST_VOTE * clusters.size] = UNKNOWN
    return votes


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
        ValueError: sizes differ, or there is a cluster or a coarse class that is not known.
    """
    check(np.bincount(clusters.ravel()), len(decided), "cluster")
    coarse = decided[clusters]
    if own is not None:
        if own.shape != clusters.shape:
            raise ValueError(f"clusters are {clusters.shape}, the image's own coarse mask is {own.shape}")
        coarse = np.where(own == UNKNOWN, coarse, own)
    check(np.bincount(coarse.ravel(), minlength=256)[:MIXED], len(classes.coarse), "coarse class")
    rows = np.full(256, classes.any_row, np.uint8)
    rows[: len(classes.coarse)] = [classes.coarse_row(g) for g in range(len(classes.coarse))]
    return rows[coarse]


def check(counts: NDArray[np.integer], known: int, what: str) -> None:
    """Refuse pixel counts at or above the number of what is known.

    Raises:
        ValueError: one is there.
    """
    beyond = np.flatnonzero(counts[known:])
    if beyond.size:
        raise ValueError(f"there is a {what} {known + beyond[0]}, but only {known} are known")


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
