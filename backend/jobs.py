"""The jobs of a round, in the order in which they run.

    start_round -> fit_codebook -> prepare (shards) -> plan_round -> train -> score (shards) -> publish -> clean

Each looks at the store, does what is missing and may run again: a worker that dies costs only its job.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from backend.attach import check
from backend.connection import HIGHEST, need_backend
from backend.context import Context, context
from backend.enqueue import IN_ROUND, progress
from backend.errors import (
    ConfigError,
    FirstRowError,
    LabelStudioError,
    NotAttached,
    RoundOver,
    SettingsError,
    StartAnew,
)
from backend.faults import due_tasks, in_turn
from backend.generations import begin, clean_generations, unfinished, unnamed
from backend.label_config import ProjectConfig
from backend.learn import is_lost, network_key, train_round, untrained_labels
from backend.prepare import clusters_name, codebook_is_stale, count_votes, has_map, prepare_task
from backend.prepare import fit_codebook as fit
from backend.project import Index, Project, TaskRecord, labelled, pool
from backend.publish import call_back, in_force, mark_asked, publish_order
from backend.rank import rank
from backend.score import note_unscored, score_tasks, scored, scores_key, unscored
from backend.sync import check_config, listing, refresh_config, sync

log = logging.getLogger(__name__)
P = ParamSpec("P")

#: Tasks per job when images are read, and when they are scored.
PREPARE_SHARD, SCORE_SHARD = 64, 64


def step(job: Callable[Concatenate[Context, Project, P], None]) -> Callable[..., None]:
    """A job: leaves the reason of a failure where `status` looks. The worker logs start, end and tracebacks.

    A job of a round that must not go on ends, and has not failed. Cleaning up can wait: what keeps it is logged alone.
    """

    @wraps(job)
    def run(project: int, *args: P.args, **kwargs: P.kwargs) -> None:
        ctx, name = context(), job.__name__
        ctx.store.damaged.clear()
        holder = args[0] if name in IN_ROUND or name == "start_round" else None
        try:
            ctx.board.go_on(project)
            job(ctx, ctx.project(project), *args, **kwargs)
        except RoundOver as error:
            log.info("%s: %s", name, error)
        except StartAnew as error:
            log.warning("project %d: %s", project, error)
            if isinstance(holder, int | str) and ctx.board.release(project, holder):
                ctx.board.request_round(project, str(error))
        except Exception as error:
            known = isinstance(error, FirstRowError)
            reason = str(error) if known else f"{type(error).__name__}: {error} (the worker's log says more)"
            if name == "clean":
                log.warning("project %d: cleaning up is put off: %s", project, reason, exc_info=not known)
                return
            if name == "reconcile" and heals(error):
                ctx.board.uncounted(project)
            ctx.board.fail(project, name, reason)
            ctx.board.abandon(project, name, holder if isinstance(holder, int | str) else None, heals(error))
            raise
        finally:
            if damaged := ctx.store.damaged:  # deleted by now; the next round makes them again
                log.warning("project %d: %d damaged files are made again", project, len(damaged))
                ctx.board.retry_later(project, first=0)

    return run


def heals(error: Exception) -> bool:
    """Whether a fault may be gone by itself after a while; others need a person, or another key."""
    if isinstance(error, LabelStudioError):
        return error.status not in (401, 403)
    return not isinstance(error, ConfigError | NotAttached | SettingsError)


@step
def start_round(ctx: Context, project: Project, token: str) -> None:
    """See what changed in Label Studio, and queue the reading of it."""
    if ctx.board.busy(project.id) != token:
        raise RoundOver(f"project {project.id}: another round has taken over from {token}")
    forced = ctx.board.begin(project.id)
    ctx.board.clear_error(project.id)
    config = refresh_config(ctx, project)
    number = next_number(ctx, project, token)
    index, read = sync(ctx, project, config)
    ctx.board.go_on(project.id)
    project.save_index(index, config)
    after = []
    if ctx.settings.clusters == "codebook" and codebook_is_stale(project, len(index)):
        after = [ctx.board.enqueue("fit_codebook", project.id, number)]
    again = {r.id for r in index.values() if r.error} if forced else due_tasks(index)
    read |= again | unread(project, index)
    todo = in_turn(index, read | unready(ctx, project, index))
    shards = []
    for n, ids in enumerate(split(todo, PREPARE_SHARD)):
        records = [index.get(task, TaskRecord(task)) for task in ids]
        project.save_shard("prepare", number, n, records, read=sorted(read & set(ids)))
        shards.append(ctx.board.enqueue("prepare", project.id, number, n, after=after))
    ctx.board.enqueue("plan_round", project.id, number, len(shards), forced, after=[*after, *shards])


@step
def fit_codebook(ctx: Context, project: Project, number: int) -> None:
    """Find the clusters of the pool."""
    fit(ctx, project, project.index())


@step
def prepare(ctx: Context, project: Project, number: int, shard: int) -> None:
    """Read labels and make cluster maps of one shard; its records wait for `plan_round`."""
    (records, said), config, found = project.shard("prepare", number, shard), project.config(), []
    read = set(said.get("read", ()))
    for done, old in enumerate(records):
        record = prepare_task(ctx, project, config, old, old.id in read)
        found.append({"id": old.id, "gone": True} if record is None else record.to_json())
        progress(done + 1, len(records))
    ctx.board.go_on(project.id)
    project.store.write_json(project.key("prepared", number, f"{shard}.json"), found)


@step
def plan_round(ctx: Context, project: Project, number: int, shards: int, forced: bool) -> None:
    """Take in what was read, count the votes, and queue what the new order needs."""
    check_config(ctx, project)
    parts, config = prepared(project, number, shards), project.config()
    index = merge(project, parts)
    ctx.board.go_on(project.id)
    project.save_index(index)
    if len(parts) == shards:
        ctx.board.taken(project.id)
    else:  # the ids wait in Redis for the next round
        ctx.board.retry_later(project.id)
    count_votes(ctx, project, index, config)
    fresh = untrained_labels(project, index, config.classes)
    due = forced or is_lost(project) or len(fresh) >= ctx.settings.retrain_every
    if due and labelled(index):
        after = [ctx.board.enqueue("train", project.id, number)]
        ctx.board.enqueue("plan_scores", project.id, number, after=after)
    else:
        queue_scores(ctx, project, index, number)


@step
def train(ctx: Context, project: Project, number: int) -> None:
    """Learn from all annotations there are."""
    check_config(ctx, project)
    train_round(ctx, project, project.index(), project.config(), f"model-{number}")


@step
def plan_scores(ctx: Context, project: Project, number: int) -> None:
    """Queue the scoring by the network that was just trained."""
    queue_scores(ctx, project, project.index(), number)


@step
def score(ctx: Context, project: Project, number: int, shard: int) -> None:
    """Score one shard of the pool."""
    faulty = score_tasks(ctx, project, project.shard("score", number, shard)[0], project.config())
    note_unscored(project, number, shard, faulty)


@step
def publish(ctx: Context, project: Project, number: int) -> None:
    """Rank the pool, and have Label Studio serve it in that order."""
    before, config = project.index(), project.config()
    index = unscored(project, number, before)
    places = rank(ctx, project, index, config)
    need_backend(ctx.studio, project.id, ctx.settings)  # as late as can be: what follows touches people's work
    check_config(ctx, project)
    called = call_back(ctx, project, index, places)
    if called != before:
        ctx.board.go_on(project.id)
        project.save_index(called)
    begin(project, number)
    publish_order(ctx, project, called, config, places, number)
    if (asked := mark_asked(called, places)) != called:
        ctx.board.go_on(project.id)
        project.save_index(asked)
    if ctx.board.finish(project.id, number):
        ctx.board.enqueue("clean", project.id)


@step
def clean(ctx: Context, project: Project) -> None:
    """Delete what earlier rounds published, and what only they needed."""
    clean_generations(ctx, project)
    clean_store(ctx, project)


@step
def reconcile(ctx: Context, project: Project) -> None:
    """Find in Label Studio what lost events would have told, and rounds that were lost."""
    try:
        config = refresh_config(ctx, project, ctx.board.busy(project.id) is None)
    except NotAttached:
        log.info("project %d is not attached: forgotten", project.id)
        ctx.board.forget(project.id)
        return
    except LabelStudioError as error:
        if error.status != 404:
            raise
        log.warning("project %d is gone from Label Studio, or our key may not see it: forgotten", project.id)
        ctx.board.forget(project.id)
        return
    for sentence in check(ctx.studio, project.id, ctx.settings):
        log.warning("project %d lacks something (`firstrow attach --project %d`): %s", project.id, project.id, sentence)
    index = project.index()
    found, read = listing(ctx, project, config, index)
    gone = set(index) - set(found)
    ctx.board.remember(project.id, read | gone | (set(found) - set(index)))
    if ctx.board.rescue(project.id):
        return
    changed = config.meaning != project.index_meaning() or bool(due_tasks(found))
    moved = changed or read or gone or set(found) != set(index) or ctx.board.wished(project.id)
    if moved or not (ctx.board.busy(project.id) or whole(ctx, project, index, config)):
        ctx.board.request_round(project.id, "reconcile")
    elif not ctx.board.waiting() and (unfinished(project) or unnamed(ctx, project)):
        ctx.board.enqueue("clean", project.id)


def whole(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> bool:
    """Whether the order in force was made from just what we know, and nothing it goes by is missing from the store."""
    return not unread(project, index) and not unready(ctx, project, index) and in_force(ctx, project, index, config)


def queue_scores(ctx: Context, project: Project, index: Index, number: int) -> None:
    """Queue the scoring of every image that has no comparable score yet, then the publishing.

    A round in which nothing changed ends here: the order in force is the one it would publish.
    """
    config = project.config()
    have = scored(ctx, project, config, index) & pictured(ctx, project, config)
    todo = [r.id for r in [*pool(index), *labelled(index)] if r.id not in have and not r.error]
    if not todo and in_force(ctx, project, index, config):
        ctx.board.finish(project.id, number)
        return
    shards = []
    for n, ids in enumerate(split(todo, SCORE_SHARD)):
        project.save_shard("score", number, n, [index[task] for task in ids])
        shards.append(ctx.board.enqueue("score", project.id, number, n))
    ctx.board.enqueue("publish", project.id, number, after=shards)


def pictured(ctx: Context, project: Project, config: ProjectConfig) -> set[int]:
    """Tasks whose mask by the network in force is in the store."""
    keys = project.store.list(project.key("predictions", network_key(ctx, project, config.classes)))
    return {int(name) for name in (key.rpartition("/")[2].removesuffix(".png") for key in keys) if name.isdigit()}


def clean_store(ctx: Context, project: Project) -> None:
    """Delete scores, masks and maps that no longer compare with anything, and records taken in long ago."""
    # Listed before the names are looked up: what a round beside us writes meanwhile is not in the list.
    found = {folder: project.store.list(project.key(folder)) for folder in ("scores", "clusters", "prepared", "shards")}
    config, number = project.config(), int(project.state().get("round", 0))
    keep = {"scores": {scores_key(ctx, project, config)}, "clusters": {clusters_name(ctx, project)}}
    for folder, keys in found.items():
        for key in keys:
            name = key.removeprefix(project.key(folder) + "/").partition("/")[0]
            late = name.isdigit() and int(name) >= number  # of the order in force, or of a round beside us
            if name not in keep.get(folder, ()) and not late:
                project.store.delete(key)
    drop_maps(project)
    project.store.sweep(project.key())


def drop_maps(project: Project) -> None:
    """Delete the masks and cluster maps of tasks that are gone."""
    found = [key for folder in ("labels", "coarse", "clusters") for key in project.store.list(project.key(folder))]
    index = project.index()  # read after the listing: a round beside us may be adding both
    for key in found if index else ():
        task = key.rpartition("/")[2].removesuffix(".png")
        if task.isdigit() and int(task) not in index:
            project.store.delete(key)


def prepared(project: Project, number: int, shards: int) -> list[list[dict[str, Any]]]:
    """The records that the shards of this round left; a shard that failed left none."""
    parts = [project.store.read_json(project.key("prepared", number, f"{n}.json")) for n in range(shards)]
    return [part for part in parts if part is not None]


def merge(project: Project, parts: Sequence[Sequence[dict[str, Any]]]) -> Index:
    """The index with these records."""
    index = project.index()
    for row in (row for part in parts for row in part):
        if row.get("gone"):
            index.pop(row["id"], None)
        else:
            index[row["id"]] = TaskRecord.from_json(row)
    return index


def next_number(ctx: Context, project: Project, token: str) -> int:
    """This round's number: higher than any that Redis, the store or Label Studio has ever seen.

    It is written down before anything is named after it, so that the number of a round that dies is never used again.
    """
    key = project.key("number.json")
    known = project.store.read_json(key)
    if known is None:  # lost, or the first round: the names of files tell
        known = max(numbers(project), default=0)
    seen = (int(known), int(project.state().get("round", 0)), int(project.extra().get("round", 0)))
    least = max((number for number in seen if number < 10 * HIGHEST), default=0)
    number = ctx.board.number(project.id, token, least)
    project.store.write_json(key, number)
    return number


def numbers(project: Project) -> Iterator[int]:
    """Numbers of rounds that have left something in the store."""
    for folder in ("models", "prepared", "shards"):
        for key in project.store.list(project.key(folder)):
            name = key.removeprefix(project.key(folder) + "/").partition("/")[0]
            if match := re.fullmatch(r"(?:model-)?(\d+)(?:\.safetensors)?", name):
                yield int(match[1])


def unread(project: Project, index: Index) -> set[int]:
    """Tasks whose labels are known but for their masks: those are gone from the store."""
    masks = {folder: set(project.store.list(project.key(folder))) for folder in ("labels", "coarse")}
    lost = {r.id for r in index.values() if r.labelled and project.label_key(r.id) not in masks["labels"]}
    return lost | {r.id for r in index.values() if r.coarse and project.coarse_key(r.id) not in masks["coarse"]}


def unready(ctx: Context, project: Project, index: Index) -> set[int]:
    """Pool tasks that lack what ranking needs, but for those found unusable for a reason that has not changed."""
    clusters = clusters_name(ctx, project)
    maps = set(project.store.list(project.key("clusters", clusters))) if clusters else set()
    wanted = (r for r in index.values() if not r.error and (r.in_pool or has_map(r, clusters)))
    return {r.id for r in wanted if not has_map(r, clusters) or project.cluster_key(clusters, r.id) not in maps}


def split(ids: Sequence[int], size: int) -> list[list[int]]:
    """Chunks of at most `size`."""
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
