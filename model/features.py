"""Features of pixels: what a frozen backbone sees at strides 2 to 32, and colour.

A pixel's features are the outputs of the backbone's stages, each taken bilinearly at the pixel, and eight numbers of
colour. They are computed once per image. Standardised by the pool (`Scaling`) they are what heads learn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.backbones import backbone_of, build_stages
from model.folded import fold_batch_norms

Image = NDArray[np.uint8]
Pixels = NDArray[np.int64]

#: Numbers of colour: Lab and excess green, and the signed square of each.
COLOURS = 8
#: Side of the square over which colour is averaged, in pixels.
SMOOTH = 5
#: Standardised features are cut at this many deviations.
CUT = 8.0
#: A stage with more channels than this is reduced to this many principal components.
WIDEST = 192
#: Images of one size that a GPU takes at a time.
BATCH = 16
#: The plastic number: multiples of its powers fill a square evenly, in any number of points.
PLASTIC = 1.32471795724474602596
#: sRGB to XYZ under its white point D65, each row divided by the white point's value.
XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.950456, 1.0, 1.088754)


@dataclass(frozen=True)
class Maps:
    """Images of one size after the backbone.

    Attributes:
        stages: (N, D, h, w) each, float32, outputs of the stages.
        images: (N, H, W, 3) bytes, RGB.
    """

    stages: tuple[Tensor, ...]
    images: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[1], self.images.shape[2]

    def at(self, pixels: Tensor) -> Tensor:
        """Features of single pixels.

        Args:
            pixels: (N, P, 2) row and column of each, on the same device.

        Returns:
            (N, P, D), not standardised.
        """
        height, width = self.size
        size = torch.tensor([width, height], device=pixels.device)
        grid = ((2 * pixels.flip(-1) + 1) / size - 1)[:, None].float()
        taken = [sampled(stage, grid) for stage in self.stages]
        return torch.cat([*taken, colour_features(smoothed_at(self.images, pixels))], -1)

    def dense(self, scaling: Scaling, stride: int) -> Dense:
        """Features all over the images, made ready for heads.

        Args:
            scaling: of the features that the heads were fitted to.
            stride: pixels of the images per logit, in both directions.
        """
        size = math.ceil(self.size[0] / stride), math.ceil(self.size[1] / stride)
        colour = colour_features(smoothed_grid(self.images, size)).permute(0, 3, 1, 2)
        scaling, alike = scaling.to(self.images.device), dict[tuple[int, ...], dict[int, Tensor]]()
        for number, (maps, ready) in enumerate(zip((*self.stages, colour), scaling.cuts(), strict=True)):
            values = ready(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if maps[0, 0].numel() > math.prod(size):
                values = F.interpolate(values, size, mode="bilinear", align_corners=False)
            alike.setdefault(tuple(values.shape[2:]), {})[number] = values
        joined = tuple(torch.cat(list(stages.values()), 1).contiguous() for stages in alike.values())
        return Dense(joined, tuple(tuple(stages) for stages in alike.values()), size)


@dataclass(frozen=True)
class Dense:
    """Images of one size, their features standardised and cut: what heads need of them, however many there are.

    A linear head of bilinearly enlarged features is the enlarged head of the features, so each stage stays at its own
    resolution; one finer than the logits is brought to theirs for the same reason.

    Attributes:
        maps: (N, widths in sum, h, w) of the stages of each resolution.
        stages: the numbers of these stages; colour is the last.
        size: height and width of the logits.
    """

    maps: tuple[Tensor, ...]
    stages: tuple[tuple[int, ...], ...]
    size: tuple[int, int]

    def logits(self, parts: Sequence[Tensor], bias: Tensor) -> Tensor:
        """What a linear head says all over the images.

        Args:
            parts: of the head, as `Scaling.parts` gives them.
            bias: (C,).

        Returns:
            (N, C, *size), each at the middle of its pixels.
        """
        total = bias.to(self.maps[0].device).view(1, -1, 1, 1)
        for maps, stages in zip(self.maps, self.stages, strict=True):
            part = torch.cat([parts[stage] for stage in stages], 1).to(maps.device)
            own = part @ maps.float().flatten(2)
            total = total + enlarged(own.view(*own.shape[:2], *maps.shape[2:]), self.size)
        return total

    def half(self) -> Dense:
        """The same in half precision, for keeping many."""
        return Dense(tuple(maps.half() for maps in self.maps), self.stages, self.size)

    def cpu(self) -> Dense:
        """The same on the CPU."""
        return Dense(tuple(maps.cpu() for maps in self.maps), self.stages, self.size)


@dataclass(frozen=True)
class Scaling:
    """How features are standardised: by mean and deviation over a pool, each stage divided by the root of its width.

    Wide stages are reduced to principal components after that. Division by the root of the width gives every stage
    the same say, however many channels it has.

    Attributes:
        mean: (R,) of the features as they come from `Maps.at`.
        deviation: (R,) 1 for a feature that does not vary.
        axes: per stage and for colour (width, components): what its standardised features are multiplied by.
    """

    mean: Tensor
    deviation: Tensor
    axes: tuple[Tensor, ...]

    @property
    def widths(self) -> list[int]:
        """Features of each stage, then of colour, as they come."""
        return [len(axes) for axes in self.axes]

    @property
    def dimensions(self) -> int:
        """Features of a pixel after scaling."""
        return sum(axes.shape[1] for axes in self.axes)

    def __call__(self, features: Tensor) -> Tensor:
        """(..., D) standardised features of those that `Maps.at` gave, (..., R)."""
        parts = torch.split(cut(features, self.mean, self.deviation), self.widths, -1)
        return torch.cat([part @ axes for part, axes in zip(parts, self.axes, strict=True)], -1)

    def cuts(self) -> list[Callable[[Tensor], Tensor]]:
        """Per stage and for colour, what standardises and cuts its features (..., width)."""
        statistics = zip(torch.split(self.mean, self.widths), torch.split(self.deviation, self.widths), strict=True)
        return [partial(cut, mean=mean, deviation=deviation) for mean, deviation in statistics]

    def parts(self, weights: Tensor) -> list[Tensor]:
        """A linear head (C, D) as one of its own for each stage and for colour: (C, width) of cut features."""
        components = [axes.shape[1] for axes in self.axes]
        return [part @ axes.T for axes, part in zip(self.axes, torch.split(weights, components, 1), strict=True)]

    def to(self, device: torch.device) -> Scaling:
        """The same on another device."""
        return Scaling(self.mean.to(device), self.deviation.to(device), tuple(axes.to(device) for axes in self.axes))


def cut(features: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Standardised features, none farther from the mean than `CUT` deviations."""
    return (features - mean).div_(deviation).clamp_(-CUT, CUT)


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, D, *size) maps (N, D, h, w) at another size, bilinearly."""
    if tuple(maps.shape[2:]) == size:
        return maps
    # Of a few small maps two matrix products are faster than torch's own interpolation.
    rows, columns = (bilinear(maps.shape[2 + axis], size[axis], maps.device) for axis in (0, 1))
    return rows @ (maps @ columns.T)


@lru_cache(maxsize=64)
def bilinear(cells: int, length: int, device: torch.device) -> Tensor:
    """(length, cells) what makes a line of cells one of another length."""
    unit = torch.eye(cells, device=device)[None]
    return F.interpolate(unit, length, mode="linear", align_corners=False)[0].T.contiguous()


def fit_scaling(features: Tensor, widths: Sequence[int]) -> Scaling:
    """The scaling of a pool.

    Args:
        features: (P, R) of pixels from all over the pool, as from `Maps.at`.
        widths: of the stages and of colour; R together.
    """
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)
    parts = torch.split(cut(features.double(), mean, deviation), list(widths), 1)
    axes = tuple(stage_axes(part) for part in parts)
    return Scaling(mean.float(), deviation.float(), axes)


def stage_axes(features: Tensor) -> Tensor:
    """(width, components) principal axes of a wide stage, else the unit matrix; divided by the root of the width."""
    width = features.shape[1]
    axes = torch.eye(width) if width <= WIDEST else torch.linalg.eigh(features.T @ features)[1][:, -WIDEST:].float()
    return axes / math.sqrt(width)


class Extractor:
    """Computes features of images by one frozen backbone on one device.

    Attributes:
        widths: features of each stage, then of colour.
        stages: the backbone, batch norms folded, channels last.
    """

    def __init__(self, network: str, device: str, pretrained: bool = True) -> None:
        """Build the backbone.

        Args:
            network: a key of `model.network.NETWORKS`.
            device: as torch names it; on CUDA the backbone runs in half precision, on images in batches.
            pretrained: with ImageNet weights.

        Raises:
            ValueError: there is no network of that name.
            PretrainedError: the weights are not in torch's cache and cannot be downloaded.
        """
        backbone = backbone_of(network)
        self._device = torch.device(device)
        folded = fold_batch_norms(build_stages(network, pretrained)).to(self._device)
        self.stages = folded.to(memory_format=torch.channels_last)
        self.widths = [*backbone.widths, COLOURS]
        self._mean = torch.tensor(backbone.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(backbone.std, device=self._device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def maps(self, images: Sequence[Image]) -> Maps:
        """Images (H, W, 3) of one size after the backbone."""
        plain = torch.from_numpy(np.stack(images)).to(self._device)
        x, outputs = (plain.permute(0, 3, 1, 2).float().div_(255) - self._mean) / self._std, list[Tensor]()
        with torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
            for stage in self.stages:
                x = stage(x)
                outputs.append(x)
        return Maps(tuple(output.float() for output in outputs), plain)

    @torch.inference_mode()
    def sample(self, images: Sequence[Image], pixels: Sequence[Pixels]) -> Iterator[Tensor]:
        """Features of some pixels of each image, on the CPU.

        Neighbours of equal size and number of pixels go through a GPU together; a CPU takes one image at a time.

        Args:
            images: (H, W, 3) each.
            pixels: (P, 2) row and column, of each image.

        Yields:
            (P, R) of one image after the other, not standardised.
        """
        most = BATCH if self._device.type == "cuda" else 1
        pairs = zip(images, pixels, strict=True)
        for _, alike in groupby(pairs, lambda pair: (pair[0].shape, len(pair[1]))):
            group = list(alike)
            for start in range(0, len(group), most):
                part = group[start : start + most]
                places = torch.from_numpy(np.stack([place for _, place in part])).to(self._device)
                yield from self.maps([image for image, _ in part]).at(places).cpu()


def spread_pixels(size: tuple[int, int], count: int) -> Pixels:
    """(count, 2) row and column of pixels spread evenly over an image, always the same ones.

    Any first part of them is spread evenly too.

    Args:
        size: height and width of the image.
        count: how many; in a small image some are the same pixel.

    Source: Roberts 2018, "The Unreasonable Effectiveness of Quasirandom Sequences" (the R2 sequence).
    """
    steps = np.arange(1, count + 1)[:, None] * np.array([PLASTIC**-1, PLASTIC**-2])
    return np.asarray((0.5 + steps) % 1 * np.array(size), np.int64)


def sampled(maps: Tensor, grid: Tensor) -> Tensor:
    """(N, P, D) values of maps (N, D, h, w) at points (N, 1, P, 2) in [-1, 1], bilinearly."""
    taken = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return taken[:, :, 0].movedim(1, 2)


def smoothed_at(images: Tensor, pixels: Tensor) -> Tensor:
    """(N, P, 3) mean colour around pixels (N, P, 2), in [0, 1], of images (N, H, W, 3) repeated beyond their edges."""
    around = torch.arange(-(SMOOTH // 2), SMOOTH // 2 + 1, device=pixels.device)
    rows, columns = ((pixels[..., axis, None] + around).clamp(0, images.shape[1 + axis] - 1) for axis in (0, 1))
    image = torch.arange(len(images), device=pixels.device).view(-1, 1, 1, 1)
    return images[image, rows[..., :, None], columns[..., None, :]].float().mean((2, 3)) / 255


def smoothed_grid(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w, 3) what `smoothed_at` gives at the middles of a grid's cells, between pixels bilinearly."""
    rows = smoothed_along(images.float(), 1, size[0])
    return smoothed_along(rows, 2, size[1]) / 255


def smoothed_along(images: Tensor, axis: int, cells: int) -> Tensor:
    """Means over `SMOOTH` pixels along an axis of images, at the middles of so many cells."""
    length = images.shape[axis]
    middle = (torch.arange(cells, device=images.device) + 0.5) * (length / cells) - 0.5
    first, half = middle.floor(), SMOOTH // 2
    beyond = (middle - first).view([-1 if d == axis else 1 for d in range(images.dim())])
    total = torch.zeros((), device=images.device)
    for offset in range(-half, half + 2):
        taken = images.index_select(axis, (first.long() + offset).clamp(0, length - 1))
        weight = 1 - beyond if offset == -half else beyond if offset == half + 1 else 1.0
        total = total + weight * taken
    return total / SMOOTH


def colour_features(rgb: Tensor) -> Tensor:
    """(..., 8) Lab and excess green of RGB in [0, 1], (..., 3), and the signed square of each; all about -1 to 1."""
    red, green, blue = rgb.unbind(-1)
    values = torch.cat([lab(rgb) / 100, (2 * green - red - blue)[..., None]], -1)
    return torch.cat([values, values * values.abs()], -1)


def lab(rgb: Tensor) -> Tensor:
    """(..., 3) CIE L, a, b of sRGB in [0, 1], (..., 3), under D65."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ (torch.tensor(XYZ).T / torch.tensor(WHITE)).to(rgb)
    root = torch.where(xyz > 0.008856, xyz.clamp_min(1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
