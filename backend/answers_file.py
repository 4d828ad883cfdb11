"""The file of coarse answers: written so that an earlier one is never lost, and read before it is written over."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from backend.coarse_answers import digest
from backend.errors import AttachRefused
from backend.store import write_file

#: `meta` of each task in the file.
OURS = {"first_row": "coarse labels"}


def saved_before(present: Sequence[Mapping[str, Any]], file: Path) -> list[dict[str, Any]]:
    """What a detach that died half-way has saved in the file and already deleted: it must not be written over.

    Args:
        present: what is going to be written, as tasks with their annotations.
        file: where to.

    Raises:
        AttachRefused: the file is somebody else's.
    """
    if not file.exists():
        return []
    known = {name_of(answer) for row in present for answer in row["annotations"]}
    try:
        saved = orjson.loads(file.read_bytes())
        if not all(row["meta"] == OURS for row in saved):
            raise ValueError("it was written by somebody else")
        rows = [
            {**row, "annotations": [answer for answer in row["annotations"] if name_of(answer) not in known]}
            for row in saved
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise AttachRefused(f"{file} is there and holds no coarse labels of ours: name another file") from error
    return [row for row in rows if row["annotations"]]


def name_of(answer: Mapping[str, Any]) -> int | str:
    """What tells an answer from others: its id, or what it says where an earlier release had deleted it."""
    return int(answer["id"]) if "id" in answer else digest(dict(answer))


def write_answers(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write answers beside the file, read them back, and put them in its place only then.

    Raises:
        AttachRefused: the file cannot be written; it is as it was.
    """
    try:
        data = orjson.dumps(rows, option=orjson.OPT_INDENT_2)
    except orjson.JSONEncodeError:  # a number of more than 64 bits
        data = json.dumps(rows).encode()

    def place(written: str, path: Path) -> None:
        if Path(written).read_bytes() != data:
            raise OSError("it holds something else than was written")
        os.replace(written, path)

    try:
        write_file(file.resolve(), data, place)
    except OSError as error:
        raise AttachRefused(f"the coarse labels cannot be saved to {file}: {error}") from error
