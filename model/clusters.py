"""Pixels that look alike: the codebook of a pool, and the cluster map of an image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

Floats = NDArray[np.float32]
Image = NDArray[np.uint8]

#: Clusters of a pool: enough to keep thin and pale plants apart from soil, few enough for a person to look at.
DEFAULT_K = 12
#: Restarts of k-means; with one the inertia is up to 28 % worse.
RESTARTS = 5
#: Side of the square whose most frequent cluster a pixel gets, and the least share of the image a piece must have.
SMOOTH, SMALLEST = 5, 0.0005
#: Weight of an image's own mean colour in its pixels' features: part of the light of a day is taken out.
CENTRING = 0.5
#: Pixels of one image that its own clusters are fitted to.
SAMPLE = 20_000
#: Excess green is spread over at least this much of its range where colours can tell plants from soil.
LEAST_SPREAD = 0.05


@dataclass(frozen=True)
class Codebook:
    """Cluster centres in feature space.

    Attributes:
        centres: (k, 4) float32.
        version: names the centres; equal centres, equal version.
    """

    centres: Floats
    version: str

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"centres": self.centres.tolist(), "version": self.version}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Codebook:
        """The inverse of `to_json`."""
        return cls(np.array(row["centres"], np.float32), str(row["version"]))


def features(image: Image) -> Floats:
    """Colour of every pixel: Lab and excess green, partly centred on the image's mean.

    Args:
        image: (H, W, 3) RGB.

    Returns:
        (H * W, 4) float32; L and a, b in CIE units, excess green (2G - R - B) in the same range.
    """
    scaled = image.astype(np.float32) / 255
    lab = cv2.cvtColor(scaled, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    green = (scaled @ np.array([-1, 2, -1], np.float32)).reshape(-1, 1) * 50
    found = np.hstack([lab, green])
    return np.asarray(found - CENTRING * found.mean(0, keepdims=True), np.float32)


def sample_pixels(image: Image, n: int, rng: np.random.Generator) -> Floats:
    """(n, 4) features of pixels drawn from an image; fewer when it has fewer."""
    found = features(smoothed(image))
    return found if len(found) <= n else found[rng.choice(len(found), n, replace=False)]


def fit(samples: Floats, k: int, rng: np.random.Generator) -> Codebook:
    """The clusters of sampled pixels.

    Args:
        samples: (N, 4) from `sample_pixels`, of one image or many.
        k: clusters; fewer come out when there are fewer distinct colours.
        rng: of the restarts.

    Raises:
        ValueError: there is no sample.
    """
    if not len(samples):
        raise ValueError("no pixels to find clusters in")
    distinct = len(np.unique(samples, axis=0))
    model = KMeans(min(k, distinct), n_init=RESTARTS, random_state=int(rng.integers(2**31))).fit(samples)
    centres = np.asarray(model.cluster_centers_, np.float32)
    centres = centres[np.argsort(centres[:, 0])]
    return Codebook(centres, hashlib.sha1(centres.tobytes()).hexdigest()[:12])


def fit_image(image: Image, k: int, rng: np.random.Generator) -> Codebook:
    """The clusters of one image by itself."""
    return fit(sample_pixels(image, SAMPLE, rng), k, rng)


def cluster_map(image: Image, codebook: Codebook) -> NDArray[np.uint8]:
    """The cluster of every pixel: nearest centre, smoothed, without small pieces.

    Args:
        image: (H, W, 3) RGB.
        codebook: k centres.

    Returns:
        (H, W) below k.
    """
    labels = assign(features(smoothed(image)), codebook.centres).reshape(image.shape[:2])
    return without_small(mode_filter(labels, len(codebook.centres)), SMALLEST)


def smoothed(image: Image) -> Image:
    """The image without the grain of sensor and soil."""
    return np.asarray(cv2.medianBlur(image, SMOOTH), np.uint8)


def assign(points: Floats, centres: Floats) -> NDArray[np.uint8]:
    """(N,) nearest centre; |x|^2 is the same for all centres and left out."""
    return np.asarray((points @ (-2 * centres.T) + (centres**2).sum(1)).argmin(1), np.uint8)


def mode_filter(labels: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """(H, W) the most frequent label around each pixel; of equally frequent ones the lowest."""
    best, count = np.zeros(labels.shape, np.uint8), np.full(labels.shape, -1.0, np.float32)
    for label in range(k):
        here = cv2.boxFilter((labels == label).astype(np.float32), -1, (SMOOTH, SMOOTH), normalize=False)
        wins = here > count + 0.5
        best[wins], count[wins] = label, here[wins]
    return best


def without_small(labels: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    """(H, W) labels whose pieces below `share` of the image got the label of the nearest larger piece."""
    small = np.zeros(labels.shape, np.uint8)
    for label in np.unique(labels):
        _, pieces, stats, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=8)
        tiny = stats[:, cv2.CC_STAT_AREA] < share * labels.size
        tiny[0] = False
        small |= tiny[pieces].astype(np.uint8)
    if not small.any() or small.all():
        return labels
    _, nearest = cv2.distanceTransformWithLabels(small, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    table = np.zeros(int(nearest.max()) + 1, np.uint8)
    table[nearest[small == 0]] = labels[small == 0]
    return np.asarray(np.where(small == 0, labels, table[nearest]), np.uint8)


def vegetation_guess(image: Image, clusters: NDArray[np.uint8], k: int) -> NDArray[np.float64] | None:
    """Share of each cluster that is green by excess green and Otsu's threshold.

    Args:
        image: (H, W, 3) RGB.
        clusters: (H, W) cluster map.
        k: number of clusters.

    Returns:
        (k,) 0..1, NaN for absent clusters; None where the image's colours do not fall into green and not green.
    """
    total = np.maximum(image.sum(2, dtype=np.float32), 1)
    green = (image.astype(np.float32) @ np.array([-1, 2, -1], np.float32)) / total
    scaled = np.clip((green + 0.5) * 255, 0, 255).astype(np.uint8)
    _, plants = cv2.threshold(scaled, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    inside, outside = green[plants == 1], green[plants == 0]
    if not inside.size or not outside.size or inside.mean() - outside.mean() < LEAST_SPREAD or inside.mean() < 0:
        return None
    pixels = np.bincount(clusters.ravel(), minlength=k)[:k].astype(float)
    found = np.bincount(clusters.ravel(), weights=plants.ravel(), minlength=k)[:k]
    return np.asarray(np.divide(found, pixels, out=np.full(k, np.nan), where=pixels > 0))


def cover(counts: NDArray[np.integer], chosen: Sequence[int], n: int) -> NDArray[np.intp]:
    """Images whose coarse labels tell most about the pool.

    An image shows a cluster in so far as the cluster fills it: the first time a cluster is well shown counts with the
    cluster's share of the pool, each further time half as much as the time before.

    Args:
        counts: (T, k) pixels of each cluster in each image.
        chosen: images that have a label already.
        n: length of the answer; at most the images that are left are returned.

    Returns:
        Image indices, the most telling one first, without those chosen before.
    """
    shown = np.minimum(counts / np.maximum(counts.sum(1, keepdims=True), 1) / 0.05, 1.0)
    worth = counts.sum(0) / max(counts.sum(), 1)
    worth = worth * np.prod(1 - 0.5 * shown[list(chosen)], axis=0)
    left = [i for i in range(len(counts)) if i not in set(chosen)]
    order: list[int] = []
    while left and len(order) < n:
        best = max(left, key=lambda i: float(shown[i] @ worth))
        worth = worth * (1 - 0.5 * shown[best])
        order.append(best)
        left.remove(best)
    return np.array(order, np.intp)
