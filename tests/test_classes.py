"""Fine classes, coarse classes and the sets that a pseudo ground truth is made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from model.classes import IGNORE, MIXED, UNKNOWN, Classes

FIELD = Classes(("soil", "crop", "weed"), ("background", "foreground"), ((0,), (1, 2)))


def test_sets_are_single_classes_then_groups_then_any() -> None:
    assert FIELD.sets().astype(int).tolist() == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [1, 0, 0],
        [0, 1, 1],
        [1, 1, 1],
    ]
    assert FIELD.sets().dtype == bool
    assert FIELD.any_row == len(FIELD.sets()) - 1


def test_groups_need_no_order() -> None:
    classes = Classes(("crop", "soil", "weed", "sky"), ("other", "plants"), ((3, 1), (2, 0)))
    assert classes.coarse_of().tolist() == [1, 0, 1, 0]
    for coarse, members in enumerate(classes.groups):
        assert np.flatnonzero(classes.sets()[classes.coarse_row(coarse)]).tolist() == sorted(members)


def test_classes_survive_a_file() -> None:
    again = Classes.from_json(json.loads(json.dumps(FIELD.to_json())))
    assert again == FIELD
    assert hash(again) == hash(FIELD)


def test_marks_of_coarse_masks_are_no_classes() -> None:
    most = Classes(tuple(f"{i}" for i in range(253)), ("all",), (tuple(range(253)),))
    assert most.any_row < min(MIXED + 1, UNKNOWN, IGNORE)


@pytest.mark.parametrize(
    ("fine", "coarse", "groups", "says"),
    [
        (("a", "b"), ("x",), ((0,),), "exactly one"),
        (("a", "b"), ("x", "y"), ((0, 1), (1,)), "exactly one"),
        (("a", "b"), ("x", "y"), ((0, 1), ()), "none empty"),
        (("a", "b"), ("x",), ((0,), (1,)), "exactly one"),
        (("a",), ("x",), ((1,),), "exactly one"),
        ((), (), (), "once each"),
        (("a", "a"), ("x",), ((0, 1),), "once each"),
        (("a", "b"), ("x", "x"), ((0,), (1,)), "once each"),
        (tuple(f"{i}" for i in range(254)), ("x",), (tuple(range(254)),), "more than a mask can hold"),
    ],
)
def test_classes_that_make_no_sense_are_refused(
    fine: tuple[str, ...], coarse: tuple[str, ...], groups: tuple[tuple[int, ...], ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Classes(fine, coarse, groups)
