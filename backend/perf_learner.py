"""The instant learner on one core: features, masks, sums, the solve, scores from stored features, the order."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise

import cv2
import numba
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from backend.perf import ROUNDS, Call, Item, compare, processor, ratio
from backend.perf_scoring import CLASSES, SIZE
from model.clusters import DEFAULT_K, cluster_map, fit_image
from model.data import decode_sized
from model.features import Extractor, Scaling, fit_scaling, spread_pixels
from model.field import render
from model.heads import Head, LabelledPixels, choose_pixels, fit, no_sums
from model.instant import LABELLED, left_out_of
from model.kinds import COMPONENTS, Kinds, Tables, fit_kinds
from model.masks import predict
from model.pixel_pool import PIXELS, FirstRow, opinions
from model.pixel_scores import score_pool

#: Backbones, and how many rounds each gets. Random weights take as long as pretrained ones.
NETWORKS = {"lraspp_efficientnet_lite0": 25, "lraspp_mobilenet_v3_large": 25, "deeplabv3_resnet50": 7}
#: Whose features the rest is measured with; its weights need no download.
SHIPPED = "lraspp_efficientnet_lite0"
#: Images whose features are scored, and that were labelled before.
SCORED, ANNOTATED = 1_000, 20
#: Pools that are ordered, each ten times the one before.
POOLS = (1_000, 10_000, 100_000)


def items() -> Iterator[Item]:
    """Every figure of the learner, per core."""
    setters: tuple[Callable[[int], None], ...] = torch.set_num_threads, cv2.setNumThreads, numba.set_num_threads
    before = torch.get_num_threads(), cv2.getNumThreads(), numba.get_num_threads()
    for limit in setters:
        limit(1)
    try:
        for name, rounds in NETWORKS.items():
            yield features_item(name, rounds)
        yield from image_items()
        yield from number_items()
        yield from order_items()
    finally:
        for limit, threads in zip(setters, before, strict=True):
            limit(threads)


def one_core() -> str:
    """What the figures are of."""
    return f"{processor().partition(',')[0]}, one thread"


def within(name: str, seconds: float, call: Call, said: str) -> Item:
    """A call beside the seconds that it may take."""
    taken = compare({"ours": call}, ROUNDS, one_core()).seconds["ours"]
    return ratio(f"{name}/{seconds:g}s", 1.0, taken / seconds, f"{seconds:g} s for {said}", one_core())


def picture(number: int = 0) -> NDArray[np.uint8]:
    """A field of `SIZE`."""
    return render(number, "source", SIZE)[0]


def features_item(name: str, rounds: int) -> Item:
    """All taps and sampling beside the bare backbone, batch norms folded, channels last."""
    sees, image = Extractor(name, "cpu", pretrained=False), picture()
    places = spread_pixels((SIZE[1], SIZE[0]), PIXELS)

    @torch.inference_mode()
    def forward() -> object:
        x = torch.from_numpy(image[None]).permute(0, 3, 1, 2).float().div_(255)
        for stage in sees.stages:
            x = stage(x)
        return x

    calls: dict[str, Call] = {"features": lambda: next(sees.sample([image], [places])), "forward": forward}
    times = compare(calls, rounds, one_core())
    return times.item(
        f"features/forward {name}", 1.10, "features", "forward", "folded channels-last forward, one image"
    )


def image_items() -> Iterator[Item]:
    """What an image costs at attach, and its prelabel afterwards."""
    sees, image = Extractor(SHIPPED, "cpu"), picture()
    scaling, head = scaling_of(sees), head_of(sees)
    places, file = spread_pixels((SIZE[1], SIZE[0]), PIXELS), io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    book = fit_image(image, DEFAULT_K, np.random.default_rng(0))

    def attach() -> object:
        pixels, _ = decode_sized(file.getvalue(), max(SIZE))
        cluster_map(pixels, book)
        return scaling(next(sees.sample([pixels], [places]))).half()

    yield within("attach", 0.15, attach, "an image of 640x480: decoded, clustered, its features taken")
    yield within("prelabel", 0.15, lambda: predict(sees.maps([image]), scaling, head), "a mask of an image of 640x480")


def scaling_of(sees: Extractor) -> Scaling:
    """From a few images."""
    images = [picture(number) for number in range(4)]
    places = [spread_pixels((SIZE[1], SIZE[0]), PIXELS)] * len(images)
    return fit_scaling(torch.cat(list(sees.sample(images, places))), sees.widths)


def annotated(sees: Extractor) -> list[LabelledPixels]:
    """The pixels that a few annotations teach with."""
    scaling, found = scaling_of(sees), []
    for number in range(ANNOTATED):
        image, mask = render(number, "source", SIZE)
        places, labels, weights = choose_pixels(mask, LABELLED, np.random.default_rng(number))
        seen = next(sees.sample([image], [places]))
        found.append(LabelledPixels(scaling(seen).half(), labels, weights))
    return found


def head_of(sees: Extractor) -> Head:
    """A head of one annotation."""
    one = annotated(sees)[:1]
    return fit(one, one[0].sums(CLASSES.fine))


def number_items() -> Iterator[Item]:
    """What a new label costs, but for its image; and scores of a pool."""
    sees = Extractor(SHIPPED, "cpu")
    images = annotated(sees)
    total = no_sums(CLASSES.fine, images[0].features.shape[1])
    for image in images:
        total = total + image.sums(CLASSES.fine)
    few = [images[number] for number in left_out_of(range(len(images)))]
    yield within("sums", 0.02, lambda: images[0].sums(CLASSES.fine), f"the sums of {LABELLED} pixels of an annotation")
    yield within("solve", 0.1, lambda: fit(few, total), f"a head of {ANNOTATED} annotations and its temperature")
    head, stored = fit(few, total), pool_features(total.first.shape[1])
    said = f"{SCORED:,} images of {PIXELS} stored pixels, 3 classes"
    yield within("score entropy", SCORED / 10_000, lambda: score_pool(stored, head, CLASSES, ["entropy"]), said)
    kinds, kind_of = kinds_of(stored)
    yield within(
        "score first-row", SCORED / 10_000, lambda: opinions(stored, kind_of, kinds, head, None, CLASSES), said
    )


def pool_features(dimensions: int) -> Tensor:
    """(N, P, D) in half precision."""
    return torch.randn((SCORED, PIXELS, dimensions), generator=torch.Generator().manual_seed(0)).half()


def kinds_of(stored: Tensor) -> tuple[Kinds, NDArray[np.uint8]]:
    """Kinds of pixels, and that of each pixel."""
    few, rng = stored[:64].float().numpy(), np.random.default_rng(0)
    kinds = fit_kinds(few, rng.integers(0, 256, (*few.shape[:2], 3), np.uint8), rng)
    return kinds, rng.integers(0, len(kinds.centres), stored.shape[:2], np.uint8)


def order_items() -> Iterator[Item]:
    """The default rule on ever larger pools: whether its time grows with their size alone."""
    kinds, _ = kinds_of(pool_features(COMPONENTS))
    calls = {str(size): order_of(size, kinds) for size in POOLS}
    times = compare(calls, 3, one_core())
    for small, large in pairwise(POOLS):
        said = f"{large // small} times the order of {small:,} images"
        yield times.item(f"order/linear {large}", 1.3, str(large), str(small), said, factor=large / small)


def order_of(size: int, kinds: Kinds) -> Call:
    """Orders a pool of so many images, twenty of them labelled."""
    rng = np.random.default_rng(size)
    share = rng.dirichlet(np.full(len(kinds.centres), 0.1), size)
    tables = Tables(share, share * rng.random(share.shape), share * rng.random(share.shape))
    return lambda: FirstRow(tables, kinds, len(CLASSES.fine), range(20), np.random.default_rng(0))
