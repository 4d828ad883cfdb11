"""Pixels that look alike: the codebook of a pool, and the cluster map of an image."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from model.compiled import compiled, in_slabs

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
#: Pixels assigned at a time, so that their distances stay in the cache.
CHUNK = 512
#: By which excess green of bytes comes into the range of Lab.
EXCESS = 50 / 255
#: Excess green is spread over at least this much of its range where colours can tell plants from soil.
LEAST_SPREAD = 0.05
#: Below this sum of the three channels a pixel is too dark to have a colour.
DARK = 60
#: A cluster is well shown by an image of which it fills this share.
WELL_SHOWN = 0.05
#: Images chosen for coarse labels one by one, each knowing those before it.
GREEDY = 300


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
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    red, green, blue, _ = np.array(cv2.mean(image))
    # The mean of excess green is the excess green of the mean. Not numpy's mean: in float32 it loses digits.
    mean = np.array([*np.array(cv2.mean(lab))[:3], EXCESS * (2 * green - red - blue)])
    found = np.empty((lab.shape[0] * lab.shape[1], 4), np.float32)
    part: Floats = np.asarray(CENTRING * mean, np.float32)
    flat: Floats = np.asarray(lab, np.float32).reshape(-1, 3)
    in_slabs(lambda start, stop: _features(start, stop, flat, image.reshape(-1, 3), part, found), len(found))
    return found


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
        ValueError: there is no sample, or k is not 1 to 255.
    """
    if not len(samples):
        raise ValueError("no pixels to find clusters in")
    if not 1 <= k <= 255:
        raise ValueError(f"{k} clusters do not fit into a map of bytes: 1 to 255 do")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct colours than clusters: no harm
        model = KMeans(min(k, len(samples)), n_init=RESTARTS, random_state=int(rng.integers(2**31))).fit(samples)
    centres = np.unique(np.asarray(model.cluster_centers_, np.float32), axis=0)  # sorted, the darkest first
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
    """(N,) nearest centre, of equally near ones the first; |x|^2 is the same for all centres and left out."""
    weights, offset = -2 * centres, (centres**2).sum(1)
    nearest = np.empty(len(points), np.uint8)
    in_slabs(lambda start, stop: _assign(start, stop, points, weights, offset, nearest), len(points))
    return nearest


def mode_filter(labels: NDArray[np.uint8], k: int) -> NDArray[np.uint8]:
    """(H, W) the most frequent label around each pixel, the image mirrored at its edges; of equals the lowest."""
    best, count = np.zeros(labels.shape, np.uint8), np.zeros(labels.shape, np.uint8)
    for label in range(k):
        here = cv2.boxFilter((labels == label).view(np.uint8), -1, (SMOOTH, SMOOTH), normalize=False)
        np.copyto(best, np.uint8(label), where=here > count)
        np.maximum(count, here, out=count)
    return best


def without_small(labels: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    """(H, W) labels whose pieces below `share` of the image got the label of the nearest larger piece.

    Where all pieces are that small, the largest ones count as large.
    """
    piece = pieces(labels)
    area = np.bincount(piece.ravel())
    small = (area < min(share * labels.size, area.max()))[piece]
    if not small.any():
        return labels
    _, nearest = cv2.distanceTransformWithLabels(small.view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    table = np.zeros(int(nearest.max()) + 1, np.uint8)
    table[nearest[~small]] = labels[~small]
    return np.asarray(table[nearest], np.uint8)


def pieces(labels: NDArray[np.integer]) -> NDArray[np.int32]:
    """(H, W) number of the piece of equal labels, 8-connected, that each pixel is in; all labels in one pass."""
    found = np.empty(labels.shape, np.int32)
    _pieces(np.ascontiguousarray(labels), found)
    return found


@compiled
def _features(start: int, stop: int, lab: Floats, image: Image, part: Floats, found: Floats) -> None:
    for x in range(start, stop):
        found[x, 0] = lab[x, 0] - part[0]
        found[x, 1] = lab[x, 1] - part[1]
        found[x, 2] = lab[x, 2] - part[2]
        excess = 2 * np.int32(image[x, 1]) - np.int32(image[x, 0]) - np.int32(image[x, 2])
        found[x, 3] = np.float32(EXCESS) * np.float32(excess) - part[3]


@compiled
def _assign(start: int, stop: int, points: Floats, weights: Floats, offset: Floats, nearest: NDArray[np.uint8]) -> None:
    least, best = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32)
    for first in range(start, stop, CHUNK):
        size = min(CHUNK, stop - first)
        for k in range(weights.shape[0]):
            a, b, c, d = weights[k, 0], weights[k, 1], weights[k, 2], weights[k, 3]
            for x in range(size):
                point = points[first + x]
                away = offset[k] + a * point[0] + b * point[1] + c * point[2] + d * point[3]
                nearer = k == 0 or away < least[x]
                best[x] = np.int32(k) if nearer else best[x]
                least[x] = away if nearer else least[x]
        for x in range(size):
            nearest[first + x] = np.uint8(best[x])


@compiled
def _pieces(labels: NDArray[np.integer], found: NDArray[np.int32]) -> None:
    """Union-find: each pixel joins the neighbours above and to the left that have its label."""
    height, width = labels.shape
    parent = np.empty(height * width, np.int32)  # of provisional numbers; the lowest one is the root
    count = 0
    number: Any
    for y in range(height):
        for x in range(width):
            label = labels[y, x]
            left = x > 0 and labels[y, x - 1] == label
            if y > 0 and labels[y - 1, x] == label:  # its other neighbours have joined it already
                found[y, x] = found[y - 1, x]
                continue
            number = np.int32(-1)
            if left:
                number = found[y, x - 1]
            elif y > 0 and x > 0 and labels[y - 1, x - 1] == label:
                number = found[y - 1, x - 1]
            if y > 0 and x < width - 1 and labels[y - 1, x + 1] == label:
                other = found[y - 1, x + 1]
                number = other if number < 0 else _joined(parent, number, other)
            if number < 0:
                number = np.int32(count)
                parent[count] = number
                count += 1
            found[y, x] = number
    final = np.int32(0)
    for number in range(count):  # roots come before those that joined them
        if parent[number] == number:
            parent[number] = final
            final += np.int32(1)
        else:
            parent[number] = parent[parent[number]]
    for y in range(height):
        for x in range(width):
            found[y, x] = parent[found[y, x]]


@compiled
def _joined(parent: NDArray[np.int32], one: Any, other: Any) -> Any:
    """The common root of two pieces that touch."""
    while parent[one] != one:
        parent[one] = parent[parent[one]]
        one = parent[one]
    while parent[other] != other:
        parent[other] = parent[parent[other]]
        other = parent[other]
    root = min(one, other)
    parent[one] = root
    parent[other] = root
    return root


def vegetation_guess(image: Image, clusters: NDArray[np.uint8], k: int) -> NDArray[np.float64] | None:
    """Share of each cluster that is green by excess green and Otsu's threshold.

    Args:
        image: (H, W, 3) RGB.
        clusters: (H, W) cluster map.
        k: number of clusters.

    Returns:
        (k,) 0..1, NaN for absent clusters; None where the image's colours do not fall into green and not green.
    """
    calm = smoothed(image).astype(np.float32)
    green = (calm @ np.array([-1, 2, -1], np.float32)) / np.maximum(calm.sum(2), DARK)
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
    shown = np.minimum(counts / np.maximum(counts.sum(1, keepdims=True), 1) / WELL_SHOWN, 1.0)
    worth = counts.sum(0) / max(counts.sum(), 1) * np.prod(1 - 0.5 * shown[list(chosen)], axis=0)
    left = np.ones(len(counts), bool)
    left[list(chosen)] = False
    order: list[int] = []
    for _ in range(min(n, GREEDY, int(left.sum()))):
        order.append(int(np.where(left, shown @ worth, -1).argmax()))
        left[order[-1]] = False
        worth = worth * (1 - 0.5 * shown[order[-1]])
    rest = np.flatnonzero(left)
    rest = rest[np.argsort(-(shown[rest] @ worth), kind="stable")]
    return np.array([*order, *rest], np.intp)[:n]
