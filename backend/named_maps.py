"""Maps of classes that say which class each value stands for: PNG files with the names in a text chunk.

A label config may change at any time. A map is therefore never read by number: its values are found again by name,
and a class that is gone becomes unknown.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.store import PNG_END
from model.classes import IGNORE, MIXED

Map = NDArray[np.uint8]

#: Keyword of the text chunk.
KEYWORD = b"classes"
#: Bytes of a PNG before its second chunk: the signature and the chunk IHDR.
FIRST_CHUNK = 33
#: Values that mean the same in every map.
FIXED = (MIXED, IGNORE)


def encode(values: Map, names: Sequence[str]) -> bytes:
    """A PNG of a map, with the names of its values.

    Args:
        values: (H, W); below len(names), MIXED or IGNORE (which is UNKNOWN, too).
        names: of the classes, by value.
    """
    png = cv2.imencode(".png", np.ascontiguousarray(values, np.uint8))[1].tobytes()
    text = KEYWORD + b"\0" + json.dumps(list(names)).encode("ascii")
    chunk = b"tEXt" + text
    named = struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:FIRST_CHUNK] + named + png[FIRST_CHUNK:]


def decode(data: bytes) -> tuple[Map, tuple[str, ...]]:
    """The inverse of `encode`.

    Raises:
        ValueError: it is no PNG, is damaged, or does not name its values.
    """
    names = names_of(data)
    if not data.endswith(PNG_END):  # a decoder may give half of a picture for half of a file
        raise ValueError("the map is cut short")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if values is None:
        raise ValueError("the map is damaged")
    return np.asarray(values, np.uint8), names


def names_of(data: bytes) -> tuple[str, ...]:
    """The names in a map's file.

    Raises:
        ValueError: there are none.
    """
    try:
        (size,) = struct.unpack(">I", data[FIRST_CHUNK : FIRST_CHUNK + 4])
        body = data[FIRST_CHUNK + 4 : FIRST_CHUNK + 8 + size]
        (checksum,) = struct.unpack(">I", data[FIRST_CHUNK + 8 + size : FIRST_CHUNK + 12 + size])
        if not body.startswith(b"tEXt" + KEYWORD + b"\0") or zlib.crc32(body) != checksum:
            raise ValueError("the map does not name its classes")
        return tuple(map(str, json.loads(body[len(KEYWORD) + 5 :])))
    except struct.error as error:
        raise ValueError("the map is cut short") from error


def renumbered(values: Map, before: Sequence[str], now: Sequence[str]) -> Map:
    """A map whose values stand for the names of `before`, with the values that those names have in `now`.

    Returns:
        (H, W); IGNORE where the name is gone.
    """
    if tuple(before) == tuple(now):
        return values
    return table(before, now)[values]


def table(before: Sequence[str], now: Sequence[str]) -> Map:
    """(256,) the value in `now` of each value in `before`; IGNORE for names that are gone."""
    values = np.full(256, IGNORE, np.uint8)
    for value, name in enumerate(before):
        if name in now:
            values[value] = list(now).index(name)
    for value in FIXED:
        values[value] = value
    return values
