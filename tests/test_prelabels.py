"""What a person is shown: the network's mask, kept to what a person said, or the clusters."""

from __future__ import annotations

import numpy as np
import pytest

from backend.label_config import parse
from backend.prelabels import coarse_map, from_clusters, keep_to, nearest
from backend.sync import stage_of
from model.classes import IGNORE, MIXED, UNKNOWN

CONFIG = parse(
    """<View><Image name="image" value="$image"/>
    <BrushLabels name="coarse" toName="image"><Label value="Background" classes="soil"/>
    <Label value="Plant" classes="crop,weed"/><Label value="Mixed"/></BrushLabels>
    <BrushLabels name="seg" toName="image"><Label value="soil"/><Label value="crop"/><Label value="weed"/>
    </BrushLabels></View>"""
)
SOIL, CROP, WEED = 0, 1, 2
Row = dict[str, object]


def test_a_persons_coarse_label_wins_over_the_network() -> None:
    own = np.array([[0, 0, 1, 1, 1, UNKNOWN, MIXED]], np.uint8)
    seen = np.array([[SOIL, CROP, SOIL, WEED, WEED, CROP, CROP]], np.uint8)
    mask, sure = keep_to(own, seen, np.full((1, 7), 200, np.uint8), CONFIG)
    assert mask.tolist() == [[SOIL, SOIL, WEED, WEED, WEED, CROP, CROP]]
    assert sure.tolist() == [[200, 0, 0, 200, 200, 200, 200]], "what was replaced is not sure"


def test_without_any_allowed_pixel_the_first_class_of_the_group_is_shown() -> None:
    own = np.ones((2, 2), np.uint8)
    mask, _ = keep_to(own, np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8), CONFIG)
    assert (mask == CROP).all()


def test_nearest_takes_the_value_of_the_closest_allowed_pixel() -> None:
    values = np.array([[1, 9, 9, 9, 2]], np.uint8)
    found = nearest(values, np.array([[True, False, False, False, True]]))
    assert found[0, [0, 1, 3, 4]].tolist() == [1, 1, 2, 2]


def test_an_images_own_label_wins_over_the_votes() -> None:
    labels = np.array([[0, 1, 2]], np.uint8)
    votes = np.array([0, 1, MIXED], np.uint8)
    own = np.array([[1, UNKNOWN, 0]], np.uint8)
    assert coarse_map(labels, votes, None).tolist() == [[0, 1, MIXED]]
    assert coarse_map(labels, votes, own).tolist() == [[1, 1, 0]]


def test_clusters_alone_show_the_first_class_of_their_group_as_a_guess() -> None:
    mask, sure = from_clusters(np.array([[0, 1, MIXED]], np.uint8), CONFIG)
    assert mask.tolist() == [[SOIL, CROP, IGNORE]]
    assert sure[0, :2].tolist() == [255, 127]


def region(name: str) -> dict[str, str]:
    return {"from_name": name}


@pytest.mark.parametrize(
    ("annotations", "predictions", "stage"),
    [
        ([], [], "new"),
        ([{"id": 1, "result": [region("coarse")]}], [], "coarse"),
        ([{"id": 1, "result": [region("coarse"), region("seg")]}], [], "full"),
        ([{"id": 1, "result": [region("seg")], "was_cancelled": True}], [], "new"),
        ([{"id": 1, "result": []}], [], "other"),
        ([{"id": 1, "result": [region("seg") | {"id": "cl3"}]}], [], "coarse"),
        ([], [{"id": 3, "model_version": "coarse-labels", "result": []}], "returned"),
        ([], [{"id": 3, "model_version": "seg-2", "result": []}], "new"),
    ],
)
def test_stage_of_a_task(
    annotations: list[dict[str, object]], predictions: list[dict[str, object]], stage: str
) -> None:
    assert stage_of({"annotations": annotations, "predictions": predictions}, CONFIG, False)[0] == stage


def test_the_newest_full_annotation_counts() -> None:
    older = {"id": 1, "result": [region("seg")], "updated_at": "2026-01-01"}
    newer = {"id": 2, "result": [region("seg")], "updated_at": "2026-01-02"}
    coarse = {"id": 3, "result": [region("coarse")], "updated_at": "2026-01-03"}
    _, annotation, _ = stage_of({"annotations": [older, coarse, newer]}, CONFIG, False)
    assert annotation == newer


@pytest.mark.parametrize(("made", "stage"), [("2026-01-01", "other"), ("2026-01-03", "full")])
def test_an_empty_answer_after_the_coarse_one_means_background(made: str, stage: str) -> None:
    implicit = parse(
        """<View><Image name="image" value="$image"/>
        <BrushLabels name="coarse" toName="image"><Label value="Earth" classes="background"/>
        <Label value="Plant" classes="crop"/>
        </BrushLabels><BrushLabels name="seg" toName="image"><Label value="crop"/></BrushLabels></View>"""
    )
    assert implicit.background == ""
    copy = {"id": 3, "model_version": "coarse-labels", "result": [], "created_at": "2026-01-02"}
    task = {"annotations": [{"id": 1, "result": [], "created_at": made}], "predictions": [copy]}
    assert stage_of(task, implicit, True)[0] == stage
