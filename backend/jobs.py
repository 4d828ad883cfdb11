"""The jobs of a round, in the order in which they run.

    start_round -> fit_codebook -> prepare (shards) -> plan_round -> train -> score (shards) -> publish -> clean

With the instant learner `plan_round` learns, ranks and publishes by itself, and `start_round` does all of it where only
a few tasks have changed; only a pool of more than `LARGE` images is scored in shards.

Each looks at the store, does what is missing and may run again: a worker that dies costs only its job.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec

from backend import fine_tuning
from backend.attach import check
from backend.connection import HIGHEST
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
from backend.features import Held, fit_features, fit_is_stale, held, join_packs, load_fit, useless_packs
from backend.generations import begin, clean_generations, unfinished, unnamed
from backend.head import Model, lacks_pixels, learn, useless_pixels
from backend.label_config import ProjectConfig
from backend.learn import is_lost, network_key, train_round, untrained_labels
from backend.leftovers import delete_leftovers
from backend.masks import show_masks
from backend.measure import measure, test_then_train
from backend.order import NOTHING, Scored, kept_scores, ordered, score_shard
from backend.prepare import clusters_name, codebook_is_stale, count_votes, has_map, prepare_task
from backend.prepare import fit_codebook as fit
from backend.project import HEAD, Index, Project, TaskRecord, labelled, pool
from backend.publish import Show, call_back, in_force, mark_asked, publish_order
from backend.rank import Place, rank
from backend.score import note_unscored, score_tasks, scored, scores_key, unscored
from backend.sync import check_config, listing, refresh_config, sync
from backend.transport import asking

log = logging.getLogger(__name__)
P = ParamSpec("P")

#: Tasks per job when images are read, and when they are scored.
PREPARE_SHARD, SCORE_SHARD = 64, 64
#: Tasks that the instant learner reads at once, without jobs of their own.
AT_ONCE = 8
#: Images of a pool that goes by shards to several workers when it is ranked, and those of a shard. One worker takes a
#: second for half as many.
LARGE, LARGE_SHARD = 20_000, 4096
#: Folders of the store of which only what compares with the order in force is kept.
CLEANED = ("scores", "clusters", "features", "pixels", "prepared", "shards")


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
            with asking(partial(ctx.board.go_on, project)):
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
                ctx.board.clean_later(project)
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


class Laps:
    """Milliseconds that the steps of a round took; `status` shows them."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self.taken[name], self._last = round(1000 * (now - self._last)), now


@step
def start_round(ctx: Context, project: Project, token: str) -> None:
    """See what changed in Label Studio, and queue the reading of it."""
    if ctx.board.busy(project.id) != token:
        raise RoundOver(f"project {project.id}: another round has taken over from {token}")
    forced, laps = ctx.board.begin(project.id), Laps()
    ctx.board.clear_error(project.id)
    config = refresh_config(ctx, project)
    number = next_number(ctx, project, token)
    index, read = sync(ctx, project, config)
    ctx.board.go_on(project.id)
    project.save_index(index, config)
    after = []
    if fit_is_due(ctx, project, len(index)):
        after = [ctx.board.enqueue("fit_codebook", project.id, number)]
    again = {r.id for r in index.values() if r.error} if forced else due_tasks(index)
    read |= again | unread(project, index)
    todo = in_turn(index, read | unready(ctx, project, index))
    if ctx.settings.learner == "instant" and not after and len(todo) <= AT_ONCE:
        records = [index.get(task, TaskRecord(task)) for task in todo]
        laps.lap("look")
        parts = [prepare_all(ctx, project, records, read, number, 0)]
        laps.lap("read")
        take_in(ctx, project, number, parts, 1, forced, laps)
        return
    shards = []
    for n, ids in enumerate(split(todo, PREPARE_SHARD)):
        records = [index.get(task, TaskRecord(task)) for task in ids]
        project.save_shard("prepare", number, n, records, read=sorted(read & set(ids)))
        shards.append(ctx.board.enqueue("prepare", project.id, number, n, after=after))
    ctx.board.enqueue("plan_round", project.id, number, len(shards), forced, after=[*after, *shards])


@step
def fit_codebook(ctx: Context, project: Project, number: int) -> None:
    """Find the clusters of the pool, and how its features are scaled."""
    index = project.index()
    if ctx.settings.clusters == "codebook" and codebook_is_stale(project, len(index)):
        fit(ctx, project, index)
    if ctx.settings.learner == "instant" and fit_is_stale(ctx, project, len(index)):
        fit_features(ctx, project, index)


@step
def prepare(ctx: Context, project: Project, number: int, shard: int) -> None:
    """Read labels and make cluster maps of one shard; its records wait for `plan_round`."""
    records, said = project.shard("prepare", number, shard)
    found = prepare_all(ctx, project, records, set(said.get("read", ())), number, shard)
    ctx.board.go_on(project.id)
    project.store.write_json(project.key("prepared", number, f"{shard}.json"), found)


@step
def plan_round(ctx: Context, project: Project, number: int, shards: int, forced: bool) -> None:
    """Take in what was read, count the votes, and queue what the new order needs."""
    check_config(ctx, project)
    take_in(ctx, project, number, prepared(project, number, shards), shards, forced, Laps())


def take_in(
    ctx: Context,
    project: Project,
    number: int,
    parts: Sequence[Sequence[dict[str, Any]]],
    shards: int,
    forced: bool,
    laps: Laps,
) -> None:
    """What `plan_round` does with the records that were read."""
    config, index = project.config(), merge(project, parts)
    ctx.board.go_on(project.id)
    project.save_index(index)
    if len(parts) == shards:
        ctx.board.taken(project.id)
    else:  # the ids wait in Redis for the next round
        ctx.board.retry_later(project.id)
    count_votes(ctx, project, index, config)
    if ctx.settings.learner == "instant":
        laps.lap("count")
        order_at_once(ctx, project, index, config, number, forced, laps)
        return
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
    if ctx.settings.learner == "instant":
        score_shard(ctx, project, number, shard)
        return
    faulty = score_tasks(ctx, project, project.shard("score", number, shard)[0], project.config())
    note_unscored(project, number, shard, faulty)


@step
def publish(ctx: Context, project: Project, number: int) -> None:
    """Rank the pool, and have Label Studio serve it in that order."""
    if ctx.settings.learner == "instant":
        publish_shards(ctx, project, number)
        return
    before, config = project.index(), project.config()
    index = unscored(project, number, before)
    serve(ctx, project, number, before, index, config, rank(ctx, project, index, config))


def order_at_once(
    ctx: Context, project: Project, index: Index, config: ProjectConfig, number: int, forced: bool, laps: Laps
) -> None:
    """Learn, rank and publish; a round in which nothing changed ends here, unless somebody asked for it by hand."""
    if (fit := load_fit(project)) is None:  # no image could be read
        serve(ctx, project, number, index, index, config, rank(ctx, project, index, config, lambda _: []))
        return
    features = held(ctx, project, fit, index)
    test_then_train(project, number)
    model = learn(ctx, project, index, config, features, number)
    laps.lap("learn")
    show = partial(show_masks, ctx, project, index, fit, model)
    if not forced and in_force(ctx, project, index, config) and not show(served_head(project, index)):
        ctx.board.finish(project.id, number)
        return
    if len(features.places) > LARGE:
        wanted = [r.id for r in [*pool(index), *labelled(index)] if r.id in features.places and not r.error]
        queue_shards(ctx, project, index, sorted(wanted, key=features.places.__getitem__), number, LARGE_SHARD)
        project.store.write_json(project.key("laps.json"), laps.taken)
        return
    serve_order(ctx, project, number, index, config, features, model, NOTHING, laps)


def queue_shards(
    ctx: Context, project: Project, index: Index, tasks: Sequence[int], number: int, size: int = SCORE_SHARD
) -> None:
    """Queue the scoring of these tasks, at most `size` a job, then the publishing."""
    shards = []
    for n, ids in enumerate(split(tasks, size)):
        project.save_shard("score", number, n, [index[task] for task in ids])
        shards.append(ctx.board.enqueue("score", project.id, number, n))
    ctx.board.enqueue("publish", project.id, number, after=shards)


def publish_shards(ctx: Context, project: Project, number: int) -> None:
    """Rank a large pool by what its shards have found, and have Label Studio serve it in that order."""
    index, config, fit, laps = project.index(), project.config(), load_fit(project), Laps()
    if fit is None:
        raise StartAnew("the scaling of the features was lost during the round: it starts anew")
    laps.taken |= project.store.read_json(project.key("laps.json")) or {}
    features = held(ctx, project, fit, index)
    model = learn(ctx, project, index, config, features, number)
    serve_order(ctx, project, number, index, config, features, model, kept_scores(project, number), laps)


def serve_order(
    ctx: Context,
    project: Project,
    number: int,
    index: Index,
    config: ProjectConfig,
    features: Held,
    model: Model,
    kept: Scored,
    laps: Laps,
) -> None:
    """Rank the pool by the head, with what is `kept` of its scores, and have Label Studio serve it in that order."""
    order = partial(ordered, ctx, project, index, config, features, model, kept)
    places = rank(ctx, project, index, config, order)
    laps.lap("rank")
    show = partial(show_masks, ctx, project, index, features.fit, model)
    serve(ctx, project, number, index, index, config, places, show, laps)


def serve(
    ctx: Context,
    project: Project,
    number: int,
    before: Index,
    index: Index,
    config: ProjectConfig,
    places: Sequence[Place],
    show: Show | None = None,
    laps: Laps | None = None,
) -> None:
    """Have Label Studio serve these places; `before` is the index in the store, `index` what is known now."""
    called = call_back(ctx, project, index, places)
    if called != before:
        ctx.board.go_on(project.id)
        project.save_index(called)
    again = begin(project, number)
    publish_order(ctx, project, called, config, places, number, show, again)
    if (asked := mark_asked(called, places)) != called:
        ctx.board.go_on(project.id)
        project.save_index(asked)
    if laps is not None:
        laps.lap("publish")
        project.store.write_json(project.key("laps.json"), laps.taken)
    if ctx.board.finish(project.id, number):
        ctx.board.enqueue("clean", project.id)
        if ctx.settings.learner == "instant" and fine_tuning.is_wanted(ctx, project, index, config):
            ctx.board.want_fine_tuning(project.id)


@step
def fine_tune(ctx: Context, project: Project) -> None:
    """Train the network in the background, and have it see the pool."""
    fine_tuning.fine_tune(ctx, project)


@step
def clean(ctx: Context, project: Project) -> None:
    """Delete what earlier rounds published, and what only they needed."""
    clean_generations(ctx, project)
    clean_store(ctx, project)
    ctx.board.cleaned(project.id)


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


def served_head(project: Project, index: Index) -> list[int]:
    """The first tasks of the order in force."""
    rows = project.store.read_json(project.key("ranking.json")) or []
    return [row["task"] for row in rows[:HEAD] if row["task"] in index]


def fit_is_due(ctx: Context, project: Project, tasks: int) -> bool:
    """Whether there are no clusters, or no scaled features, or the pool has outgrown them."""
    clusters = ctx.settings.clusters == "codebook" and codebook_is_stale(project, tasks)
    return clusters or (ctx.settings.learner == "instant" and fit_is_stale(ctx, project, tasks))


def prepare_all(
    ctx: Context, project: Project, records: Sequence[TaskRecord], read: set[int], number: int, shard: int
) -> list[dict[str, Any]]:
    """Read labels, make cluster maps, compute features; the records, or that a task is gone."""
    config, found = project.config(), list[TaskRecord | None]()
    for done, old in enumerate(records):
        found.append(prepare_task(ctx, project, config, old, old.id in read))
        progress(done + 1, len(records))
    if ctx.settings.learner == "instant":
        found = measure(ctx, project, config, found, number, shard)
    rows = zip(records, found, strict=True)
    return [{"id": old.id, "gone": True} if record is None else record.to_json() for old, record in rows]


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
    queue_shards(ctx, project, index, todo, number)


def pictured(ctx: Context, project: Project, config: ProjectConfig) -> set[int]:
    """Tasks whose mask by the network in force is in the store."""
    keys = project.store.list(project.key("predictions", network_key(ctx, project, config.classes)))
    return {int(name) for name in (key.rpartition("/")[2].removesuffix(".png") for key in keys) if name.isdigit()}


def clean_store(ctx: Context, project: Project) -> None:
    """Delete scores, masks and maps that no longer compare with anything, and records taken in long ago."""
    # Listed before the names are looked up: what a round beside us writes meanwhile is not in the list.
    found = {folder: project.store.list(project.key(folder)) for folder in CLEANED}
    config, number = project.config(), int(project.state().get("round", 0))
    keep = {"scores": {scores_key(ctx, project, config)}, "clusters": {clusters_name(ctx, project)}}
    fit = load_fit(project)
    keep |= {folder: {fit.version} if fit else set() for folder in ("features", "pixels")}
    for folder, keys in found.items():
        for key in keys:
            name = key.removeprefix(project.key(folder) + "/").partition("/")[0]
            late = name.isdigit() and int(name) >= number  # of the order in force, or of a round beside us
            if name not in keep.get(folder, ()) and not late:
                project.store.delete(key)
    drop_maps(project)
    if fit is not None:
        join_packs(ctx, project, fit, project.index())
        useless = useless_pixels(project, fit) | useless_packs(ctx, project, fit)
        delete_leftovers(project, useless, idle=not ctx.board.busy(project.id))
    project.store.sweep(project.key())


def drop_maps(project: Project) -> None:
    """Delete the masks and cluster maps of tasks that are gone."""
    found = [
        key
        for folder in ("labels", "coarse", "clusters", "predictions")
        for key in project.store.list(project.key(folder))
    ]
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
    found = {r.id for r in wanted if not has_map(r, clusters) or project.cluster_key(clusters, r.id) not in maps}
    return found | unmeasured(ctx, project, index)


def unmeasured(ctx: Context, project: Project, index: Index) -> set[int]:
    """Tasks of which the instant learner lacks the features, or the pixels that their label teaches with."""
    if ctx.settings.learner != "instant":
        return set()
    wanted = {r.id for r in index.values() if not r.error and (r.in_pool or r.labelled)}
    fit = load_fit(project)
    if fit is None:
        return wanted
    return (wanted - held(ctx, project, fit, index).places.keys()) | lacks_pixels(project, fit, index)


def split(ids: Sequence[int], size: int) -> list[list[int]]:
    """Chunks of at most `size`."""
    return [list(ids[i : i + size]) for i in range(0, len(ids), size)]
