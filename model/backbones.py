"""The frozen backbones that features come from: plain ImageNet networks, cut into stages at strides 2 to 32.

A segmentation network of `model.network` keeps its deepest stages at stride 8 or 16. The same weights at the strides
they were trained with see more of the surroundings and cost a quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torchvision.models import (
    MobileNet_V3_Large_Weights,
    MobileNetV3,
    ResNet,
    ResNet50_Weights,
    ResNet101_Weights,
    mobilenet_v3_large,
    resnet50,
    resnet101,
)

from model import lite0
from model.network import IMAGENET_MEAN, IMAGENET_STD, NETWORKS, download

#: Where the stages of MobileNetV3-Large end in its list of blocks, at strides 2, 4, 8, 16, 16 and 32.
MOBILE_ENDS = (2, 4, 7, 11, 13, 16)


@dataclass(frozen=True)
class Backbone:
    """A backbone by name.

    Attributes:
        make: gives its stages, each taking the output of the one before; with ImageNet weights or random ones.
        widths: channels of each stage's output.
        strides: pixels of the image per pixel of each stage's output.
        mean: of the images it was trained with, per channel.
        std: their deviation.
    """

    make: Callable[[bool], nn.Sequential]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def lite0_stages(pretrained: bool) -> nn.Sequential:
    """EfficientNet-Lite0 up to stride 32."""
    blocks = [lite0.stage(number) for number in range(len(lite0.STAGES))]
    stages = nn.Sequential(nn.Sequential(*lite0.stem(), *blocks[0]), *(nn.Sequential(*stage) for stage in blocks[1:]))
    if pretrained:
        lite0.load_imagenet(stages)
    return stages


def mobilenet_stages(pretrained: bool) -> nn.Sequential:
    """MobileNetV3-Large without its last convolution."""
    network: MobileNetV3 = mobilenet_v3_large(weights=None)
    if pretrained:
        network.load_state_dict(download(MobileNet_V3_Large_Weights.IMAGENET1K_V1))
    starts = (0, *MOBILE_ENDS[:-1])
    return nn.Sequential(*(network.features[start:end] for start, end in zip(starts, MOBILE_ENDS, strict=True)))


def resnet_stages(depth: int, pretrained: bool) -> nn.Sequential:
    """ResNet-50 or ResNet-101 without its classifier."""
    network: ResNet = {50: resnet50, 101: resnet101}[depth](weights=None)
    if pretrained:
        weights = {50: ResNet50_Weights.IMAGENET1K_V1, 101: ResNet101_Weights.IMAGENET1K_V1}[depth]
        network.load_state_dict(download(weights))
    first = nn.Sequential(network.conv1, network.bn1, network.relu)
    second = nn.Sequential(network.maxpool, network.layer1)
    return nn.Sequential(first, second, network.layer2, network.layer3, network.layer4)


_RESNET_WIDTHS, _RESNET_STRIDES, _STRIDES = (64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32), (2, 4, 8, 16, 16, 32)
BACKBONES: Mapping[str, Backbone] = {
    "efficientnet_lite0": Backbone(lite0_stages, (16, 24, 40, 80, 112, 192), _STRIDES, lite0.MEAN, lite0.STD),
    "mobilenet_v3_large": Backbone(mobilenet_stages, (16, 24, 40, 80, 112, 160), _STRIDES),
    "resnet50": Backbone(partial(resnet_stages, 50), _RESNET_WIDTHS, _RESNET_STRIDES),
    "resnet101": Backbone(partial(resnet_stages, 101), _RESNET_WIDTHS, _RESNET_STRIDES),
}


def backbone_of(network: str) -> Backbone:
    """The backbone of one of `model.network.NETWORKS`, whose names are "head_backbone".

    Raises:
        ValueError: there is no network of that name.
    """
    if network not in NETWORKS:
        raise ValueError(f"there is no network {network!r}; choose one of {', '.join(NETWORKS)}")
    return BACKBONES[network.partition("_")[2]]


def build_stages(network: str, pretrained: bool = True, seed: int = 0) -> nn.Sequential:
    """The stages of a network's backbone, in evaluation mode and without gradients.

    Args:
        network: a key of `model.network.NETWORKS`.
        pretrained: with ImageNet weights.
        seed: of random weights; torch's global generator is left as it was.

    Raises:
        ValueError: there is no network of that name.
        PretrainedError: the weights are not in torch's cache and cannot be downloaded.
    """
    make = backbone_of(network).make
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(pretrained).eval().requires_grad_(False)
