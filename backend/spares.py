"""Predictions of tasks that stay at the head for long: used again, id and all, by a later order.

Each order gives its head's tasks a prediction, and those of old orders are kept for days, since an editor that somebody
has open names the one it began from. A task that nobody picks would gather one for each order. So a task with `MOST` of
them gets no new one: its oldest gets the place and the prelabel of the order to come.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from backend.context import Context
from backend.errors import LabelStudioError
from backend.project import Project

log = logging.getLogger(__name__)

#: Old predictions that a task at the head may have before they are used again.
MOST = 10


def known(project: Project) -> dict[str, Any]:
    """`kept`: old predictions by task, the oldest first; `moving`: those that go into the order `queue` just now."""
    return dict(project.store.read_json(project.key("spares.json")) or {"kept": {}})


def keep(project: Project, gathered: Iterable[tuple[int, int]]) -> None:
    """Note that these (task, prediction) were taken out of an old order and stay for those who have them open."""
    said, index = known(project), project.index()
    kept = {task: ids for task, ids in said["kept"].items() if int(task) in index}
    for task, prediction in gathered:
        if task in index and prediction not in kept.setdefault(str(task), []):
            kept[str(task)].append(prediction)
    project.store.write_json(project.key("spares.json"), {**said, "kept": kept})


def move(ctx: Context, project: Project, rows: Sequence[dict[str, Any]], queue: str) -> list[dict[str, Any]]:
    """Give the places of an order that is about to be sent to spare predictions.

    Args:
        ctx: where Label Studio is.
        project: whose order it is.
        rows: rank predictions to send, each with its `task`.
        queue: version of them all.

    Returns:
        The rows that need a new prediction.
    """
    said = known(project)
    moving = {r["task"]: ids[0] for r in rows if len(ids := said["kept"].get(str(r["task"]), [])) >= MOST}
    if not moving:
        return list(rows)
    kept = {task: [number for number in ids if number != moving.get(int(task))] for task, ids in said["kept"].items()}
    # Noted before: after a death in between they are taken back before that order's version is deleted.
    project.store.write_json(project.key("spares.json"), {"kept": kept, "moving": moving, "queue": queue})
    new = []
    for row in rows:
        prediction = moving.get(row["task"])
        if prediction is None or not patched(ctx, prediction, {n: v for n, v in row.items() if n != "task"}):
            new.append(row)
    return new


def take_back(ctx: Context, project: Project, queue: str, later: str) -> None:
    """Save spare predictions from an order that died half-way, before its version is deleted.

    Args:
        ctx: where Label Studio is.
        project: whose order it is.
        queue: version to be deleted.
        later: version under which old predictions are gathered.
    """
    said = known(project)
    if said.get("queue") != queue:
        return
    for prediction in said["moving"].values():
        patched(ctx, prediction, {"model_version": later, "result": []})
    keep(project, [(int(task), prediction) for task, prediction in said["moving"].items()])


def patched(ctx: Context, prediction: int, fields: dict[str, Any]) -> bool:
    """Change a prediction; False where it is gone."""
    try:
        ctx.studio.patch_prediction(prediction, **fields)
    except LabelStudioError as error:
        if error.status != 404:
            raise
        return False
    return True
