"""A project of ours as a detach finds it: its coarse answers, what was there before us, and the steps to undo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from backend.coarse_answers import COARSE_COPY, said_since
from backend.connection import keeper_account, note_of, our_backend
from backend.errors import ConfigError
from backend.label_config import ProjectConfig, parse
from backend.labelstudio import LabelStudio, Row
from backend.settings import Settings

#: How long somebody may have open what was served or saved; Label Studio holds a served task as long.
OPEN = timedelta(hours=24)
#: Tasks after which a step says how far it is.
PAGE = 20

Run = Callable[[], Iterable[str]]
#: What the store keeps of answers that were set aside, by annotation, see `record_of`.
Kept = Mapping[int, Mapping[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Undo:
    """One thing to undo: a sentence for people, and what does it, telling how far it is."""

    text: str
    run: Run


@dataclass(frozen=True)
class Attached:
    """A project of ours as it is now.

    Attributes:
        studio: Label Studio.
        settings: our address.
        id: Label Studio's project id.
        ours: our ML backend, None if somebody has deleted it.
        note: what `attach` wrote down.
        account: id of the account that annotations are handed to; 0 without one.
        keeper: who has the annotations that are set aside: that account, or the key's own user where there is none; 0
            if nobody knows.
        config: what the label config means; None if it cannot be used.
        kept: what the store has of answers that were ever set aside.
        annotated: ids of the tasks with annotations, also skipped ones, and when something of each was changed last.
        answers: ids of the tasks that may have coarse answers; they are read page by page, for all may be too large.
        unreadable: tasks that Label Studio cannot show; grows as more are found.
    """

    studio: LabelStudio
    settings: Settings
    id: int
    ours: Row | None
    note: Mapping[str, Any]
    account: int
    keeper: int
    config: ProjectConfig | None
    kept: Kept
    annotated: Mapping[int, str]
    answers: Sequence[int] = ()
    unreadable: set[int] = field(default_factory=set)

    @property
    def before(self) -> dict[str, Any]:
        """What the project was like before us."""
        return dict(self.note.get("before") or {})

    def given(self, annotation: int) -> Row:
        """An answer that was ever set aside as it was given; empty where the store has none."""
        return dict(self.kept.get(annotation, {}).get("annotation", {}))

    def said(self, annotation: Row, original: Row) -> dict[str, bool]:
        """What a person has said of an answer after it was set aside, see `said_since`."""
        return said_since(annotation, original, self.kept.get(int(annotation["id"]), {}).get("left", {}))


def look(
    studio: LabelStudio,
    project: int,
    settings: Settings,
    note: Mapping[str, Any] | None = None,
    kept: Kept | None = None,
    every: bool = False,
) -> Attached:
    """Read what there is of us in a project.

    Args:
        studio: with the key of somebody who may change the project.
        project: Label Studio's project id.
        settings: our address.
        note: what the store remembers of our note, for what Label Studio has no longer.
        kept: what the store has of answers that were set aside.
        every: whether to look at all tasks with an annotation, also skipped ones.
    """
    ours = our_backend(studio, project, settings)
    written = {**(note or {}), **note_of(ours)}
    account = keeper_account(studio, project)
    keeper = int(written.get("keeper") or account)
    config = config_of(studio, project, written)
    rows = list(studio.tasks(project))
    annotated = {
        int(row["id"]): str(row["updated_at"])
        for row in rows
        if row.get("total_annotations") or row.get("cancelled_annotations")
    }
    here = Attached(studio, settings, project, ours, written, account, keeper, config, kept or {}, annotated)
    return replace(here, answers=sorted(tasks_to_read(here, rows, every)))


def config_of(studio: LabelStudio, project: int, note: Mapping[str, Any]) -> ProjectConfig | None:
    """What the label config means now; None if it cannot be used."""
    try:
        return parse(studio.label_config(project), recorded=note)
    except ConfigError:
        return None


def tasks_to_read(here: Attached, rows: Sequence[Row], every: bool) -> set[int]:
    """Tasks that can have a coarse answer, by what a light listing tells."""
    found = tasks_aside(here)
    skipped = {int(row["id"]) for row in rows if row.get("cancelled_annotations")}
    found |= skipped if every else skipped & tasks_of(here.kept)
    if every or (here.config is not None and here.config.coarse is not None):
        found |= {int(row["id"]) for row in rows if row.get("total_annotations")}
    return found


def tasks_of(kept: Kept) -> set[int]:
    """Tasks of answers that were ever set aside."""
    return {int(row["task"]) for annotation in kept if (row := kept.get(annotation))}


def tasks_aside(here: Attached) -> set[int]:
    """Tasks with a copy of a coarse answer, or with one that is handed to our account."""
    return here.studio.tasks_with_version(here.id, COARSE_COPY) | tasks_of_keeper(here)


def tasks_of_keeper(here: Attached) -> set[int]:
    """Tasks with an annotation that is handed to our account."""
    return here.studio.tasks_annotated_by(here.id, here.account) if here.account else set()


def opened_since() -> str:
    """The earliest time, as Label Studio writes it, from which somebody may still have something open."""
    return (datetime.now(UTC) - OPEN).strftime("%Y-%m-%dT%H:%M:%S")


def readable(here: Attached, tasks: Iterable[int]) -> Iterator[Row]:
    """The tasks that still exist, with annotations and predictions; others are remembered in `here.unreadable`."""
    left = [task for task in tasks if task not in here.unreadable]
    return here.studio.full_tasks(here.id, left, here.unreadable)


def does(change: Callable[..., object], *args: object) -> Run:
    """A step that is one call and has nothing to tell."""

    def run() -> list[str]:
        change(*args)
        return []

    return run


def one_by_one(tasks: Iterable[T], total: int, change: Callable[[T], Iterable[str]]) -> Iterator[str]:
    """Change one of `total` tasks after another; gives what there is to say of one, and how far it is."""
    for number, task in enumerate(tasks, 1):
        yield from change(task)
        if number % PAGE == 0:
            yield f"  {number} of {total} tasks"
