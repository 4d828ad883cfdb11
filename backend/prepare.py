"""Images -> cluster maps, and people's votes -> what each cluster means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from backend.context import Context
from backend.enqueue import progress
from backend.errors import MaskError
from backend.faults import concerns_all, due, noted
from backend.label_config import ProjectConfig
from backend.project import Index, Project, TaskRecord, labelled
from backend.sync import read_task
from model.classes import UNKNOWN
from model.clusters import (
    DEFAULT_K,
    cluster_map,
    fit,
    fit_image,
    sample_pixels,
)
from model.pseudo import decide, image_votes, pseudo_ground_truth

#: The codebook is fitted to this many pixels of this many images; more changes the centres less than a restart does.
#: The scaling of features and the kinds of pixels are made from as many images.
SAMPLE_IMAGES, SAMPLE_PIXELS = 200, 500
#: Most images that are tried for it, and seconds that are spent on them.
SAMPLE_TRIES, SAMPLE_SECONDS = 600, 1200.0
#: The codebook is fitted again when the pool has grown by this factor: new fields bring new colours.
GROWTH = 2.0
T = TypeVar("T")


def codebook_is_stale(project: Project, tasks: int) -> bool:
    """Whether there is no codebook yet, or the pool has outgrown it."""
    saved = project.store.read_json(project.key("codebook.json"))
    return not saved or tasks > GROWTH * max(saved["tasks"], 1)


def fit_codebook(ctx: Context, project: Project, index: Index) -> None:
    """Fit the pool's clusters to a bounded sample of its pixels and keep them."""
    rng = np.random.default_rng(project.id)
    taken = sampled(ctx, project, index, rng, lambda image: sample_pixels(image, SAMPLE_PIXELS, rng))
    samples = [pixels for _, pixels in taken]
    if samples:
        book = fit(np.concatenate(samples), DEFAULT_K, rng)
        ctx.board.go_on(project.id)
        project.store.write_json(project.key("codebook.json"), {"codebook": book.to_json(), "tasks": len(index)})


def sampled(
    ctx: Context, project: Project, index: Index, rng: np.random.Generator, take: Callable[[NDArray[np.uint8]], T]
) -> Iterator[tuple[TaskRecord, T]]:
    """A bounded sample of the project's images, with what `take` gives of each; those that cannot be had are left out.

    Their faults are noted in their tasks' records when each is prepared.
    """
    usable = [i for i in sorted(index) if not index[i].error or due(index[i])]
    ids = sorted(rng.permutation(usable or sorted(index)), key=lambda task: index[int(task)].tries)[:SAMPLE_TRIES]
    images, found, until = ctx.images(project.id), 0, time.monotonic() + SAMPLE_SECONDS
    for task in ids:
        record = index[int(task)]
        try:
            image, _ = images.get(project.id, record.id, record.image)
            taken = take(image)
        except Exception as error:
            if concerns_all(error, ctx.studio):
                raise
        else:
            found += 1
            yield record, taken
        progress(found, min(len(ids), SAMPLE_IMAGES))
        if found == SAMPLE_IMAGES or time.monotonic() > until:
            return


def prepare_task(
    ctx: Context, project: Project, config: ProjectConfig, record: TaskRecord, read: bool
) -> TaskRecord | None:
    """Read a person's labels of the task if they may have changed, and make its cluster map if there is none.

    Returns:
        The record, or None when the task is gone. A fault of this task alone is left in `record.error`.
    """
    failed, unread = bool(record.error), read
    try:
        if read:
            fresh = read_task(ctx, project, config, record)
            if fresh is None or fresh.error:
                return fresh
            record, unread = fresh, False
        clusters = clusters_name(ctx, project)
        ready = has_map(record, clusters) and project.store.exists(project.cluster_key(clusters, record.id))
        if clusters and not ready:
            return cluster_task(ctx, project, record, clusters)
        if failed or not clusters:  # does what was wrong with its image still hold?
            ctx.images(project.id).get(project.id, record.id, record.image)
        return record
    except Exception as error:
        now = noted(ctx.studio, project.id, record, error)
    # Until its time has come, only a change makes it be read again.
    return replace(now, updated_at=ctx.studio.updated_at(project.id, record.id)) if unread else now


def clusters_name(ctx: Context, project: Project) -> str:
    """Names the clusters in force: the codebook's version, or the way of clustering each image by itself."""
    if ctx.settings.clusters == "image":
        return f"image-{DEFAULT_K}"
    book = project.codebook()
    return book.version if book else ""


def cluster_task(ctx: Context, project: Project, record: TaskRecord, clusters: str) -> TaskRecord:
    """Make and keep the cluster map of one image."""
    image, size = ctx.images(project.id).get(project.id, record.id, record.image)
    book = project.codebook() if ctx.settings.clusters == "codebook" else None
    book = book or fit_image(image, DEFAULT_K, np.random.default_rng(record.id))
    labels = cluster_map(image, book)
    project.store.write_map(project.cluster_key(clusters, record.id), labels)
    return replace(record, size=size, clusters=clusters, counts=count_clusters(labels))


def has_map(record: TaskRecord, clusters: str) -> bool:
    """Whether its record says that a task has a cluster map of these clusters."""
    return record.size != (0, 0) and record.clusters == clusters


def count_votes(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> NDArray[np.uint8]:
    """Count the votes of everything that people have labelled, and keep the outcome.

    Clusters that nobody named in a coarse label are named by full annotations where those agree. With clusters of
    each image by itself there is nothing to vote on: only the image's own labels count.

    Returns:
        (k,) coarse class of each cluster, MIXED or UNKNOWN.
    """
    clusters = clusters_name(ctx, project)
    if ctx.settings.clusters == "image" or not clusters:
        return np.full(DEFAULT_K, UNKNOWN, np.uint8)
    voters = [record for record in index.values() if record.coarse and not record.error]
    decided = tally(votes_of(project, r, clusters, project.own_coarse(r, config), config) for r in voters)
    if (decided == UNKNOWN).any():
        full = tally(votes_of(project, r, clusters, implied(project, r, config), config) for r in labelled(index))
        decided = np.where(decided == UNKNOWN, full, decided).astype(np.uint8)
    project.save_votes(decided, len(voters), config)
    return decided


def tally(votes: Iterable[NDArray[np.int64]]) -> NDArray[np.uint8]:
    """(k,) what the votes agree on."""
    return np.asarray(decide(np.array(list(votes), np.int64).reshape(-1, DEFAULT_K)), np.uint8)


def implied(project: Project, record: TaskRecord, config: ProjectConfig) -> NDArray[np.uint8] | None:
    """(H, W) the coarse mask that a full annotation implies."""
    fine = project.labels(record.id, config)
    return None if fine is None else config.classes.coarse_table()[fine]


def votes_of(
    project: Project, record: TaskRecord, clusters: str, own: NDArray[np.uint8] | None, config: ProjectConfig
) -> NDArray[np.int64]:
    """(k,) what one task's labels say about each cluster; clusters that hardly occur in it say nothing."""
    labels = project.store.read_map(project.cluster_key(clusters, record.id))
    if labels is None or own is None or labels.shape != own.shape:  # of another picture: one of them is made anew
        return np.full(DEFAULT_K, UNKNOWN)
    return np.asarray(image_votes(labels, own, DEFAULT_K, len(config.classes.coarse)), np.int64)


def check_shape(record: TaskRecord, mask: NDArray[np.uint8], size: tuple[int, ...]) -> None:
    """Refuse labels (H, W) that are not of an image of this height and width.

    Raises:
        MaskError: naming the task.
    """
    if mask.shape != size:
        raise MaskError(
            f"the labels of task {record.id} are for an image of another shape: restore the image, or label it anew"
        )


def target_of(
    project: Project, record: TaskRecord, clusters: str, decided: NDArray[np.uint8], config: ProjectConfig
) -> NDArray[np.uint8] | None:
    """(H, W) pseudo ground truth of a pool task as rows of `Classes.sets`; None before it has clusters."""
    labels = project.store.read_map(project.cluster_key(clusters, record.id))
    own = project.own_coarse(record, config)
    if labels is None:
        return None
    own = own if own is not None and own.shape == labels.shape else None
    return np.asarray(pseudo_ground_truth(labels, decided, own, config.classes), np.uint8)


def histograms(records: Iterable[TaskRecord], clusters: str) -> NDArray[np.int64]:
    """(T, k) pixels of each cluster in each task; zeros where a task has no cluster map."""
    nothing = (0,) * DEFAULT_K
    rows = [record.counts if record.clusters == clusters else nothing for record in records]
    return np.array(rows, np.int64).reshape(-1, DEFAULT_K)


def count_clusters(labels: NDArray[np.uint8]) -> tuple[int, ...]:
    """(k,) pixels of each cluster in a cluster map."""
    return tuple(np.bincount(labels.ravel(), minlength=DEFAULT_K)[:DEFAULT_K].tolist())
