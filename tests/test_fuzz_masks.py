"""Damaged masks, annotations and label configs are read or refused, whatever is wrong with them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import fuzz
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backend.errors import ConfigError, MaskError
from backend.label_config import Control, parse
from backend.regions import MOST_PIXELS, read_region, to_mask
from backend.rle import decode_rle, encode_rle

QUICK = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
BASES = {name: make() for name, (make, _, _) in fuzz.TARGETS.items() if name != "pictures"}
#: What JSON can hold, nested.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = ("id", "from_name", "value", "original_width", "original_height", "image_rotation", "rle", "points", "x")
REGION = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6)


def refused_or_read(work: Callable[[], Any], *refusals: type[Exception]) -> Any:
    """What some work gives, None where it refuses as it should."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return work()
        except refusals:
            return None


@QUICK
@given(st.integers(0, 2**32), st.sampled_from(sorted(BASES)))
def test_what_is_damaged_is_read_or_refused(seed: int, name: str) -> None:
    _, read, refusals = fuzz.TARGETS[name]
    refused_or_read(lambda: read(random.Random(seed), BASES[name]), *refusals)


@QUICK
@given(st.binary(max_size=200), st.integers(1, 40), st.integers(1, 40))
@example(encode_rle(np.ones((4, 4), bool)).tobytes(), 4, 4)
def test_any_bytes_as_a_brush_mask(data: bytes, height: int, width: int) -> None:
    head = (4 * height * width).to_bytes(4, "big") + bytes([0x39, 0x19, 0xBF, 0x80])
    for rle in (data, head + data):
        mask = refused_or_read(lambda rle=rle: decode_rle(np.frombuffer(rle, np.uint8), (height, width)), ValueError)
        assert mask is None or mask.shape == (height, width)


@QUICK
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_every_mask_comes_back(pixels: list[bool]) -> None:
    mask = np.array([pixels])
    np.testing.assert_array_equal(decode_rle(encode_rle(mask), mask.shape), mask)


@QUICK
@given(JSON | st.lists(REGION | JSON, max_size=4), st.sampled_from(fuzz.TAGS))
def test_any_json_as_an_annotation(result: Any, tag: str) -> None:
    control = Control("seg", tag, "i", fuzz.LABELS)
    if isinstance(result, list):
        result = [{**r, "from_name": "seg"} if isinstance(r, dict) else r for r in result]
    mask = refused_or_read(lambda: to_mask(result, control, (24, 16), fuzz.LABELS), MaskError)
    assert mask is None or mask.shape == (16, 24)


@QUICK
@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20))
def test_any_size_of_an_image(width: int, height: int) -> None:
    region = {"original_width": width, "original_height": height, "value": {"rle": [0] * 20}}
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        with pytest.raises(ValueError, match="pixels"):
            read_region(region, "BrushLabels", (24, 16))


@QUICK
@given(st.text(max_size=200))
def test_any_text_as_a_label_config(text: str) -> None:
    refused_or_read(lambda: parse(text), ConfigError)


@QUICK
@given(JSON)
def test_any_json_as_what_was_recorded(recorded: Any) -> None:
    """Any member of the project can change what we keep there."""
    xml = BASES["configs"][0].decode()
    for note in (recorded, {"groups": recorded}, {"background": recorded}, {"groups": {"Soil": recorded}}):
        if isinstance(note, dict):
            refused_or_read(lambda note=note: parse(xml, recorded=note), ConfigError)


@pytest.mark.parametrize(
    "xml",
    ["<View>" * 100_000, "<View>" * 5000 + "</View>" * 5000, "\ud800", "<View>\0</View>", "", "<a" + " b='c'" * 9999],
)
def test_configs_made_to_do_harm(xml: str) -> None:
    with pytest.raises(ConfigError):
        parse(xml)
