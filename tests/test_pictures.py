"""Maps made visible."""

import numpy as np
import pytest

from model.pictures import heat, paint, palette, sheet


def test_palette_colours_are_distinct() -> None:
    assert len({tuple(c) for c in palette(20)}) == 20


def test_paint_colours_known_labels_and_leaves_the_rest() -> None:
    labels = np.array([[0, 255]])
    image = np.full((1, 2, 3), 100, np.uint8)
    painted = paint(labels, np.array([[200, 0, 0]], np.uint8), image, opacity=0.5)
    assert painted.tolist() == [[[150, 50, 50], [100, 100, 100]]]


def test_heat_is_brightest_where_values_are_highest() -> None:
    picture = heat(np.array([[0.0, 1.0, 2.0]])).sum(-1)
    assert picture[0, 0] < picture[0, 1] < picture[0, 2]


def test_heat_of_nothing_is_dark() -> None:
    assert heat(np.zeros((2, 2))).max() < 10


def test_sheet_shows_every_picture() -> None:
    red, blue = (np.full((10, 20, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    colours = {colour for _, colour in sheet(["a", "b"], [("one", [red, blue])], 40).getcolors(100000) or []}
    assert {(255, 0, 0), (0, 0, 255)} <= colours


def test_sheet_refuses_rows_it_has_no_titles_for() -> None:
    with pytest.raises(ValueError, match="at most 0"):
        sheet([], [("one", [np.zeros((2, 2, 3), np.uint8)])])
