"""Features of a project's images in the store: how they are scaled and what kinds there are, and packs of them.

They are computed once per image. What follows a label reads them from here and opens no image.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.context import Context
from backend.errors import FeatureError
from backend.prepare import GROWTH, SAMPLE_IMAGES, sampled
from backend.project import Index, Project, TaskRecord
from backend.store import Store
from model.features import Extractor, Scaling, fit_scaling
from model.kinds import Kinds, fit_kinds
from model.network import SHIPPED, available, device
from model.pixel_pool import at_pool_pixels, pool_pixels

log = logging.getLogger(__name__)

#: Pixels of each sampled image that the scaling is made from.
FIT_PIXELS = 64
#: Images per pack.
PACK = 64
#: Packs of less than half of that, from which on they are joined.
MANY = 16
#: Packs of which this process remembers what is in them.
REMEMBERED = 4096
#: Packs whose features this process has found whole; they never change.
WHOLE: set[str] = set()


@dataclass(frozen=True)
class Fit:
    """How the features of a project are scaled, and its kinds of pixels.

    Attributes:
        version: names all that features, sums and heads must have in common to be used together.
        network: whose backbone sees the images.
        images: from how many images it was made.
        scaling: of features.
        kinds: of pixels.
    """

    version: str
    network: str
    images: int
    scaling: Scaling
    kinds: Kinds

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """For the store."""
        axes = {f"axes:{number}": part.numpy() for number, part in enumerate(self.scaling.axes)}
        return {
            "named": np.array([self.version, self.network]),
            "images": np.array(self.images),
            "mean": self.scaling.mean.numpy(),
            "deviation": self.scaling.deviation.numpy(),
            **axes,
            "kinds:mean": self.kinds.mean,
            "kinds:axes": self.kinds.axes,
            "centres": self.kinds.centres,
            "words": np.array(self.kinds.words),
            "examples": self.kinds.examples,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Fit:
        """The inverse of `to_arrays`."""
        blocks = sum(name.startswith("axes:") for name in arrays)
        axes = tuple(torch.from_numpy(arrays[f"axes:{number}"]) for number in range(blocks))
        scaling = Scaling(torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["deviation"]), axes)
        words = tuple(str(word) for word in arrays["words"])
        kinds = Kinds(arrays["kinds:mean"], arrays["kinds:axes"], arrays["centres"], words, arrays["examples"])
        version, network = (str(name) for name in arrays["named"])
        return cls(version, network, int(arrays["images"]), scaling, kinds)


@dataclass(frozen=True)
class Pack:
    """What is in a pack besides the features.

    Attributes:
        key: where the features lie in the store.
        tasks: (N,) task ids.
        images: (N,) digests of the images that the features are of.
        kinds: (N, P) kind of each pixel.
        width: D, features of a pixel.
        checksum: of the features.
    """

    key: str
    tasks: NDArray[np.int64]
    images: NDArray[np.str_]
    kinds: NDArray[np.uint8]
    width: int
    checksum: int

    def features(self, store: Store) -> Tensor | None:
        """(N, P, D) standardised, finite, in half precision; None where they are lost, damaged ones are deleted."""
        data = store.map(self.key)
        whole = data is not None and len(data) == 2 * self.kinds.size * self.width
        if data is None or not whole or not self._is_whole(data):
            store.discard(self.key, None if data is None else bytes(data))
            return None
        return self._as_tensor(data, len(self.tasks))

    def of_image(self, store: Store, row: int) -> Tensor | None:
        """(P, D) the features of one image."""
        if self.key not in WHOLE:
            every = self.features(store)
            return None if every is None else every[row]
        size = 2 * self.kinds.shape[1] * self.width
        data = store.read(self.key, row * size, (row + 1) * size)
        return None if data is None or len(data) != size else self._as_tensor(bytearray(data), 1)[0]

    def _is_whole(self, data: bytearray | mmap.mmap) -> bool:
        if self.key not in WHOLE and zlib.crc32(data) == self.checksum and np.isfinite(np.frombuffer(data, "f2")).all():
            WHOLE.add(self.key)
        return self.key in WHOLE

    def _as_tensor(self, data: bytearray | mmap.mmap, count: int) -> Tensor:
        return torch.frombuffer(data, dtype=torch.float16).view(count, self.kinds.shape[1], self.width)


@lru_cache(maxsize=1)
def extractor(network: str) -> tuple[Extractor, str, str]:
    """Computes features: by this network's backbone, or the one that needs no download and a sentence that says so.

    Returns:
        It, the network whose backbone it has, and the sentence; empty if it is the one that was asked for.
    """
    log.info("network loaded: %s", network)
    sees, note = available(network, lambda name: Extractor(name, device()))
    return sees, SHIPPED if note else network, note or ""


def image_digest(record: TaskRecord, size: int) -> str:
    """Names the image that features are of."""
    return _digest(f"{size} {record.image}")


@lru_cache(maxsize=1 << 17)
def _digest(text: str) -> str:
    return hashlib.sha1(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def load_fit(project: Project) -> Fit | None:
    """Scaling and kinds of the project; None before there are any."""
    arrays = project.store.read_arrays(project.key("pool.npz"))
    return None if arrays is None else Fit.from_arrays(arrays)


def fit_is_stale(ctx: Context, project: Project, tasks: int) -> bool:
    """Whether there is no scaling yet, it is of another network or size, or the pool has outgrown it."""
    fit = load_fit(project)
    if fit is None or not fit.version.startswith(kind_of_fit(ctx)):
        return True
    return fit.images < SAMPLE_IMAGES and tasks > GROWTH * fit.images


def kind_of_fit(ctx: Context) -> str:
    """How versions begin that belong to these settings."""
    settings = ctx.settings
    return hashlib.sha1(f"{settings.network} {settings.image_size}".encode()).hexdigest()[:6] + "-"


def fit_features(ctx: Context, project: Project, index: Index) -> None:
    """Find how the features of the project are scaled, and its kinds of pixels; keep both."""
    rng, sees = np.random.default_rng(project.id), extractor(ctx.settings.network)[0]
    taken = list(sampled(ctx, project, index, rng, partial(seen_of, sees)))
    if not taken:
        return
    records = [record for record, _ in taken]
    raw, colours = zip(*(seen for _, seen in taken), strict=True)
    fit, features = make_fit(ctx, raw, colours, rng)
    ctx.board.go_on(project.id)
    for start in range(0, len(records), PACK):
        write_pack(ctx, project, fit, records[start : start + PACK], features[start : start + PACK])
    project.store.write_arrays(project.key("pool.npz"), fit.to_arrays())


def make_fit(
    ctx: Context, raw: Sequence[Tensor], colours: Sequence[NDArray[np.uint8]], rng: np.random.Generator
) -> tuple[Fit, Tensor]:
    """Scaling and kinds of a sample of images, as `seen_of` sees each, and its features (N, P, D) scaled."""
    sees, network, _ = extractor(ctx.settings.network)
    scaling = fit_scaling(torch.cat([part[:FIT_PIXELS] for part in raw]).float(), sees.widths)
    features = torch.stack([scaling(part.float()).half() for part in raw])
    kinds = fit_kinds(features.numpy(), np.stack(colours), rng)
    version = kind_of_fit(ctx) + hashlib.sha1(scaling.mean.numpy().tobytes() + kinds.centres.tobytes()).hexdigest()[:8]
    return Fit(version, network, len(raw), scaling, kinds), features


def seen_of(sees: Extractor, image: NDArray[np.uint8]) -> tuple[Tensor, NDArray[np.uint8]]:
    """Features (P, R) of an image, not standardised, and its colours (P, 3).

    Raises:
        FeatureError: they are not finite.
    """
    [features] = sees.sample([image], [pool_pixels(image)])
    return finite(features.half()), at_pool_pixels(image)


def finite(features: Tensor) -> Tensor:
    """Features of one image, as they are.

    Raises:
        FeatureError: they are not finite: one such number would spoil whatever is made of many images.
    """
    if not features.isfinite().all():
        raise FeatureError(
            "what the network computes of this image are not finite numbers: save the image again as JPEG or PNG, or "
            "choose another network (FIRSTROW_NETWORK)"
        )
    return features


def write_pack(ctx: Context, project: Project, fit: Fit, records: Sequence[TaskRecord], features: Tensor) -> None:
    """Keep the features (N, P, D) of some tasks' images."""
    stored = features.half().contiguous().numpy()
    images = [image_digest(record, ctx.settings.image_size) for record in records]
    tasks = [record.id for record in records]
    name = hashlib.sha1(repr([tasks, images, fit.version]).encode()).hexdigest()[:16]
    data = stored.tobytes()
    project.store.write(project.key("features", fit.version, f"{name}.f16"), data)
    about = {
        "tasks": np.array(tasks, np.int64),
        "images": np.array(images, "U12"),
        "kinds": fit.kinds.of(fit.kinds.reduced(stored)),
        "numbers": np.array([stored.shape[2], zlib.crc32(data)], np.int64),
    }
    project.store.write_arrays(project.key("features", fit.version, f"{name}.npz"), about)


def packs(project: Project, fit: Fit) -> Iterator[Pack]:
    """All packs of the project's features."""
    keys = set(project.store.list(project.key("features", fit.version)))
    for key in sorted(keys):
        if key.endswith(".npz") and key.removesuffix(".npz") + ".f16" in keys and (pack := read_pack(project, key)):
            yield pack


@lru_cache(maxsize=REMEMBERED)
def remembered(store: Store, key: str) -> Pack:
    """What is in a pack besides the features; packs never change."""
    arrays = store.read_arrays(key)
    if arrays is None:
        raise KeyError(key)
    width, checksum = arrays["numbers"].tolist()
    features = key.removesuffix(".npz") + ".f16"
    return Pack(features, arrays["tasks"], arrays["images"], arrays["kinds"], width, checksum)


def read_pack(project: Project, key: str) -> Pack | None:
    """As `remembered`; None where it is gone or damaged."""
    try:
        return remembered(project.store, key)
    except KeyError:
        return None


def useless_packs(ctx: Context, project: Project, fit: Fit) -> set[str]:
    """Files of packs that are of no task any more, or whose tasks are all in another pack as well."""
    there = set(project.store.list(project.key("features", fit.version)))
    index = project.index()  # read after the listing: a round that begins now may be adding to both
    if not index:
        return set()
    features = held(ctx, project, fit, index)
    used = {features.packs[number].key for number, _ in features.places.values()}
    return there - used - {key.removesuffix(".f16") + ".npz" for key in used}


def join_packs(ctx: Context, project: Project, fit: Fit, index: Index) -> None:
    """Write small packs once more as large ones when there are many, as tasks that come one by one leave them."""
    there = held(ctx, project, fit, index)
    rows: dict[int, list[int]] = {}
    for task, (number, _) in there.places.items():
        rows.setdefault(number, []).append(task)
    small = [number for number, tasks in rows.items() if len(tasks) < PACK // 2]
    if len(small) < MANY:
        return
    parts = list(there.parts(project.store, [task for number in small for task in rows[number]]))
    tasks, features = [task for ids, _, _ in parts for task in ids], [part for _, part, _ in parts]
    for start in range(0, len(tasks), PACK):
        records = [index[task] for task in tasks[start : start + PACK]]
        write_pack(ctx, project, fit, records, torch.cat(features)[start : start + PACK])


@dataclass(frozen=True)
class Held:
    """The features that the store holds of a project's images as they now are.

    Attributes:
        fit: what they were scaled by.
        packs: which there are.
        places: by task, its pack and its row there.
    """

    fit: Fit
    packs: Sequence[Pack]
    places: Mapping[int, tuple[int, int]]

    def parts(self, store: Store, tasks: Sequence[int]) -> Iterator[tuple[list[int], Tensor, NDArray[np.uint8]]]:
        """These tasks pack by pack: ids, features (n, P, D), kinds (n, P); without those that turn out lost."""
        rows: dict[int, list[int]] = {}
        for task in tasks:
            if task in self.places:
                number, row = self.places[task]
                rows.setdefault(number, []).append(row)
        for number, unsorted in sorted(rows.items()):
            pack, taken = self.packs[number], sorted(unsorted)
            features = pack.features(store)
            if features is None:
                continue
            whole = len(taken) == len(pack.tasks)
            yield pack.tasks[taken].tolist(), features if whole else features[taken], pack.kinds[taken]

    def of_image(self, store: Store, task: int) -> Tensor | None:
        """(P, D) the features of one task's image; None where the store has none."""
        if task not in self.places:
            return None
        number, row = self.places[task]
        return self.packs[number].of_image(store, row)


def held(ctx: Context, project: Project, fit: Fit, index: Index) -> Held:
    """The features of the tasks of an index that are in the store, of their images as they now are.

    Of a task that is in several packs those of the pack with the most tasks of the index.
    """
    images = {task: image_digest(record, ctx.settings.image_size) for task, record in index.items()}
    found = []
    for pack in packs(project, fit):
        pairs = zip(pack.tasks.tolist(), pack.images.tolist(), strict=True)
        found.append((pack, [row for row, (task, image) in enumerate(pairs) if images.get(task) == image]))
    found.sort(key=lambda each: (len(each[1]), -len(each[0].tasks)))
    places = {int(pack.tasks[row]): (number, row) for number, (pack, rows) in enumerate(found) for row in rows}
    return Held(fit, [pack for pack, _ in found], places)
