"""Fine and coarse classes, and the sets of fine classes that a pseudo ground truth is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A pixel of an annotation mask that nothing is known about.
IGNORE = 255
#: A pixel of a coarse mask: a person said that several coarse classes meet here.
MIXED = 254
#: A pixel of a coarse mask that nobody said anything about.
UNKNOWN = 255


@dataclass(frozen=True)
class Classes:
    """Fine classes and the coarse class of each.

    Attributes:
        fine: names; the order is that of the network's outputs.
        coarse: names.
        groups: per coarse class, the indices of its fine classes; each fine class is in exactly one.

    Raises:
        ValueError: a fine class is in no group or in two, a group is empty, there is no class, a name is there twice,
            or the rows of `sets` do not fit into a byte.
    """

    fine: tuple[str, ...]
    coarse: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        members = sorted(index for group in self.groups for index in group)
        if members != list(range(len(self.fine))) or len(self.coarse) != len(self.groups) or not all(self.groups):
            raise ValueError(
                f"each of {', '.join(self.fine)} must be in exactly one of {', '.join(self.coarse)}, and none empty"
            )
        if not self.fine or any(len(set(names)) < len(names) for names in (self.fine, self.coarse)):
            raise ValueError(f"class names must be there, once each: {', '.join(self.fine + self.coarse) or 'none is'}")
        if self.any_row >= IGNORE:
            raise ValueError(
                f"{len(self.fine)} fine and {len(self.coarse)} coarse classes are more than a mask can hold"
            )

    @property
    def any_row(self) -> int:
        """The row of `sets` that allows every class."""
        return len(self.fine) + len(self.coarse)

    def coarse_row(self, coarse: int) -> int:
        """The row of `sets` that allows the members of a coarse class."""
        return len(self.fine) + coarse

    def coarse_of(self) -> NDArray[np.intp]:
        """(C,) coarse class of each fine class."""
        found = np.zeros(len(self.fine), np.intp)
        for coarse, members in enumerate(self.groups):
            found[list(members)] = coarse
        return found

    def named(self) -> NDArray[np.intp]:
        """(C + G + 1,) the coarse class that each row of `sets` names; -1 for the row that allows every class."""
        return np.array([*self.coarse_of(), *range(len(self.coarse)), -1], np.intp)

    def coarse_table(self) -> NDArray[np.uint8]:
        """(256,) the coarse class of each value of an annotation mask; UNKNOWN for values that are no fine class."""
        table = np.full(256, UNKNOWN, np.uint8)
        table[: len(self.fine)] = self.coarse_of()
        return table

    def sets(self) -> NDArray[np.bool_]:
        """(C + G + 1, C) which classes each row allows: one class, the members of a coarse class, any."""
        groups = np.arange(len(self.coarse))[:, None] == self.coarse_of()[None]
        return np.concatenate([np.eye(len(self.fine), dtype=bool), groups, np.ones((1, len(self.fine)), bool)])

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {"fine": list(self.fine), "coarse": list(self.coarse), "groups": [list(g) for g in self.groups]}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Classes:
        """The inverse of `to_json`."""
        return cls(tuple(row["fine"]), tuple(row["coarse"]), tuple(tuple(g) for g in row["groups"]))
