"""Our changes of people's annotations, and what Label Studio may lose to them.

Label Studio reads a whole annotation, changes it and writes it whole: what a person saves in these milliseconds is
overwritten by what was there before. Its event still tells us of it; `change` says when we wrote, and `put_back` puts
back what was lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from backend.coarse_answers import digest
from backend.context import Context
from backend.errors import InUseError
from backend.labelstudio import Row
from backend.transport import TIMEOUT

log = logging.getLogger(__name__)

#: Seconds before we wrote at which what we lost can have been saved: no request is waited for any longer.
LONGEST = TIMEOUT[1]


def change(ctx: Context, project: int, seen: Row, **fields: object) -> Row:
    """Change fields of an annotation.

    Args:
        ctx: the doors.
        project: Label Studio's project id.
        seen: the annotation as it was just read.
        fields: Label Studio's names and values.

    Returns:
        The annotation as it is then.
    """
    number, content = int(seen["id"]), digest({"result": fields.get("result", seen.get("result"))})
    ctx.board.expect_own_update(project, number, content, str(seen.get("updated_at")))
    row = ctx.studio.patch_annotation(number, **fields)
    ctx.board.own_update_is_done(project, number, str(row.get("updated_at")))
    return row


def refuse_drafted(ctx: Context, task: int, annotations: Iterable[Row], what: str) -> None:
    """Leave annotations alone while somebody has a draft of one, which Label Studio would delete.

    Args:
        ctx: the doors.
        task: their task.
        annotations: what would be changed.
        what: why, in half a sentence.

    Raises:
        InUseError: somebody has.
    """
    drafted = ctx.studio.drafted(task)
    if any(row["id"] in drafted for row in annotations):
        raise InUseError(
            f"{what}, but somebody goes on with it in a draft: that happens once the draft is submitted or deleted"
        )


def put_back(ctx: Context, project: int, task: Row) -> bool:
    """Put back what people saved in a task's annotations while we changed them, where Label Studio has lost it.

    Returns:
        Whether an annotation was changed.

    Raises:
        InUseError: somebody has a draft of it.
    """
    return sum(_put_back(ctx, project, row) for row in task.get("annotations") or []) > 0


def _put_back(ctx: Context, project: int, row: Row) -> bool:
    number = int(row["id"])
    saved, ours = ctx.board.missed_update(project, number), ctx.board.own_update(project, number)
    if saved is None or "done" not in ours:
        return False
    lost = is_lost(saved, row, ours)
    if lost:
        refuse_drafted(ctx, row["task"], [row], f"annotation {number} is to be as it was saved while we changed it")
        log.warning("project %d, annotation %d: put back what was saved while we changed it", project, number)
        change(ctx, project, row, result=saved["result"])
    ctx.board.forget_missed_update(project, number)
    return lost


def is_lost(saved: Mapping[str, Any], row: Row, ours: Mapping[str, str]) -> bool:
    """Whether Label Studio has overwritten what a person saved with what we wrote.

    Args:
        saved: the annotation as its event told.
        row: as Label Studio shows it now.
        ours: of our last change: digest of its regions (`content`), time of the annotation before (`seen`) and after
            (`done`).

    Returns:
        True where it was saved between what we read and what we wrote, in the last `LONGEST` seconds before that, and
        nobody has saved anything since.
    """
    if row.get("updated_at") != ours["done"] or digest(row) != ours["content"]:
        return False
    try:
        seen, at, done = (datetime.fromisoformat(str(t)) for t in (ours["seen"], saved.get("updated_at"), ours["done"]))
    except ValueError:
        return False
    return seen < at <= done and (done - at).total_seconds() < LONGEST
