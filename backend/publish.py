"""The order -> Label Studio: rank predictions, an atomic flip, old generations removed afterwards."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from backend.ahead import ahead
from backend.coarse_answers import (
    COARSE_COPY,
    SKIPS,
    active,
    copies_of,
    copy_of,
    digest,
    give_back,
    is_served,
    may_be_set_aside,
    original_of,
    record_of,
    untouched,
)
from backend.connection import need_backend
from backend.context import Context
from backend.errors import InUseError, JobError, LabelStudioError
from backend.faults import noted
from backend.generations import VERSION, gathering, queue_name, remember
from backend.label_config import ProjectConfig
from backend.model_in_force import model_in_force
from backend.own_updates import change, refuse_drafted
from backend.prelabels import regions
from backend.prepare import clusters_name
from backend.project import HEAD, Index, Project, TaskRecord, stages
from backend.rank import Place, guesses
from backend.spares import move, take_back
from backend.sync import check_config

log = logging.getLogger(__name__)

#: Predictions per request. Label Studio counts all tasks of the project anew after each import, however small: 8 s for
#: 10,000 tasks, so few large requests; this many stay below its limit, with prelabels for the head.
CHUNK = 50_000
#: Orders of more places than this are changed at their head, and imported anew after so many changes.
SMALL, CHANGES = 500, 50
#: Why coarse labels are set aside.
WANTED = "task {} is wanted in full and its coarse label is to be set aside"
#: Has the store hold the masks of these tasks.
Show = Callable[[Sequence[int]], object]


def publish_order(
    ctx: Context,
    project: Project,
    index: Index,
    config: ProjectConfig,
    places: Sequence[Place],
    number: int,
    show: Show | None = None,
    again: bool = True,
) -> dict[str, Any]:
    """Have Label Studio serve exactly these places, in this order.

    Everything is put in place under a new name first; one request then makes it the order in force. A round that
    dies in between leaves the old order; the next one starts over.

    Args:
        ctx: the doors.
        project: which project.
        index: its tasks.
        config: its label config.
        places: the order.
        number: of the round.
        show: has the store hold the masks of these tasks, where they are not made for all beforehand.
        again: whether an earlier try of the round may have left something.

    Returns:
        The project's new state, already stored.

    Raises:
        NotAttached: our ML backend is gone from the project; nothing was changed.
        StartAnew: the label config was changed; the old order stays in force.
    """
    need_backend(ctx.studio, project.id, ctx.settings)
    in_force_now = str(check_config(ctx, project)["model_version"] or "")
    show = show or (lambda _: None)
    tasks = [place.task for place in places]
    show([place.task for place in places if place.ask == "coarse"])  # guesses of clusters go by them
    served = standing(project, tasks, in_force_now)
    state = new_state(ctx, project, index, config, places, number)
    if served is not None:
        state["queue"] = served["queue"]
    elif not places:  # there is nothing to serve: what Label Studio sorts by stays
        state["queue"] = in_force_now
    ctx.board.go_on(project.id)
    answer_for(ctx, project, state)
    if served is not None:
        move_head(ctx, project, config, tasks, state, served, show)
        show(tasks[:HEAD])
    elif places:
        show(tasks[:HEAD])
        if again:
            delete_half(ctx, project, state["queue"])
        send(ctx, project, config, places, state)
        ctx.board.go_on(project.id)
        check_config(ctx, project)
        # Label Studio sorts by this version from now on. Our ML backend keeps its old title until `clean_generations`.
        ctx.studio.patch_project(project.id, model_version=state["queue"])
        project.store.write_json(project.key("served.json"), {"queue": state["queue"], "tasks": tasks, "changes": 0})
    remember(project, number, tasks, state["queue"])
    project.store.write_json(project.key("ranking.json"), [dict(vars(place)) for place in places])
    project.store.write_json(project.key("state.json"), state)  # the last word: this order is served
    ctx.board.set_state(project.id, state)
    return state


def answer_for(ctx: Context, project: Project, state: dict[str, Any]) -> None:
    """Have `/setup` and `/predict` answer for an order that is about to be served.

    Only for what they answer from: `round`, `queue` and `basis` name the order that is served, until this one is.
    """
    answered = {name: state[name] for name in ("version", "model", "masks", "clusters", "coarse")}
    before = project.state()
    if before:
        ctx.board.set_state(project.id, {**before, **answered})


def standing(project: Project, tasks: Sequence[int], version: str) -> dict[str, Any] | None:
    """The large order that Label Studio serves, if changing its head is enough to serve these tasks; else None.

    `version` is the one in force.

    Label Studio sorts a task by the lowest score among its predictions of the version in force. So one small prediction
    more takes a task to the front, and the thousands behind it stay as they are until `CHANGES` heads have changed.
    """
    served = project.store.read_json(project.key("served.json")) or {}
    if len(tasks) <= SMALL or served.get("changes", CHANGES) >= CHANGES:
        return None
    if not set(tasks) <= set(served["tasks"]):
        return None  # a task without a place would never be served
    return served if version == served["queue"] else None


def move_head(
    ctx: Context,
    project: Project,
    config: ProjectConfig,
    tasks: Sequence[int],
    state: dict[str, Any],
    served: dict[str, Any],
    show: Show,
) -> None:
    """Bring the first tasks to the front of the order in force, by as few predictions as that takes."""
    wanted = set(tasks)
    order = [task for task in served["tasks"] if task in wanted]
    head = moved(tasks[:HEAD], order)
    # Counted before anything is sent: after a death in between these scores are not used for another head.
    served = {**served, "changes": served["changes"] + bool(head)}
    project.store.write_json(project.key("served.json"), served)

    def prelabels() -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for task in head:  # the first one first: it is what the next person gets
            show([task])
            yield task, regions(project, config, task, state)

    with closing(ahead(prelabels())) as made:  # ... while Label Studio takes in those before
        for position, (task, result) in enumerate(made):
            ctx.board.go_on(project.id)
            score = head_score(served["changes"], position)
            row = {"task": task, "result": result, "score": score, "model_version": served["queue"]}
            if move(ctx, project, [row], served["queue"]):
                ctx.studio.create_prediction(task, result, served["queue"], score)
    served["tasks"] = list(dict.fromkeys([*head, *order]))
    project.store.write_json(project.key("served.json"), served)


def moved(head: Sequence[int], order: Sequence[int]) -> list[int]:
    """The shortest beginning of a head that must be brought to the front of an order for it to begin with the head."""
    for size in range(len(head)):
        first = set(head[:size])
        rest = (task for task in order if task not in first)
        if list(islice(rest, len(head) - size)) == list(head[size:]):
            return list(head[:size])
    return list(head)


def head_score(change: int, position: int) -> float:
    """The score of a place in the `change`-th head (1 to `CHANGES`), 0 to 0.5: lower than in all heads before."""
    return 0.5 * (CHANGES - change + position / HEAD) / CHANGES


def full_score(position: int, places: int) -> float:
    """The score of a place when a whole order is imported; large ones leave room for heads before them."""
    return position / places if places <= SMALL else 0.5 + 0.5 * position / places


def new_state(
    ctx: Context, project: Project, index: Index, config: ProjectConfig, places: Sequence[Place], number: int
) -> dict[str, Any]:
    """The small state that the web process answers from."""
    model = model_in_force(ctx, project, config)
    coarse = {str(p.task): guesses(ctx, project, index[p.task], config) for p in places if p.ask == "coarse"}
    return {
        "round": number,
        "queue": queue_name(number),
        "version": f"{VERSION}-{number}",
        "model": model.name,
        "masks": model.masks,
        "clusters": clusters_name(ctx, project),
        "phase": "coarse" if coarse else "full",
        "coarse": coarse,
        "stages": stages(index),
        "note": model.note,
        "published": time.time(),
        "basis": basis(ctx, project, index, config),
        "tasks": len(places),
    }


def basis(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> str:
    """Names all that an order depends on: equal basis, equal order."""
    tasks = [(r.id, r.image, r.stage, r.version, r.callable, r.error) for r in index.values()]
    wishes = (ctx.settings.strategy, ctx.settings.coarse_tasks, config)
    compared = model_in_force(ctx, project, config).compared
    return hashlib.sha1(repr((sorted(tasks), wishes, compared)).encode()).hexdigest()


def in_force(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> bool:
    """Whether the order that Label Studio sorts by now was made from just what we know, and all that tells is there."""
    state, store = project.state(), project.store  # the store's: Redis may tell of an order that was never served
    if not state or state.get("basis") != basis(ctx, project, index, config) or not ctx.board.state(project.id):
        return False
    if any(store.read_json(project.key(name)) is None for name in ("ranking.json", "generations.json")):
        return False
    if not state["tasks"]:
        return True
    served = store.read_json(project.key("served.json")) is not None
    return served and bool(ctx.studio.version_in_force(project.id) == state["queue"])


def send(ctx: Context, project: Project, config: ProjectConfig, places: Sequence[Place], state: dict[str, Any]) -> None:
    """Import one rank prediction per place; 0 is the head.

    The head's carry their prelabels: for projects whose first ML backend is another (Label Studio asks only that),
    for tasks opened from the Data Manager, and while old generations are deleted.

    Raises:
        JobError: Label Studio kept fewer than were sent.
    """
    rows = []
    for position, place in enumerate(places):
        result = regions(project, config, place.task, state) if position < HEAD else []
        score = full_score(position, len(places))
        rows.append({"task": place.task, "result": result, "score": score, "model_version": state["queue"]})
    new = move(ctx, project, rows, state["queue"])
    for start in range(0, len(new), CHUNK):
        chunk = new[start : start + CHUNK]
        ctx.board.go_on(project.id)
        created = ctx.studio.import_predictions(project.id, chunk)
        if created != len(chunk):
            raise JobError(
                f"Label Studio kept {created} of {len(chunk)} rank predictions of project {project.id}: "
                "its log names those it dropped; the old order stays in force"
            )


def delete_half(ctx: Context, project: Project, version: str) -> None:
    """Delete what a publish that died half-way has left of this version, if anything."""
    if version in ctx.studio.versions(project.id):
        take_back(ctx, project, version, gathering(project, version))
        ctx.studio.delete_version(project.id, version)


def mark_asked(index: Index, places: Sequence[Place]) -> Index:
    """The index in which each task that shows clusters says so."""
    asked = {place.task: replace(index[place.task], asked=True) for place in places if place.ask == "coarse"}
    return {**index, **asked}


def call_back(ctx: Context, project: Project, index: Index, places: Sequence[Place]) -> Index:
    """Open coarse-labelled tasks at the head of the order for full segmentation.

    Copy first, then change: a death in between leaves the annotation as it was, and the next round starts over.
    """
    index, records = dict(index), (index[place.task] for place in places)
    due = [record for record in records if record.stage == "coarse" and record.callable and not record.error]
    if due:
        need_backend(ctx.studio, project.id, ctx.settings)  # as late as can be: what follows touches people's work
    for record in due:
        try:
            index[record.id] = reopen(ctx, project, record)
        except Exception as error:
            index[record.id] = noted(ctx.studio, project.id, record, error)
    return index


def reopen(ctx: Context, project: Project, record: TaskRecord) -> TaskRecord:
    """Set a task's coarse answers aside, so that Label Studio serves the task again.

    Returns:
        The record, as it was where anything about the task's annotations is not what was read: a person was faster,
        and the next round looks at the task anew.

    Raises:
        InUseError: somebody has a draft of one of the answers, which Label Studio would delete.
    """
    check_config(ctx, project)
    config, extra = project.config(), project.extra()
    task = ctx.studio.task(record.id, project.id)
    rows, keeper = active(task), int(extra.get("keeper", 0))
    free = all(may_be_set_aside(task, row, config, str(extra.get("since", "")), keeper) for row in rows)
    known = any(row["id"] == record.annotation for row in rows)
    if not (known and free and is_served(task, rows, str(extra.get("skips")))):
        ctx.board.remember(project.id, [record.id])
        return record
    refuse_drafted(ctx, record.id, rows, WANTED.format(record.id))
    if not all(set_aside(ctx, project, task, row, keeper) for row in rows):
        ctx.board.remember(project.id, [record.id])
        return record
    log.info("project %d, task %d: coarse labels set aside, task open again", project.id, record.id)
    now = ctx.studio.task(record.id, project.id)
    left = {row["id"]: digest(row) for row in now["annotations"] if row["was_cancelled"]}
    if active(now) or any(left.get(row["id"]) != digest(row) for row in rows):  # somebody was at work at this moment
        ctx.board.remember(project.id, [record.id])
    return replace(record, stage="returned", annotation=0, callable=False, updated_at=now.get("updated_at", ""))


def set_aside(ctx: Context, project: Project, task: dict[str, Any], annotation: dict[str, Any], keeper: int) -> bool:
    """Copy an annotation, hand it to our keeper as a skipped one, and look whether it still is what was copied.

    Returns:
        Whether it is; else a person has changed it meanwhile, and it counts again, as theirs if they still have an
        account.

    Raises:
        InUseError: somebody has begun a draft of it meanwhile.
    """
    ctx.board.go_on(project.id)
    content, number = digest(annotation), int(annotation["id"])
    project.store.write_json(project.coarse_answer_key(number), record_of(task["id"], annotation))
    known = {int(row["id"]): original_of(row) for row in copies_of(task)}
    same = [copy for copy, row in known.items() if row.get("id") == number and digest(row) == content]
    copy = same[0] if same else ctx.studio.create_prediction(task["id"], copy_of(annotation), COARSE_COPY)
    more = SKIPS[str(project.extra()["skips"])]
    try:
        refuse_drafted(ctx, task["id"], [annotation], WANTED.format(task["id"]))
        if untouched(now := ctx.studio.annotation(number), annotation):
            row = change(ctx, project.id, now, was_cancelled=True, completed_by=keeper)
            if untouched(row, annotation, "was_cancelled", "updated_at"):
                left = row
                if more:  # by itself: a mark that a person has made just now shows in the answer above
                    left = change(ctx, project.id, {**row, "updated_at": now["updated_at"]}, **more)
                record = record_of(task["id"], annotation, row["updated_at"], left)
                project.store.write_json(project.coarse_answer_key(number), record)
                return True
            original = {**annotation, "ground_truth": row["ground_truth"]}
            give_back(ctx.studio, number, original, partial(change, ctx, project.id, row))
    except InUseError:
        ctx.studio.delete_prediction(copy)
        raise
    except LabelStudioError as error:
        if error.status == 400:
            raise LabelStudioError(
                f"task {task['id']}: Label Studio does not let its coarse labels be set aside, so they stay "
                f"({error}): run `firstrow attach --project {project.id}` again",
                400,
            ) from error
        if error.status != 404:
            raise
    ctx.studio.delete_prediction(copy)
    return False
