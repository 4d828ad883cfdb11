"""Votes on clusters, and the sets of classes that they leave to each pixel."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from model.classes import IGNORE, MIXED, UNKNOWN, Classes
from model.pseudo import cluster_votes, decide, fine_target, pseudo_ground_truth

FIELD = Classes(("soil", "crop", "weed"), ("background", "foreground"), ((0,), (1, 2)))
BACKGROUND, FOREGROUND, ANY = FIELD.coarse_row(0), FIELD.coarse_row(1), FIELD.any_row


def bytes_of(rows: list[list[int]]) -> NDArray[np.uint8]:
    return np.array(rows, np.uint8)


def test_the_answer_of_most_pixels_is_the_vote() -> None:
    clusters = bytes_of([[0, 0, 0, 1], [1, 1, 2, 2], [2, 4, 4, 4]])
    coarse = bytes_of([[0, 0, 1, 1], [1, UNKNOWN, UNKNOWN, UNKNOWN], [0, MIXED, MIXED, 0]])
    assert cluster_votes(clusters, coarse, 5, 2).tolist() == [0, 1, UNKNOWN, UNKNOWN, MIXED]


@pytest.mark.parametrize("seed", range(5))
def test_votes_agree_with_counting_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = [0, 1, 2, MIXED, UNKNOWN]
    clusters = rng.integers(0, 6, (9, 11), np.uint8)
    coarse = rng.choice(answers, (9, 11)).astype(np.uint8)
    votes = cluster_votes(clusters, coarse, 7, 3)
    for cluster in range(6):
        counts = Counter(coarse[clusters == cluster].tolist())
        assert votes[cluster] == max(answers, key=lambda answer: (counts[answer], -answer))
    assert votes[6] == UNKNOWN


def test_votes_on_what_is_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clusters are \(1, 2\), the coarse mask is \(2, 1\)"):
        cluster_votes(bytes_of([[0, 0]]), bytes_of([[0], [0]]), 1, 2)
    with pytest.raises(ValueError, match="a cluster 3, but only 3"):
        cluster_votes(bytes_of([[0, 3]]), bytes_of([[0, 0]]), 3, 2)
    with pytest.raises(ValueError, match="a coarse class 2, but only 2"):
        cluster_votes(bytes_of([[0, 0]]), bytes_of([[0, 2]]), 1, 2)


def test_only_votes_that_agree_decide() -> None:
    votes = np.array(
        [
            [0, 1, 0, UNKNOWN, MIXED, UNKNOWN, 0],
            [0, 1, 1, UNKNOWN, MIXED, 1, MIXED],
            [0, UNKNOWN, 0, UNKNOWN, UNKNOWN, UNKNOWN, 0],
        ]
    )
    assert decide(votes).tolist() == [0, 1, MIXED, UNKNOWN, MIXED, 1, MIXED]


def test_nobody_decides_nothing() -> None:
    assert decide(np.zeros((0, 3), np.int64)).tolist() == [UNKNOWN] * 3


def test_one_image_decides_as_it_votes() -> None:
    votes = np.array([[0, 1, MIXED, UNKNOWN]])
    assert decide(votes).tolist() == votes[0].tolist()


def test_pixels_get_the_set_of_their_cluster() -> None:
    clusters = bytes_of([[0, 1], [2, 3]])
    target = pseudo_ground_truth(clusters, bytes_of([[0, 1, MIXED, UNKNOWN]])[0], None, FIELD)
    assert target.tolist() == [[BACKGROUND, FOREGROUND], [ANY, ANY]]
    assert target.dtype == np.uint8


def test_what_a_person_said_of_the_image_wins_over_the_votes() -> None:
    clusters = bytes_of([[0, 0, 0, 0], [1, 1, 1, 1]])
    own = bytes_of([[0, 1, MIXED, UNKNOWN]] * 2)
    target = pseudo_ground_truth(clusters, bytes_of([[0, 1]])[0], own, FIELD)
    assert target.tolist() == [[BACKGROUND, FOREGROUND, ANY, BACKGROUND], [BACKGROUND, FOREGROUND, ANY, FOREGROUND]]


def test_pseudo_ground_truth_of_what_is_not_known_is_refused() -> None:
    decided = bytes_of([[0, 1]])[0]
    with pytest.raises(ValueError, match=r"own coarse mask is \(1, 1\)"):
        pseudo_ground_truth(bytes_of([[0, 1]]), decided, bytes_of([[0]]), FIELD)
    with pytest.raises(ValueError, match="a cluster 2, but only 2"):
        pseudo_ground_truth(bytes_of([[0, 2]]), decided, None, FIELD)
    with pytest.raises(ValueError, match="a coarse class 2, but only 2"):
        pseudo_ground_truth(bytes_of([[0, 1]]), decided, bytes_of([[2, 0]]), FIELD)
    with pytest.raises(ValueError, match="a coarse class 5, but only 2"):
        pseudo_ground_truth(bytes_of([[0, 1]]), bytes_of([[0, 5]])[0], None, FIELD)


def test_the_truth_is_always_in_the_set_that_a_right_vote_leaves() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (20, 20), np.uint8)
    coarse_of = FIELD.coarse_of().astype(np.uint8)
    clusters = (coarse_of[mask] * 2 + rng.integers(0, 2, mask.shape)).astype(np.uint8)
    votes = cluster_votes(clusters, coarse_of[mask], 4, 2)
    target = pseudo_ground_truth(clusters, decide(votes[None]), None, FIELD)
    assert FIELD.sets()[target, mask].all()
    assert (target != ANY).all()


def test_an_annotation_mask_names_single_classes() -> None:
    mask = bytes_of([[0, 1], [2, IGNORE]])
    target = fine_target(mask, FIELD)
    assert target.tolist() == [[0, 1], [2, ANY]]
    assert target.dtype == np.uint8
    assert fine_target(np.full((2, 2), IGNORE, np.uint8), FIELD).tolist() == [[ANY] * 2] * 2


def test_a_mask_with_a_class_too_many_is_refused() -> None:
    with pytest.raises(ValueError, match="has class 3, but there are only 3"):
        fine_target(bytes_of([[0, 3, IGNORE]]), FIELD)


def test_inputs_stay_as_they_are() -> None:
    clusters, own, decided = bytes_of([[0, 1]]), bytes_of([[UNKNOWN, 0]]), bytes_of([[0, 1]])[0]
    for array in (clusters, own, decided):
        array.setflags(write=False)
    cluster_votes(clusters, own, 2, 2)
    pseudo_ground_truth(clusters, decided, own, FIELD)
    fine_target(clusters, FIELD)
