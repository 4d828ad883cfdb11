"""The raw results of a benchmark: one row for each labelled set that a network was trained on, in a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

#: Strategy name of the reference that was trained on the whole pool.
FULL = "full-supervision"


class ResultsError(ValueError):
    """A file does not hold results of a benchmark."""


@dataclass(frozen=True)
class Row:
    """A network trained on the first n images that a strategy picked.

    Attributes:
        setting: what was trained from where, such as `pretrained` or `pretrained, no weak labels`.
        set: name of the data set.
        strategy: name of the query strategy, or `FULL`.
        seed: of initial head, batch order, views and ties.
        n: labelled images.
        image: those that were added since the row before, separated by spaces; empty for n = 0.
        mIoU: mean IoU over the classes, from one confusion table summed over all test images.
        iou: IoU of each class by name; NaN for a class that is neither there nor predicted.
        coarse_seconds: work on the coarse labels that were given so far; 0 where the setting uses none.
        full_seconds: work on the images of this row, each started from the prelabel that the network before gave.
        scratch_seconds: the same work started from an empty image.
        fix_clicks: pieces of the prelabels that had the wrong class, summed over the images of this row.
        repaint_share: share of their pixels that is wrong after that, mean over these images.
        scratch_clicks: pieces to draw in an empty image.
        scratch_repaint_share: share of its pixels to paint.
        train_seconds: of the training that led to mIoU.
        score_seconds: of scoring the pool and of choosing, for the images of this row.
        commit: of the code.
        device: what it ran on.
    """

    setting: str
    set: str
    strategy: str
    seed: int
    n: int
    image: str
    mIoU: float  # noqa: N815  (the field's standard name)
    iou: Mapping[str, float]
    coarse_seconds: float
    full_seconds: float
    scratch_seconds: float
    fix_clicks: int
    repaint_share: float
    scratch_clicks: int
    scratch_repaint_share: float
    train_seconds: float
    score_seconds: float
    commit: str
    device: str

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What there is one row of."""
        return self.setting, self.set, self.strategy, self.seed, self.n

    def to_csv(self) -> dict[str, Any]:
        """Column -> value; the IoU of all classes share a column, as `soil=0.91;crop=0.62`."""
        cells = {name: round(x, 6) if isinstance(x, float) else x for name, x in asdict(self).items()}
        return cells | {"iou": ";".join(f"{name}={value:.5f}" for name, value in self.iou.items())}

    @classmethod
    def from_csv(cls, cells: Mapping[str, str]) -> Row:
        """The inverse of `to_csv`.

        Raises:
            ValueError, KeyError, TypeError: a column is missing or holds something else.
        """
        parts = (part.rpartition("=") for part in cells["iou"].split(";") if part)
        iou = {name: float(value) for name, _, value in parts}
        kinds = {"int": int, "float": float, "str": str}
        plain = {f.name: kinds[str(f.type)](cells[f.name]) for f in fields(cls) if f.name != "iou"}
        return cls(**plain, iou=iou)


COLUMNS = tuple(field.name for field in fields(Row))


def read(path: Path) -> list[Row]:
    """The rows of a results file, each key once; a last line that was cut off by a kill is left out.

    Raises:
        ResultsError: the file has other columns, or a line in its middle is damaged.
    """
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines()
    if whole and whole[0].split(",") != list(COLUMNS):
        raise ResultsError(f"{path} has other columns than {', '.join(COLUMNS)}: name another folder")
    found: dict[tuple[str, str, str, int, int], Row] = {}
    for number, cells in enumerate(csv.DictReader(whole), 2):
        try:
            row = Row.from_csv(cells)
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path}, line {number} is damaged ({error}): delete that line") from error
        found.setdefault(row.key, row)
    return list(found.values())


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a results file, which is made where it is missing; a line that was cut off goes first."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(COLUMNS) + "\n", "utf-8")
    drop_cut_line(path)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writerows(row.to_csv() for row in rows)


def drop_cut_line(path: Path) -> None:
    """Remove a last line without an end; a file that ends well is not read."""
    with path.open("rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
