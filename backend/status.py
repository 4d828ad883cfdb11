"""What `firstrow status` says of a project: read from Redis, the store and Label Studio, changed nowhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from backend.attach import check
from backend.comparison import comparison
from backend.context import Context
from backend.enqueue import Board
from backend.errors import FirstRowError
from backend.project import Index, Project
from backend.worker import alive

#: Seconds until no worker counts as running: Redis may have lost its memory, and whoever works signs in anew.
PATIENCE = 2.0
#: Places of the queue, and unusable tasks, that are shown in a terminal; as JSON all of the latter are.
SHOWN, SHOWN_UNUSABLE = 10, 50


def status(ctx: Context, project: int) -> dict[str, Any]:
    """Collect the state of a project.

    Args:
        ctx: the doors.
        project: Label Studio's project id.

    Returns:
        `project`, `round`, `phase`, `version`, `model`, `note`, `published` (seconds since the epoch), `tasks` (in
        the queue), `stages` (tasks per stage), `without_mask` (tasks with answers that are no mask and that we leave
        alone: Label Studio does not serve them again), `waiting` (whether changes wait for a round), `jobs` (of the
        round in progress, with `done` of `total`), `labels` (what there is to say of single labels), `workers`,
        `head` (first places of the queue: task, ask, utility, parts, why, kind), `unusable` (`count`, and the `tasks`
        by id: task, reason with its remedy, tries, next_try in seconds since the epoch), `error` (step, message, time;
        None when all is well), `known` (attached, or connected by Label Studio's settings page), `stopped` (by a
        detach), `fine_tuning` (of the head and the network on the newest labels that neither had learnt: `pairs` of
        masks compared, mIoU `head` and `network`, whether the latter's masks are shown (`ahead`), its `version`, and
        how many labels it has `trained` on; empty without a network), `milliseconds` (by step, of the last round by the
        instant learner), `missing` (what `attach` would still add).

    Raises:
        redis.RedisError: Redis cannot be reached.
    """
    here = ctx.project(project)
    index = here.index()
    state = ctx.board.state(project) or here.state()
    fields = {name: state.get(name) for name in ("round", "phase", "version", "model", "note", "published", "tasks")}
    return {
        "project": project,
        **fields,
        "stages": state.get("stages", {}),
        "without_mask": sum(r.stage == "other" or (r.stage == "coarse" and not r.callable) for r in index.values()),
        "labels": labels(here, index),
        "waiting": ctx.board.wished(project),
        "jobs": ctx.board.jobs(project),
        "workers": workers(ctx.board),
        "head": (here.store.read_json(here.key("ranking.json")) or [])[:SHOWN],
        "unusable": unusable(index),
        "error": ctx.board.error(project),
        "known": project in ctx.board.projects() or here.attached(),
        "stopped": ctx.board.stopped(project),
        "fine_tuning": comparison(here),
        "milliseconds": here.store.read_json(here.key("laps.json")) or {},
        "missing": missing(ctx, project),
    }


def workers(board: Board) -> list[dict[str, Any]]:
    """Workers that are there (see `alive`); where none is seen, looks again: each signs in anew every second."""
    until = time.monotonic() + PATIENCE
    while not (there := alive(board)) and time.monotonic() < until:
        time.sleep(0.1)
    return there


def labels(project: Project, index: Index) -> list[dict[str, Any]]:
    """Labels that the label config has lost or gained: `label`, `why` (`gone`, `new`), `tasks`, `says`."""
    try:
        config = project.config()
    except FirstRowError:
        return []  # `missing` says it
    rows = []
    counts = Counter(label for record in index.values() for label in record.lost)
    for label, tasks in sorted(counts.items()):
        says = (
            f"Label {label!r} is not in the label config any more, but {tasks} tasks have it, or coarse labels that "
            "stood for it: those pixels count as unknown. Was it renamed? Then give it its old name back, or relabel "
            "these regions."
        )
        rows.append({"label": label, "why": "gone", "tasks": tasks, "says": says})
    for label in config.regrouped:
        group = config.classes.coarse[int(config.classes.coarse_of()[config.classes.fine.index(label)])]
        says = (
            f"Label {label!r} is new and counts as {group!r}: `firstrow attach --group` says otherwise, or confirms it."
        )
        rows.append({"label": label, "why": "new", "tasks": 0, "says": says})
    return rows


def unusable(index: Index) -> dict[str, Any]:
    """Tasks that take no part: how many, and why."""
    faulty = [index[i] for i in sorted(index) if index[i].error]
    rows = [{"task": r.id, "reason": r.error, "tries": r.tries, "next_try": r.next_try} for r in faulty]
    return {"count": len(faulty), "tasks": rows}


def missing(ctx: Context, project: int) -> list[str]:
    """What `attach` would still add, or why that cannot be told."""
    try:
        return check(ctx.studio, project, ctx.settings)
    except FirstRowError as error:
        return [str(error)]


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print a status as tables."""
    console.print(f"[bold]Project {found['project']}[/bold]  {_summary(found)}", highlight=False)
    if found["stages"]:
        console.print(_table("Tasks", list(found["stages"]), [list(found["stages"].values())]))
    if found["head"]:
        console.print(
            _table("Head of the queue", ["", "task", "asks for", "utility", "because"], _places(found["head"]))
        )
    if found["jobs"]:
        console.print(_table("Jobs of this round", ["step", "queue", "status", "progress"], _jobs(found["jobs"])))
    if found["unusable"]["count"]:
        rows = found["unusable"]["tasks"][:SHOWN_UNUSABLE]
        title = f"Unusable tasks ({len(rows)} of {found['unusable']['count']})"
        console.print(_table(title, ["task", "why, and what to do", "next try"], _faults(rows)))
    if found["milliseconds"]:
        steps = found["milliseconds"]
        columns = [*steps, "together"]
        console.print(_table("Milliseconds of the last round", columns, [[*steps.values(), sum(steps.values())]]))
    workers = [[w["name"], ", ".join(w["queues"]), w["state"]] for w in found["workers"]]
    if workers:
        console.print(_table("Workers", ["name", "queues", "state"], workers))
    for line in _warnings(found):
        console.print(Text(line, style="yellow"))


def _summary(found: Mapping[str, Any]) -> str:
    if not found["round"]:
        return "no round yet"
    minutes = (time.time() - float(found["published"] or 0)) / 60
    model = found["model"] or "no trained model yet"
    return (
        f"round {found['round']}, asks for {found['phase']} labels, {found['tasks']} tasks in the queue, "
        f"version {found['version']}, model {model}, published {minutes:.0f} min ago, "
        f"{'changes wait for the next round' if found['waiting'] else 'nothing new waits'}"
    )


def _places(head: Iterable[Mapping[str, Any]]) -> list[list[object]]:
    return [
        [n + 1, place["task"], place["ask"], _number(place["utility"]), place.get("why") or _parts(place["parts"])]
        for n, place in enumerate(head)
    ]


def _faults(rows: Iterable[Mapping[str, Any]]) -> list[list[object]]:
    now = time.time()
    return [[row["task"], Text(row["reason"]), _wait(row["next_try"] - now)] for row in rows]


def _wait(seconds: float) -> str:
    if seconds <= 0:
        return "now"
    return f"in {seconds / 60:.0f} min" if seconds < 5400 else f"in {seconds / 3600:.0f} h"


def _parts(parts: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in parts.items())


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4g}"


def _jobs(jobs: Iterable[Mapping[str, Any]]) -> list[list[object]]:
    return [[j.get("step"), j["queue"], j["status"], f"{j.get('done', 0)}/{j.get('total', 0)}"] for j in jobs]


def _warnings(found: Mapping[str, Any]) -> Iterable[str]:
    if not (found["known"] or found["stopped"]):
        yield f"This project is not attached: run `firstrow attach --project {found['project']}`."
    if not found["workers"]:
        yield "No worker is running: start `firstrow worker`."
    if found["stopped"]:
        yield "A detach has stopped this project: run it again until it ends, or `firstrow attach` to go on."
    if found["note"]:
        yield str(found["note"])
    if found["fine_tuning"]:
        yield _comparison(found["fine_tuning"])
    if found["error"]:
        yield f"Last error, in {found['error']['step']}: {found['error']['message']}"
    for row in found["labels"]:
        yield str(row["says"])
    if found["without_mask"]:
        yield f"{found['without_mask']} tasks are annotated without a mask: Label Studio will not serve them again."
    for sentence in found["missing"]:
        yield f"Missing: {sentence}"


def _comparison(found: Mapping[str, Any]) -> str:
    network = f"The network {found['version']} was trained on {found['trained']} labels"
    if not found.get("pairs"):
        return f"{network} and waits for new ones to be compared on: people see the masks of the head."
    shown = "the network" if found["ahead"] else "the head"
    return (
        f"{network}. On the last {found['pairs']} labels that neither had learnt: head {found['head']:.3f}, network "
        f"{found['network']:.3f} mIoU. People see the masks of {shown}."
    )


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    return table
