"""Classes keep their names in every map, checkpoint and vote, whatever becomes of the label config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend import named_maps
from backend.label_config import parse
from backend.project import Project, TaskRecord
from backend.store import Store
from model.classes import IGNORE, MIXED, UNKNOWN
from model.network import build, checkpoint_classes, load, reorder_classes, save

XML = """<View><Image name="image" value="$image"/>
<BrushLabels name="coarse" toName="image"><Label value="Ground" classes="soil"/>
<Label value="Plant" classes="crop,weed"/><Label value="Mixed"/></BrushLabels>
<BrushLabels name="seg" toName="image">{}</BrushLabels></View>"""


def config(*labels: str) -> object:
    return parse(XML.format("".join(f'<Label value="{label}"/>' for label in labels)))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(Store(str(tmp_path)), 7)


def test_a_map_and_its_names_come_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 3, (37, 53)).astype(np.uint8)
    values[0, :2] = MIXED, IGNORE
    back, names = named_maps.decode(named_maps.encode(values, ["Erdboden ä", "b\nc", ""]))
    assert (back == values).all()
    assert names == ("Erdboden ä", "b\nc", "")


@pytest.mark.parametrize("cut", [0, 10, 40, 60, 0.5, -1])
def test_a_damaged_map_is_refused(cut: float) -> None:
    data = named_maps.encode(np.ones((200, 300), np.uint8) * np.arange(300, dtype=np.uint8), ["a", "b"])
    with pytest.raises(ValueError, match="map"):
        named_maps.decode(data[: int(len(data) * cut) if cut == 0.5 else int(cut)] if cut != -1 else b"\0" * len(data))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("soil", "crop", "weed"), [0, 1, 2, IGNORE]),
        (("weed", "crop", "soil"), [2, 1, 0, IGNORE]),
        (("stone", "soil", "crop", "weed"), [1, 2, 3, IGNORE]),
        (("soil", "crop", "thistle"), [0, 1, IGNORE, IGNORE]),
        (("soil", "weed"), [0, IGNORE, 1, IGNORE]),
    ],
)
def test_stored_masks_follow_their_names(project: Project, labels: tuple[str, ...], expected: list[int]) -> None:
    mask = np.array([[0, 1, 2, IGNORE]], np.uint8)
    project.save_labels(31, mask, config("soil", "crop", "weed"))
    stored = project.labels(31, config(*labels))
    assert stored is not None
    assert stored.tolist() == [expected]


def test_predictions_and_votes_follow_their_names(project: Project) -> None:
    before, now = config("soil", "crop", "weed"), config("weed", "soil", "crop")
    sure = np.array([[9, 8, 255]], np.uint8)
    project.save_prediction("model-1", 31, np.array([[0, 1, 2]], np.uint8), sure, before.classes.fine)
    seen = project.prediction("model-1", 31, now.classes.fine)
    assert seen is not None
    assert [part.tolist() for part in seen] == [[[1, 2, 0]], sure.tolist()]
    assert before.classes.coarse == now.classes.coarse == ("Ground", "Plant")
    project.save_votes(np.array([0, 1, MIXED, UNKNOWN], np.uint8), 3, before)
    assert project.decided(now).tolist() == [0, 1, MIXED, UNKNOWN]


def test_a_coarse_mask_in_a_group_that_is_gone_is_unknown(project: Project) -> None:
    before = config("soil", "crop", "weed")
    project.save_own_coarse(31, np.array([[0, 1, MIXED, UNKNOWN]], np.uint8), before)
    other = XML.replace('value="Plant" classes="crop,weed"', 'value="Green" classes="crop,weed"')
    now = parse(other.format('<Label value="soil"/><Label value="crop"/><Label value="weed"/>'))
    stored = project.own_coarse(TaskRecord(31, coarse=True), now)
    assert stored is not None
    assert stored.tolist() == [[0, UNKNOWN, MIXED, UNKNOWN]]


def test_a_damaged_mask_is_removed_and_counts_as_missing(project: Project) -> None:
    project.save_labels(31, np.zeros((20, 30), np.uint8), config("soil", "crop"))
    data = project.store.read(project.label_key(31))
    assert data is not None
    project.store.write(project.label_key(31), data[: len(data) // 2])
    assert project.labels(31, config("soil", "crop")) is None
    assert not project.store.exists(project.label_key(31))


def test_a_network_gives_the_same_classes_in_another_order(tmp_path: Path) -> None:
    network = build("lraspp_efficientnet_lite0", 3, pretrained=False)
    image = torch.rand(1, 3, 64, 64)
    before = network(image)
    path = tmp_path / "model.safetensors"
    save(network, path, {"classes": "soil\ncrop\nweed"})
    now = reorder_classes(load(path), checkpoint_classes(path), ("weed", "soil", "crop"))(image)
    assert torch.equal(now, before[:, [2, 0, 1]])
    with pytest.raises(ValueError, match="knows soil, crop, weed, not"):
        reorder_classes(load(path), checkpoint_classes(path), ("weed", "soil", "stone"))
