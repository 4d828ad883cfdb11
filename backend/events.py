"""What Label Studio tells us: webhook payload -> Event, or None for what is not for us.

Knows every payload shape of Label Studio 1.23. Handling an event only remembers ids and asks for a round, so an event
that comes twice, or late, costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from backend.coarse_answers import digest
from backend.enqueue import Board
from backend.errors import FirstRowError

log = logging.getLogger(__name__)

#: Events that name the tasks they changed. A skip comes as ANNOTATION_CREATED too: no annotation to train on, but the
#: task's stage is another one.
TASK_KEYS = {
    "ANNOTATION_CREATED": "task",
    "ANNOTATION_UPDATED": "task",
    "ANNOTATIONS_CREATED": "task",
    "TASKS_CREATED": "tasks",
    "TASKS_DELETED": "tasks",
}
#: No id of Label Studio is larger: its database counts no further.
LARGEST_ID = 2**63 - 1
#: All that is for us.
EVENTS = (*TASK_KEYS, "ANNOTATIONS_DELETED", "PROJECT_UPDATED", "START_TRAINING")


class EventError(FirstRowError):
    """A webhook payload without what its action should carry."""


@dataclass(frozen=True)
class Event:
    """One thing that happened in a project.

    Attributes:
        action: Label Studio's name of it.
        project: Label Studio's project id.
        tasks: ids of the tasks that changed, came or went.
        deleted: ids of deleted annotations; Label Studio does not say of which tasks.
        meaning: the project's label config and what becomes of skipped tasks, for PROJECT_UPDATED only, else empty.
        annotation: as it was saved, for ANNOTATION_UPDATED only.
    """

    action: str
    project: int
    tasks: tuple[int, ...] = ()
    deleted: tuple[int, ...] = ()
    meaning: str = ""
    annotation: Mapping[str, Any] | None = None


def parse(payload: object) -> Event | None:
    """Read a webhook payload.

    Args:
        payload: the decoded JSON body.

    Returns:
        The event, or None for an action that is not for us.

    Raises:
        EventError: the payload lacks what its action should carry.
    """
    if not isinstance(payload, Mapping) or not isinstance(payload.get("action"), str):
        raise EventError("webhook: the body is not an object with an action; Label Studio sends one")
    action = payload["action"]
    if action in TASK_KEYS:
        row = payload.get("annotation") if action == "ANNOTATION_UPDATED" else None
        kept = dict(row) if isinstance(row, Mapping) and isinstance(row.get("id"), int) else None
        return Event(action, _project(payload, action), tasks=_tasks(payload, action), annotation=kept)
    if action == "ANNOTATIONS_DELETED":
        return Event(action, _project(payload, action), deleted=_ids(payload.get("annotations"), action))
    if action == "PROJECT_UPDATED":
        return Event(action, _project(payload, action), meaning=_meaning(payload))
    if action == "START_TRAINING":
        return Event(action, _project(payload, action))
    return None


def handle(event: Event, board: Board) -> str | None:
    """Remember what changed and ask for a round; takes milliseconds.

    Returns:
        The id of the job that starts the round, None when the event changes nothing for us.

    Raises:
        redis.RedisError: Redis cannot be reached; the periodic reconcile will find the change.
    """
    if event.action == "START_TRAINING":
        return board.request_round(event.project, "start training", train=True)
    if event.action == "PROJECT_UPDATED":
        return _config_changed(event, board)
    if not (event.tasks or event.deleted) or _is_our_own(event, board):
        return None
    log.info(
        "project %d: %s, %d tasks, %d annotations", event.project, event.action, len(event.tasks), len(event.deleted)
    )
    return board.changed(event.project, event.tasks, event.deleted)


def _is_our_own(event: Event, board: Board) -> bool:
    # Other regions than those that we left are a person's: where they were saved while we changed the same annotation,
    # Label Studio may have written ours over theirs, so theirs are kept until somebody has looked.
    annotation = event.annotation
    if not annotation or "result" not in annotation:
        return False
    number, at = int(annotation["id"]), str(annotation.get("updated_at"))
    ours = board.own_update(event.project, number)
    if not ours:
        return False
    saved = {"id": number, "result": _built(annotation["result"]), "updated_at": at}
    if digest(saved) == ours["content"]:
        return ours.get("done", at) == at
    board.keep_update(event.project, number, saved)
    return False


def _built(result: object) -> object:
    """The regions of an annotation, which the web process leaves as text until they are asked for."""
    try:
        return orjson.loads(result) if isinstance(result, bytes) else result
    except ValueError as error:
        raise EventError("webhook ANNOTATION_UPDATED: its result is not JSON") from error


def _config_changed(event: Event, board: Board) -> str | None:
    # Any change of a project arrives here, also our own moves of its model version: only a new meaning counts.
    key = f"firstrow:{event.project}:meaning"
    seen = hashlib.sha256(event.meaning.encode()).hexdigest()
    before = board.redis.set(key, seen, get=True)
    if isinstance(before, bytes) and before.decode() == seen:
        return None
    return board.request_round(event.project, "label config, or what becomes of skipped tasks, changed")


def project_id(value: object) -> int:
    """The project id in what Label Studio calls a project: 7, "7", "7.1795345419" or {"id": 7, ...}.

    Raises:
        EventError: there is none in it.
    """
    if isinstance(value, Mapping):
        value = value.get("id")
    text = value.split(".", 1)[0] if isinstance(value, str) else f"{value:d}" if is_id(value) else ""
    number = text.isascii() and text.isdigit() and len(text) < 20
    if not isinstance(value, int | str) or isinstance(value, bool) or not (number and is_id(int(text))):
        raise EventError(f"{str(value)[:40]!r} names no project; Label Studio sends its id")
    return int(text)


def is_id(value: object) -> bool:
    """Whether this can be an id of Label Studio's database."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_ID


def _project(payload: Mapping[str, Any], action: str) -> int:
    if "project" not in payload:
        raise EventError(f"webhook {action}: no project in it; turn on 'Send payload' for this webhook")
    return project_id(payload["project"])


def _tasks(payload: Mapping[str, Any], action: str) -> tuple[int, ...]:
    found = payload.get(TASK_KEYS[action])
    if found is None and "annotation" in payload:
        rows = payload["annotation"]
        found = [_field(row, "task") for row in (rows if isinstance(rows, list) else [rows])]
    return _ids(found, action)


def _ids(rows: object, action: str) -> tuple[int, ...]:
    """The ids of one row or many, each an id or an object with one; sorted, each once."""
    ids = {_field(row, "id") for row in (rows if isinstance(rows, list) else [rows])}
    if not all(is_id(i) for i in ids):
        raise EventError(f"webhook {action}: an id is missing in it; turn on 'Send payload' for this webhook")
    return tuple(sorted(ids))


def _field(row: object, name: str) -> Any:
    """The named field of an object; anything else (an id, say) as it is, unhashable things as None."""
    value = row.get(name) if isinstance(row, Mapping) else row
    return None if isinstance(value, list | Mapping) else value


def _meaning(payload: Mapping[str, Any]) -> str:
    project = payload["project"]
    config = project.get("label_config") if isinstance(project, Mapping) else None
    if not isinstance(config, str):
        raise EventError("webhook PROJECT_UPDATED: no label config in it; turn on 'Send payload' for this webhook")
    return f"{project.get('skip_queue')} {config}"
