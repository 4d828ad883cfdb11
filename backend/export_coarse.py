"""All coarse answers of a project, to a file: whatever people gave, whatever became of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.answers_file import write_answers
from backend.attached import Attached, Kept, look, readable
from backend.coarse_answers import is_cluster, is_vote, original_of
from backend.detach_answers import as_given, orphans, regions_of, set_aside
from backend.errors import AttachRefused
from backend.labelstudio import LabelStudio, Row
from backend.settings import Settings


def export_answers(
    studio: LabelStudio, project: int, settings: Settings, note: Mapping[str, Any], kept: Kept, file: Path
) -> int:
    """Write every annotation with a coarse label to a file; changes nothing in Label Studio.

    Args:
        studio: Label Studio.
        project: Label Studio's project id.
        settings: our address.
        note: what the store remembers of our note.
        kept: what the store has of answers that were set aside. Written where Label Studio has them no longer.
        file: is replaced.

    Returns:
        How many there are.

    Raises:
        AttachRefused: the file cannot be written; or it is, without tasks that Label Studio cannot show.
    """
    here, count = look(studio, project, settings, note, kept, every=True), 0

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in all_rows(here):
            count += len(row["annotations"])
            yield row

    write_answers(counted(), file)
    if here.unreadable:
        tasks = ", ".join(map(str, sorted(here.unreadable)))
        raise AttachRefused(f"{count} coarse labels are in {file}, but Label Studio cannot show task {tasks}")
    return count


def all_rows(here: Attached) -> Iterator[Row]:
    """Tasks with their coarse answers; after them what the store alone has."""
    known = set()
    for task in readable(here, here.answers):
        if answers := coarse_of(here, task):
            known |= {answer.get("id") for answer in answers}
            yield {"id": task["id"], "data": task["data"], "annotations": answers}
    for number in here.kept:
        if number not in known and (old := here.kept.get(number)):
            yield {"id": old["task"], "annotations": [old["annotation"]]}


def coarse_of(here: Attached, task: Row) -> list[Row]:
    """Annotations of a task with a coarse label, also skipped ones and those with other labels beside it."""
    aside = {int(row["id"]): original for row, original in set_aside(here, task)}
    rows = [
        as_given(here, row, aside[row["id"]]) if row["id"] in aside else row for row in task.get("annotations") or []
    ]
    found = [row for row in rows if has_coarse(here, row) or row["id"] in aside]
    return [*found, *(original_of(copy) for copy in orphans(task))]


def has_coarse(here: Attached, annotation: Row) -> bool:
    """Whether a region was drawn with the coarse control, or was made from a cluster."""
    config = here.config
    return any(is_vote(region, config) if config else is_cluster(region) for region in regions_of(annotation))
