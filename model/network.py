"""Build, save and load a segmentation network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import requests
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights, ResNet101_Weights, WeightsEnum
from torchvision.models import segmentation as torchvision_networks
from torchvision.models.segmentation.lraspp import LRASPP

from model import lite0

T = TypeVar("T")
#: Seconds that a host may take to answer before its weights count as unavailable.
ANSWER_SECONDS = 5
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PretrainedError(RuntimeError):
    """Weights of a pretrained backbone can be had neither from the cache nor by download."""


class CheckpointError(ValueError):
    """A file is not a checkpoint of ours."""


@dataclass(frozen=True)
class Kind:
    """A network by name: its constructor, its backbone's weights, the input statistics these were trained with."""

    make: Callable[..., nn.Module]
    weights: WeightsEnum | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def lraspp_lite0(num_classes: int, **_: object) -> nn.Module:
    """The LR-ASPP head of torchvision on EfficientNet-Lite0."""
    return cast(nn.Module, LRASPP(lite0.Lite0(), lite0.LOW_CHANNELS, lite0.HIGH_CHANNELS, num_classes))


SHIPPED = "lraspp_efficientnet_lite0"
_MOBILE = MobileNet_V3_Large_Weights.IMAGENET1K_V1
_R50, _R101 = ResNet50_Weights.IMAGENET1K_V1, ResNet101_Weights.IMAGENET1K_V1
NETWORKS: Mapping[str, Kind] = {
    "lraspp_mobilenet_v3_large": Kind(torchvision_networks.lraspp_mobilenet_v3_large, _MOBILE),
    "deeplabv3_mobilenet_v3_large": Kind(torchvision_networks.deeplabv3_mobilenet_v3_large, _MOBILE),
    "deeplabv3_resnet50": Kind(torchvision_networks.deeplabv3_resnet50, _R50),
    "deeplabv3_resnet101": Kind(torchvision_networks.deeplabv3_resnet101, _R101),
    "fcn_resnet50": Kind(torchvision_networks.fcn_resnet50, _R50),
    "fcn_resnet101": Kind(torchvision_networks.fcn_resnet101, _R101),
    SHIPPED: Kind(lraspp_lite0, None, lite0.MEAN, lite0.STD),
}
DEFAULT = "lraspp_mobilenet_v3_large"


class Encoded(NamedTuple):
    """An image after the backbone: its features (1, D, h, w) by name, and its height and width."""

    features: dict[str, Tensor]
    size: tuple[int, int]


class Network(nn.Module):
    """A torchvision segmentation network that takes plain images and returns logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, num_classes: int) -> None:
        """Make one without pretrained weights; see `build`.

        Raises:
            ValueError: there is no network of that name.
        """
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"there is no network {name!r}; choose one of {', '.join(NETWORKS)}")
        kind = NETWORKS[name]
        self.name, self.num_classes = name, num_classes
        self.module = kind.make(num_classes=num_classes, weights=None, weights_backbone=None)
        self.register_buffer("mean", torch.tensor(kind.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(kind.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of images (N, 3, H, W) in [0, 1]."""
        return self.decode(self.encode(images), (images.shape[2], images.shape[3]))

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's output, (N, D, h, w) each by name, of images (N, 3, H, W) in [0, 1]."""
        return cast(dict[str, Tensor], self.backbone()(self.normalised(images)))

    def normalised(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] with the statistics that the backbone was trained with."""
        return (images - self.mean) / self.std

    def decode(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Logits (N, C, H, W) of what `encode` gave, at any size (H, W)."""
        return F.interpolate(self.head(features), size=size, mode="bilinear", align_corners=False)

    def head(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (N, C, h, w) of what `encode` gave, at the resolution of the last layers' inputs."""
        classifier = self.module.get_submodule("classifier")
        return cast(Tensor, classifier(features if isinstance(self.module, LRASPP) else features["out"]))

    def last_layers(self) -> list[nn.Conv2d]:
        """The final 1x1 convolutions, whose outputs are added and enlarged to logits: two for LR-ASPP, else one."""
        head = self.module.get_submodule("classifier")
        if isinstance(self.module, LRASPP):
            return [cast(nn.Conv2d, head.low_classifier), cast(nn.Conv2d, head.high_classifier)]
        return [cast(nn.Conv2d, list(head.children())[-1])]

    def backbone(self) -> nn.Module:
        """The part that pretrained weights are for."""
        return self.module.get_submodule("backbone")


def device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(name: str, num_classes: int, pretrained: bool = True, seed: int = 0) -> Network:
    """A network with a fresh head.

    Args:
        name: a key of `NETWORKS`.
        num_classes: fine classes.
        pretrained: give the backbone its ImageNet weights.
        seed: of the random initial weights; torch's global generator is left as it was.

    Raises:
        ValueError: there is no network of that name.
        PretrainedError: the weights are not in torch's cache and cannot be downloaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(name, num_classes)
    if pretrained:
        load_backbone(network)
    return network.eval()


def build_available(name: str, num_classes: int) -> tuple[Network, str | None]:
    """The pretrained network of that name, or else the one that needs no download and a sentence that says so.

    Raises:
        ValueError: there is no network of that name.
    """
    return available(name, lambda known: build(known, num_classes))


def available(name: str, make: Callable[[str], T]) -> tuple[T, str | None]:
    """What `make` makes of the network of that name, or else of the one that needs no download, and a sentence."""
    try:
        return make(name), None
    except PretrainedError as error:
        return make(SHIPPED), f"Using {SHIPPED} instead of {name}: {error}"


def load_backbone(network: Network) -> None:
    """Give a network's backbone its ImageNet weights.

    Raises:
        PretrainedError: they are not in torch's cache and cannot be downloaded.
    """
    backbone, weights = network.backbone(), NETWORKS[network.name].weights
    if weights is None:
        lite0.load_imagenet(cast(lite0.Lite0, backbone))
        return
    found = download(weights)
    # Segmentation keeps the backbone's feature layers, under the names they have in the classifier or below it.
    below = any(key.startswith("features.") for key in found)
    named = {key.removeprefix("features.") if below else key: value for key, value in found.items()}
    backbone.load_state_dict({key: named[key] for key in backbone.state_dict() if key in named})


def download(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """A state dict from torch's cache, else from its address; gives up within seconds when nobody answers.

    Raises:
        PretrainedError: neither worked.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    try:
        if not cached.is_file():
            # torch waits for ever on a host that does not answer: ask first, with a limit.
            requests.head(weights.url, timeout=ANSWER_SECONDS, allow_redirects=True).raise_for_status()
        return cast(Mapping[str, Tensor], weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise PretrainedError(
            f"its pretrained backbone cannot be downloaded from {weights.url} ({reason(error)}); "
            f"put that file into {cached.parent} to use it"
        ) from error


def reason(error: Exception) -> str:
    """A download's failure in a few words: what the libraries below say of it fills a screen."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "timed out"
    return "no connection" if isinstance(error, requests.ConnectionError) else str(error)


def save(network: Network, path: Path, meta: Mapping[str, str] | None = None) -> None:
    """Write a network to a safetensors file that says by itself what it is.

    Args:
        network: on any device.
        path: is replaced.
        meta: further facts to keep in the file's header, such as class names.
    """
    facts = {**(meta or {}), "name": network.name, "num_classes": str(network.num_classes)}
    save_file({key: value.contiguous().cpu() for key, value in network.state_dict().items()}, path, facts)


def load(path: Path) -> Network:
    """A network from a file that `save` wrote, on the CPU and ready for use.

    Raises:
        CheckpointError: the file is not one, or of a network that is unknown here.
        OSError: there is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            network = Network(facts["name"], int(facts["num_classes"]))
            network.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a First Row checkpoint: {error}") from error
    return network.eval()


def reorder_classes(network: Network, before: Sequence[str], now: Sequence[str]) -> Network:
    """Put a network's outputs into another order of the same classes; changed in place.

    Args:
        network: with one output per class.
        before: class names in the order of its outputs.
        now: the same names in the order that is wanted.

    Raises:
        ValueError: the names are not the same, or not as many as outputs.
    """
    if sorted(before) != sorted(now) or len(before) != network.num_classes:
        raise ValueError(f"the network knows {', '.join(before)}, not {', '.join(now)}")
    order = [list(before).index(name) for name in now]
    with torch.no_grad():
        for layer in network.last_layers():
            layer.weight.copy_(layer.weight[order])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[order])
    return network


def checkpoint_classes(path: Path) -> tuple[str, ...]:
    """The names of the classes that a checkpoint was trained for, as far as its file says; else none."""
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("classes", "")
    return tuple(said.split("\n")) if said else ()
