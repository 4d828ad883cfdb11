"""Damaged pictures are decoded or refused, whatever is wrong with them; the process that decodes them lives on."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.decoder import Decoder
from backend.images import unpacked
from model.data import ImageError, decode_sized, original_size

QUICK = settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
BASES = fuzz.pictures()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


@QUICK
@given(st.integers(0, 2**32), st.sampled_from(range(len(BASES))))
def test_a_damaged_picture_is_read_or_refused(seed: int, base: int) -> None:
    data = fuzz.damaged(BASES[base], random.Random(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels, size = decode_sized(data, 24)
            assert size == original_size(data)
        except ImageError as error:
            assert "cannot be read" in str(error)  # noqa: PT017
        else:
            assert max(pixels.shape[:2]) <= 24
            assert pixels.shape[2] == 3


@QUICK
@given(st.integers(0, 2**32), st.sampled_from(range(len(BASES))))
def test_a_damaged_picture_costs_its_decoder_nothing(decoder: Decoder, seed: int, base: int) -> None:
    data = fuzz.damaged(BASES[base], random.Random(seed))
    try:
        image, _ = unpacked(decoder.copy(data, 24))
        assert max(image.shape[:2]) <= 24
    except ImageError:
        pass
    assert unpacked(decoder.copy(BASES[0], 24))[0].shape == (24, 16, 3)


@QUICK
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"GIF89a", b"BM"])
)
def test_any_bytes_as_a_picture(data: bytes, magic: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            decode_sized(magic + data, 24)
        except ImageError as error:
            assert "save it again" in str(error) or "make it smaller" in str(error)  # noqa: PT017
