"""Old rank predictions and prelabels: deleted when nobody can have them open any more.

Label Studio's editor submits and updates an annotation with the id of the prediction it started from, and is refused
when that prediction is gone. So a round's predictions outlive it: those that a person may well be correcting (the
head's, and what was fetched for a served task) by days, the many others by as long as a task may be open. What the
editor needs of them is their id alone: after a while they are emptied and gathered under one version for some hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backend.connection import OURS, credentials, our_backend
from backend.context import Context
from backend.enqueue import progress
from backend.errors import LabelStudioError
from backend.labelstudio import Row
from backend.project import HEAD, Project
from backend.spares import keep

log = logging.getLogger(__name__)

#: Rank predictions, and versions that `/setup` names, start like this and end in the round's number.
QUEUE, VERSION = "first-row", "seg"
#: A version of at most this many predictions is deleted at once; others by so many tasks at a time.
AT_ONCE, PAGE = 200, 20
#: Seconds that prelabels of served tasks are kept; Label Studio holds a task for a person for a day.
KEEP_PRELABELS = 2 * 24 * 3600
#: Seconds that a superseded order is kept, for people who opened one of its tasks from the Data Manager ...
KEEP_ORDERS = 3600
#: ... but no more of them than this, and no more predictions in all.
MOST_ORDERS, MOST_PREDICTIONS = 20, 50_000
#: Seconds for which old prelabels are gathered under one version, so that versions do not grow with orders.
GATHER = 6 * 3600
#: Times that our ML backend is given its name, where it is lost.
TRIES = 3


def queue_name(number: int) -> str:
    """Version of the rank predictions of round `number`, and title of our ML backend while it is in force."""
    return f"{QUEUE}-{number}"


def remember(project: Project, number: int, tasks: Sequence[int], queue: str) -> None:
    """Keep when an order was published, and which tasks are its head.

    Args:
        project: whose order it is.
        number: the round.
        tasks: in their order.
        queue: version of its predictions; that of an earlier round, whose head only changed, outlives that round.
    """
    known, head = history(project), list(tasks[:HEAD])
    known[str(number)] = {"published": time.time(), "head": head}
    first = queue.rpartition("-")[2]
    before = known.get(first, {}).get("head", [])
    known[first] = {"published": time.time(), "head": [*before, *(task for task in head if task not in before)]}
    project.store.write_json(project.key("generations.json"), known)


def begin(project: Project, number: int) -> bool:
    """Note that predictions may be named after a round from now on, also if it dies before its order is served.

    Returns:
        Whether that was noted before: the round has died, and goes on.
    """
    known = history(project)
    again = str(number) in known
    if not again:
        known[str(number)] = {"published": time.time(), "head": []}
        project.store.write_json(project.key("generations.json"), known)
    return again


def history(project: Project) -> dict[str, Any]:
    """What is known of earlier orders, by round."""
    return dict(project.store.read_json(project.key("generations.json")) or {})


def clean_generations(ctx: Context, project: Project) -> None:
    """Delete predictions of ours that are too old to be open anywhere.

    Label Studio unsets the order in force at any deletion while our ML backend has its name. So the backend gets that
    name, by which Label Studio asks it for prelabels of every served task, only when the deletions are done. For the
    same reason, and since one could delete what another has just gathered, only one process at a time cleans up.
    """

    def run() -> None:
        try:
            clean_versions(ctx, project)
        except LabelStudioError as error:
            log.warning("project %d: old predictions stay for now: %s", project.id, error)
        take_name(ctx, project)

    ctx.board.alone(project.id, "clean", run)


def clean_versions(ctx: Context, project: Project) -> None:
    """Delete the versions that may go, and gather old prelabels; gives way to jobs that wait after doing a little."""
    state, known = project.state(), history(project)
    current, before = int(state.get("round", 0)), set(project.extra().get("before", {}).get("versions", []))
    sizes = {v: n for v, n in ctx.studio.versions(project.id).items() if OURS.fullmatch(v) and v not in before}
    rounds = {version: int(version.rpartition("-")[2]) for version in sizes}
    for number in {current, *(number for version, number in rounds.items() if version.startswith(QUEUE))}:
        if number <= current:  # the store was lost: count from now
            known.setdefault(str(number), {"published": time.time(), "head": []})
    rounds = {v: number for v, number in rounds.items() if str(number) in known}  # others may be a team's own
    versions = {version: sizes[version] for version in rounds}
    old = {v: number for v, number in rounds.items() if number < current and v != state.get("queue")}
    for done, version in enumerate(expired(old, versions, known)):
        entry = known[str(old[version])]
        if done and ctx.board.waiting():
            break
        # The head's prelabels outlive their order.
        if version.startswith(QUEUE) and not gather(ctx, project, version, entry["head"], known):
            break
        if not remove(ctx, project, version, versions[version], entry):
            break
    for done, version in enumerate(crowded(old, known, buckets(project))):
        if done and ctx.board.waiting():
            break
        if not gather(ctx, project, version, sorted(ctx.studio.tasks_with_version(project.id, version)), known):
            break
        if old[version] not in buckets(project).values():  # it may be the one under which others are gathered
            ctx.studio.delete_version(project.id, version)
    there = ctx.studio.versions(project.id)
    known = {**history(project), **known}  # with that of a round beside us
    left = {number for version, number in rounds.items() if version in there}
    young = {int(number) for number, entry in known.items() if entry["published"] > time.time() - KEEP_ORDERS}
    kept = {number: entry for number, entry in known.items() if int(number) in left | young | {current}}
    project.store.write_json(project.key("generations.json"), kept)


def unfinished(project: Project) -> bool:
    """Whether a removal gave way to something more urgent."""
    return any({"removed", "gathered"} & entry.keys() for entry in history(project).values())


def remove(ctx: Context, project: Project, version: str, size: int, entry: dict[str, Any]) -> bool:
    """Delete the predictions of a version without anybody waiting for it.

    Deleting a version at once locks Label Studio's SQLite for 5 ms per prediction, and after 5 s people's submits fail.
    So a large one goes prediction by prediction, and gives way to any job that waits after a page of tasks.

    Args:
        ctx: where Label Studio is.
        project: whose version it is.
        version: its name.
        size: its predictions.
        entry: of `history`; keeps up to which task the removal came, under `removed`.

    Returns:
        Whether all are gone; else a later call goes on.
    """
    if size > AT_ONCE:
        entry.setdefault("removed", 0)
        ids = [task for task in sorted(project.index()) if task > entry["removed"]]
        for start in range(0, len(ids), PAGE):
            if start and ctx.board.waiting():
                return False
            page = ids[start : start + PAGE]
            for task in with_predictions(ctx, project, page):
                for prediction in task.get("predictions") or []:
                    if prediction.get("model_version") == version:
                        ctx.studio.delete_prediction(int(prediction["id"]))
            entry["removed"] = page[-1]
            progress(min(start + PAGE, len(ids)), len(ids))
    entry.pop("removed", None)
    ctx.studio.delete_version(project.id, version)  # what is left: of tasks we do not know
    return True


def expired(old: Mapping[str, int], sizes: Mapping[str, int], known: Mapping[str, Any]) -> list[str]:
    """Versions that may go, the oldest first.

    Args:
        old: round of each superseded version.
        sizes: predictions of each version.
        known: publishing time by round.
    """
    age = {version: time.time() - known[str(number)]["published"] for version, number in old.items()}
    orders = sorted((v for v in old if v.startswith(QUEUE)), key=lambda version: -old[version])
    total = 0
    gone = [v for v in old if not v.startswith(QUEUE) and age[v] > KEEP_PRELABELS]
    for kept, version in enumerate(orders, 1):
        total += sizes[version]
        if age[version] > KEEP_ORDERS or kept > MOST_ORDERS or total > MOST_PREDICTIONS:
            gone.append(version)
    return sorted(gone, key=lambda version: old[version])


def crowded(old: Mapping[str, int], known: Mapping[str, Any], gathered: Mapping[str, int]) -> list[str]:
    """Versions of prelabels to be gathered, the oldest first: as old as orders that go, or more of them than those.

    Args:
        old: round of each superseded version.
        known: publishing time by round.
        gathered: rounds under whose version prelabels are gathered.
    """
    prelabels = sorted((v for v in old if not v.startswith(QUEUE)), key=lambda version: -old[version])
    single = [version for version in prelabels if old[version] not in gathered.values()]
    age = {version: time.time() - known[str(old[version])]["published"] for version in single}
    return [v for n, v in enumerate(single, 1) if n > MOST_ORDERS or KEEP_ORDERS < age[v] <= KEEP_PRELABELS][::-1]


def gather(ctx: Context, project: Project, version: str, tasks: Sequence[int], known: dict[str, Any]) -> bool:
    """Have prelabels outlive their version: they move, ids and all, to the one under which this time's are gathered.

    Returns:
        Whether all have moved; else a job waits after a page of tasks, and a later call goes on.
    """
    later = gathering(project, version, known)
    if later == version:
        return True
    entry = known[str(int(version.rpartition("-")[2]))]
    left = [task for task in sorted(tasks) if task > entry.get("gathered", 0)]
    for start in range(0, len(left), PAGE):
        if start and ctx.board.waiting():
            return False
        page = left[start : start + PAGE]
        moved = []
        for task in with_predictions(ctx, project, page):
            annotations = task.get("annotations") or []
            begun = {annotation.get("parent_prediction") for annotation in annotations}  # updates name it again
            for prediction in task.get("predictions") or []:
                if prediction.get("model_version") == version and (not annotations or prediction["id"] in begun):
                    ctx.studio.patch_prediction(int(prediction["id"]), model_version=later, result=[])
                    moved.append((int(task["id"]), int(prediction["id"])))
        if version.startswith(QUEUE):
            keep(project, moved)
        entry["gathered"] = page[-1]
    entry.pop("gathered", None)
    return True


def with_predictions(ctx: Context, project: Project, tasks: Sequence[int]) -> Iterator[Row]:
    """Tasks with their annotations and predictions; one that Label Studio cannot show, with its predictions alone.

    A round looks at such a task next, and notes what is wrong with it where `status` finds it.
    """
    unshown: set[int] = set()
    yield from ctx.studio.full_tasks(project.id, tasks, unshown)
    index = project.index() if unshown else {}
    if fresh := [task for task in unshown if task in index and not index[task].error]:
        ctx.board.changed(project.id, fresh)
    for task in unshown:
        try:
            yield {"id": task, "predictions": ctx.studio.predictions(task)}
        except LabelStudioError as error:  # one of its predictions is what cannot be shown
            if error.status != 500:
                raise


def buckets(project: Project) -> dict[str, int]:
    """Rounds under whose version prelabels are gathered, by time."""
    return dict(project.store.read_json(project.key("gathered.json")) or {})


def gathering(project: Project, version: str, known: dict[str, Any] | None = None) -> str:
    """The version under which prelabels of `version` are gathered now.

    Args:
        project: whose prelabels they are.
        version: theirs.
        known: of `history`, if it is at hand and will be written; else it is read and written here.
    """
    if known is not None:
        return f"{VERSION}-{bucket(project, int(version.rpartition('-')[2]), known)}"
    known = history(project)
    later = gathering(project, version, known)
    project.store.write_json(project.key("generations.json"), known)
    return later


def bucket(project: Project, number: int, known: dict[str, Any]) -> int:
    """The round under whose version prelabels are gathered now: the first that asks."""
    now = time.time()
    window, rounds = str(int(now // GATHER)), buckets(project)
    if window not in rounds:
        recent = {w: n for w, n in rounds.items() if (int(window) - int(w)) * GATHER <= KEEP_PRELABELS + GATHER}
        rounds = {**recent, window: number}
        project.store.write_json(project.key("gathered.json"), rounds)
    known.setdefault(str(rounds[window]), {"head": []})["published"] = now  # its age counts from the last that came
    return rounds[window]


def take_name(ctx: Context, project: Project) -> None:
    """Give our ML backend the name of the order in force, where Label Studio asks us for prelabels.

    Label Studio saves all ML backends of a project as it lists them, as it read them before it asked whether they are
    up: a title that comes in between, while somebody has its page *Model* open, is lost. So it is looked at again.
    """
    for _ in range(TRIES):
        if (backend := unnamed(ctx, project)) is None:
            return
        title = project.state()["queue"]
        ctx.studio.patch_ml(backend["id"], **credentials(ctx.settings, project.id), title=title)


def unnamed(ctx: Context, project: Project) -> Row | None:
    """Our ML backend, where it has yet to get the name of the order in force; else None."""
    backend, queue = our_backend(ctx.studio, project.id, ctx.settings), project.state().get("queue")
    # A new title takes the version in force along: an order that a round beside us serves by now must stay.
    served = ctx.studio.version_in_force(project.id) == queue
    if backend is not None and served and backend["title"] != queue and is_first(ctx, project, backend):
        return backend
    return None


def is_first(ctx: Context, project: Project, backend: Mapping[str, Any]) -> bool:
    """Whether Label Studio asks us: it asks the first ML backend of a project only, whichever has the right name.

    Where it would ask another, ours must not have the name of the order: then the stored prelabels are served.
    """
    return all(int(other["id"]) >= int(backend["id"]) for other in ctx.studio.ml_backends(project.id))
