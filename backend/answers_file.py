"""The file of coarse answers: written so that an earlier one is never lost, and read before it is written over.

Neither is ever in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from backend.coarse_answers import digest
from backend.errors import AttachRefused
from backend.store import write_file

#: `meta` of each task in the file.
OURS = {"first_row": "coarse labels"}
#: Characters that are read at once, at least, and what is between the items of a list.
CHUNK, BETWEEN = 1 << 20, re.compile(r"[\s,]*")


def saved_before(known: Collection[int | str], file: Path) -> Iterator[dict[str, Any]]:
    """What a detach that died half-way has saved in the file and already deleted: it must not be written over.

    Args:
        known: what is going to be written, see `name_of`.
        file: where to.

    Yields:
        Tasks with their other annotations.

    Raises:
        AttachRefused: the file is somebody else's.
    """
    if not file.exists():
        return
    try:
        for row in rows_of(file):
            if row["meta"] != OURS:
                raise ValueError("it was written by somebody else")
            if answers := [answer for answer in row["annotations"] if name_of(answer) not in known]:
                yield {**row, "annotations": answers}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise AttachRefused(f"{file} is there and holds no coarse labels of ours: name another file") from error


def rows_of(file: Path) -> Iterator[Any]:
    """The objects of a JSON list, one after another.

    Raises:
        ValueError: the file holds something else.
    """
    decode = json.JSONDecoder().raw_decode
    with file.open(encoding="utf-8") as stream:
        text = stream.read(CHUNK).lstrip()
        if not text.startswith("["):
            raise ValueError("it is no list")
        place = 1
        while True:
            place = BETWEEN.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too
            if text.startswith("]", place):
                return
            try:
                row, place = decode(text, place)
            except ValueError:  # its end was not read yet
                more = stream.read(max(CHUNK, len(text) - place))
                if not more:
                    raise
                text, place = text[place:] + more, 0
            else:
                yield row


def name_of(answer: Mapping[str, Any]) -> int | str:
    """What tells an answer from others: its id, or what it says where an earlier release had deleted it."""
    return int(answer["id"]) if "id" in answer else digest(dict(answer))


def write_answers(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Write answers one by one beside the file, read them back, and put them in its place only then.

    Raises:
        AttachRefused: the file cannot be written; it is as it was.
    """
    meant = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for piece in listed(rows):
            meant.update(piece)
            yield piece

    def place(written: str, path: Path) -> None:
        with Path(written).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").digest() != meant.digest():
                raise OSError("it holds something else than was written")
        os.replace(written, path)

    try:
        write_file(file.resolve(), pieces(), place)
    except OSError as error:
        raise AttachRefused(f"the coarse labels cannot be saved to {file}: {error}") from error


def listed(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """A JSON list in pieces, a row each."""
    before = b"[\n"
    for row in rows:
        yield before + encoded(row)
        before = b",\n"
    yield b"\n]\n" if before == b",\n" else b"[]\n"


def encoded(row: Mapping[str, Any]) -> bytes:
    """One row as JSON, in a line."""
    try:
        return orjson.dumps(row)
    except orjson.JSONEncodeError:  # a number of more than 64 bits
        return json.dumps(row).encode()
