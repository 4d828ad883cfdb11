"""Decoding, clusters and masks beside the straight way to do each."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from label_studio_sdk.converter import brush
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.cluster import KMeans

from backend.perf import Item, compare, processor
from backend.rle import decode_rle, encode_rle
from model.clusters import (
    DEFAULT_K,
    SMALLEST,
    SMOOTH,
    Codebook,
    cluster_map,
    features,
    fit_image,
    smoothed,
)
from model.data import decode
from model.field import render

#: Width and height of a photograph of 12 megapixels, of the images that are clustered, of those that are scored.
PHOTOGRAPH, CLUSTERED, WORK = (4000, 3000), (1296, 966), 640
ROUNDS = 7


def items() -> Iterator[Item]:
    """Every figure about images and masks."""
    yield decode_item()
    yield from cluster_items()
    yield from rle_items()


def decode_item() -> Item:
    """A large photograph at work resolution."""
    file = io.BytesIO()
    Image.fromarray(cv2.resize(render(1, "source", (1000, 750))[0], PHOTOGRAPH)).save(file, "JPEG", quality=90)
    data = file.getvalue()
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: decode(data, WORK),
        "full": lambda: np.array(Image.open(io.BytesIO(data)).convert("RGB").resize((640, 480))),
    }
    return compare(calls, ROUNDS, processor()).item("decode/full 12 MP", 0.30, "ours", "full", "full decode, resize")


def cluster_items() -> Iterator[Item]:
    """The cluster map of an image, with the pool's codebook and with a fit of its own."""
    image, rng = render(2, "source", CLUSTERED)[0], np.random.default_rng(0)
    book = fit_image(image, DEFAULT_K, rng)
    calls: dict[str, Callable[[], object]] = {
        "codebook": lambda: cluster_map(image, book),
        "fit": lambda: cluster_map(image, fit_image(image, DEFAULT_K, np.random.default_rng(0))),
        "straight": lambda: straight_map(image),
    }
    times = compare(calls, ROUNDS, processor())
    said = f"k = {DEFAULT_K}, {CLUSTERED[0]}x{CLUSTERED[1]}: scikit-learn and scipy"
    yield times.item("clusters/straight codebook", 0.18, "codebook", "straight", said)
    yield times.item("clusters/straight fit", 0.60, "fit", "straight", said)


def straight_map(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fit, assign, smooth, remove small pieces: each step by the library call that comes to mind first."""
    points = features(smoothed(image))
    model = KMeans(DEFAULT_K, n_init=10, random_state=0).fit(points[::60])
    return straight_clean(model.predict(points).reshape(image.shape[:2]))


def straight_clean(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The most frequent label around each pixel, then small pieces to their nearest neighbour."""
    around = [ndimage.uniform_filter((labels == k).astype(np.float32), SMOOTH) for k in range(DEFAULT_K)]
    labels, small = np.argmax(around, 0), np.zeros(labels.shape, bool)
    for k in range(DEFAULT_K):
        piece, count = ndimage.label(labels == k, np.ones((3, 3)))
        area = np.bincount(piece.ravel(), minlength=count + 1)
        small |= (piece > 0) & (area < SMALLEST * labels.size)[piece]
    rows, columns = ndimage.distance_transform_edt(small, return_distances=False, return_indices=True)
    return np.asarray(labels[rows, columns], np.uint8)


def rle_items() -> Iterator[Item]:
    """Masks to brush bytes and back, beside the SDK; and with the JSON around them."""
    image = render(2, "source", CLUSTERED)[0]
    book: Codebook = fit_image(image, 6, np.random.default_rng(0))
    mask = cluster_map(image, book) % 2 == 1
    white = mask.astype(np.uint8) * 255
    bytes_ = encode_rle(mask)
    listed = bytes_.tolist()
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: encode_rle(mask),
        "sdk encode": lambda: brush.mask2rle(white),  # type: ignore[no-untyped-call]
        "decode": lambda: decode_rle(bytes_, mask.shape),
        "sdk decode": lambda: brush.decode_rle(listed),
    }
    times = compare(calls, ROUNDS, processor())
    yield times.item("rle-encode/sdk", 0.05, "encode", "sdk encode")
    yield times.item("rle-decode/sdk", 0.05, "decode", "sdk decode")
