"""Queues, job ids, timeouts, and one pending round per project.

With `worker.py` alone in importing rq. Everything here is small and lives in Redis; losing Redis loses no
annotation, because a reconcile finds in Label Studio what the lost events would have told.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import LockError, ResponseError
from redis.retry import Retry as RedisRetry
from rq import Queue, Retry, get_current_job
from rq.exceptions import NoSuchJobError
from rq.job import Dependency, Job, JobStatus
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from backend.errors import RoundOver

log = logging.getLogger(__name__)

#: Seconds a job may run, by the function's name. A model is trained and scored on whatever machine there is,
#: so these are generous; a worker that dies is noticed by its missing heartbeat, not by the timeout.
TIMEOUTS = {
    "train": 6 * 3600,
    "fine_tune": 6 * 3600,
    "score": 2 * 3600,
    "prepare": 2 * 3600,
    "fit_codebook": 3600,
    "clean": 2 * 3600,
}
TIMEOUT = 900
CURVE_TIMEOUT = 7 * 24 * 3600
#: Seconds that a finished job stays to be looked at, and a failed one; of those at most so many per queue.
KEEP_RESULT = 60
KEEP_FAILURE = 7 * 24 * 3600
MOST_FAILURES = 100
#: Seconds for which an update made by ourselves is recognised when its event comes.
OURS = 3600
#: Seconds that an update by a person is kept which came while we were changing the same annotation.
KEEP_UPDATE = 24 * 3600
GPU, DEFAULT = "gpu", "default"
QUEUE_OF = dict.fromkeys(("fit_codebook", "prepare", "train", "score", "fine_tune"), GPU)
#: Steps after whose failure nothing of the round is left to run.
ENDS = {"start_round", "plan_round", "plan_scores", "publish"}
#: Steps of a round behind its first; their first argument after the project is the round's number.
IN_ROUND = {"fit_codebook", "prepare", "plan_round", "train", "plan_scores", "score", "publish"}
#: Seconds until a round that failed by a fault that may heal is tried again, the first time, the second time, ...
PAUSES = (5, 30, 120, 600)
#: Seconds until cleaning up that failed is tried again, the first time, the second time, ... in a row.
PUT_OFF = (30, 120, 600, 3600)
#: Seconds for which a project that was stopped, then forgotten, stays stopped: what was under way comes to nothing.
STOPPED = 60
#: Seconds after which another worker looks at the counters of a project, when one has died while it looked.
KEEP_COUNTING = 120
#: Seconds for which somebody who died in the middle of what only one process does keeps others away from it.
ALONE = 900
#: Job states in which a job still has something to do.
LIVE = {"queued", "started", "deferred", "scheduled", "ready"}


#: Orders a list of job ids such that projects, whose number is in the id, take turns; within one the order stays.
INTERLEAVE = """
local ids = redis.call('LRANGE', KEYS[1], 0, -1)
local jobs, names, most = {}, {}, 0
for _, id in ipairs(ids) do
  local name = string.match(id, '^[%a_]+%-(%d+)%-') or ''
  if not jobs[name] then jobs[name] = {}; table.insert(names, name) end
  table.insert(jobs[name], id)
  most = math.max(most, #jobs[name])
end
if #names < 2 then return 0 end
redis.call('DEL', KEYS[1])
for turn = 1, most do
  for _, name in ipairs(names) do
    if jobs[name][turn] then redis.call('RPUSH', KEYS[1], jobs[name][turn]) end
  end
end
return #names
"""

#: Gives the round that holds the project a number, higher than any before; nothing to a round that holds it no more. A
#: number of more than ten digits is none of ours: an earlier release took it from somebody's model version.
NUMBER = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local last = tonumber(redis.call('GET', KEYS[2]) or 0)
if last >= 1e10 then last = 0 end
local number = math.max(last, tonumber(ARGV[2])) + 1
redis.call('SET', KEYS[2], string.format('%d', number))
redis.call('SET', KEYS[3], string.format('%d', number))
return number
"""
#: Frees the project where the key has this value still.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
return 1
"""


class Board:
    """What web processes and workers tell each other, in Redis.

    Args:
        redis_url: address of the Redis server, for example `redis://127.0.0.1:6379/0`.
    """

    #: Queues that this process works on, if it is a worker.
    serves: tuple[str, ...] = (GPU, DEFAULT)

    def __init__(self, redis_url: str) -> None:
        self.redis: Redis = Redis.from_url(redis_url, socket_connect_timeout=2, health_check_interval=30)

    def hurry(self) -> None:
        """One retry (a restarted Redis) at once: somebody waits."""
        self.redis.set_retry(RedisRetry(NoBackoff(), 1))

    # -- events -------------------------------------------------------------------------------------------

    def changed(self, project: int, tasks: Iterable[int] = (), deleted_annotations: Iterable[int] = ()) -> str | None:
        """Remember what changed and ask for a round; returns the id of the job that will look at it."""
        self.remember(project, tasks, deleted_annotations)
        return self.request_round(project, "changes")

    def remember(self, project: int, tasks: Iterable[int] = (), deleted_annotations: Iterable[int] = ()) -> None:
        """Keep task and annotation ids until a round has taken them in."""
        with self.redis.pipeline() as pipe:
            for name, ids in (("changed", list(tasks)), ("deleted", list(deleted_annotations))):
                if ids:
                    pipe.sadd(_key(project, name), *ids)
            pipe.execute()

    def take(self, project: int) -> tuple[set[int], set[int]]:
        """Move the remembered ids aside and return them (task ids, annotation ids).

        They stay in Redis until `taken`, so a round that dies loses nothing: the next one takes them again.
        """
        found = []
        for name in ("changed", "deleted"):
            aside = _key(project, f"{name}:taken")
            with self.redis.pipeline() as pipe:
                pipe.sunionstore(aside, [aside, _key(project, name)])
                pipe.delete(_key(project, name))
                pipe.smembers(aside)
                found.append({int(i) for i in pipe.execute()[-1]})
        return found[0], found[1]

    def taken(self, project: int) -> None:
        """Forget the ids handed out by `take`: the index holds their effect now."""
        self.redis.delete(_key(project, "changed:taken"), _key(project, "deleted:taken"))

    def expect_own_update(self, project: int, annotation: int, content: str, seen: str) -> None:
        """Say that we are about to change an annotation.

        Args:
            project: Label Studio's project id.
            annotation: Label Studio's annotation id.
            content: digest of the regions that it has then.
            seen: when it was changed last, in Label Studio's time.
        """
        self.redis.set(_ours(project, annotation), orjson.dumps({"content": content, "seen": seen}), ex=OURS)

    def own_update_is_done(self, project: int, annotation: int, done: str) -> None:
        """Say when Label Studio wrote our change of an annotation, in its own time."""
        said = {**self.own_update(project, annotation), "done": done}
        self.redis.set(_ours(project, annotation), orjson.dumps(said), ex=OURS)

    def own_update(self, project: int, annotation: int) -> dict[str, str]:
        """Our last change of an annotation: `content`, `seen` and `done`; empty for most."""
        value = self.redis.get(_ours(project, annotation))
        return dict(orjson.loads(value)) if isinstance(value, bytes) else {}

    def keep_update(self, project: int, annotation: int, row: Mapping[str, Any]) -> None:
        """Keep what a person saved last in an annotation while we were changing it: Label Studio may have lost it."""
        before = self.missed_update(project, annotation)
        if before is not None and str(before.get("updated_at")) > str(row.get("updated_at")):
            return
        self.redis.set(_missed(project, annotation), orjson.dumps(row), ex=KEEP_UPDATE)
        self.redis.expire(_ours(project, annotation), KEEP_UPDATE)

    def forget_missed_update(self, project: int, annotation: int) -> None:
        """What `keep_update` kept is in Label Studio."""
        self.redis.delete(_missed(project, annotation))

    def missed_update(self, project: int, annotation: int) -> dict[str, Any] | None:
        """What `keep_update` kept of an annotation; None for most."""
        value = self.redis.get(_missed(project, annotation))
        return dict(orjson.loads(value)) if isinstance(value, bytes) else None

    # -- rounds -------------------------------------------------------------------------------------------

    def request_round(self, project: int, reason: str, train: bool = False) -> str | None:
        """Start a round, or have the running one followed by another. Never drops a wish.

        Args:
            project: Label Studio's project id.
            reason: for the log.
            train: retrain even when too few annotations are new.

        Returns:
            The id of the job that starts the round; that of the running round when the wish was coalesced; None while
            the project is stopped.
        """
        if train:
            self.redis.set(_key(project, "train"), 1)
        # The wish is written before the attempt to start: a round that ends in between sees it.
        self.redis.set(_key(project, "again"), reason)
        if self.stopped(project):
            return None
        self.redis.sadd("firstrow:projects", project)
        job = f"round-{project}-{uuid.uuid4().hex[:12]}"
        if not self.redis.set(_key(project, "busy"), job, nx=True):
            return self.busy(project)
        log.info("project %d: round %s requested (%s)", project, job, reason)
        self.enqueue("start_round", project, job, job_id=job)
        return job

    def busy(self, project: int) -> str | None:
        """Id of the job that started the round in progress, or None."""
        value = self.redis.get(_key(project, "busy"))
        return value.decode() if isinstance(value, bytes) else None

    def begin(self, project: int) -> bool:
        """Start of a round: clears the wish for one. Returns whether a training was asked for by hand."""
        with self.redis.pipeline() as pipe:
            pipe.delete(_key(project, "again"), _key(project, "retry"))
            pipe.getdel(_key(project, "train"))
            return bool(pipe.execute()[-1])

    def number(self, project: int, token: str, least: int) -> int:
        """Give the round its number; no number is given twice, also when its round died.

        Args:
            project: Label Studio's project id.
            token: id of the job that starts the round.
            least: the highest number that the store and Label Studio know of.

        Returns:
            A number above `least` and above all that were given before.

        Raises:
            RoundOver: another round has the project by now.
        """
        keys = [_key(project, name) for name in ("busy", "count", "owner")]
        number = self.redis.eval(NUMBER, 3, *keys, token, least)
        if not isinstance(number, int):
            raise RoundOver(f"project {project}: another round has taken over from {token}")
        if (job := get_current_job()) is not None:
            job.meta["round"] = number
        return number

    def go_on(self, project: int) -> None:
        """Raise unless the running job may go on: called before anything is written, and between two tasks.

        Outside a worker, and in jobs that belong to no round, only a `stop` of the project counts.

        Raises:
            RoundOver: the project was stopped, or another round has it by now.
        """
        job = get_current_job()
        _check(self.redis, project, job.meta.get("round") if job else None)

    def finish(self, project: int, number: int) -> bool:
        """End of a round that went well: free the project, and start the next round if one was wished for meanwhile.

        Returns:
            Whether the round still had the project; if not, nothing is done.
        """
        if not self.redis.exists(_key(project, "retry")) and self.owns(project, number):
            # Before the project is free: nobody may see an error of a round that went well beside no round.
            self.redis.delete(_key(project, "tries"))
            if (self.error(project) or {}).get("passing"):
                self.clear_error(project)
        if not self.release(project, number):
            return False
        if self.wished(project):
            self.request_round(project, "changes during the last round")
        return True

    def owns(self, project: int, number: int) -> bool:
        """Whether the project is held by the round of this number."""
        owner = self.redis.get(_key(project, "owner"))
        return isinstance(owner, bytes) and int(owner) == number

    def release(self, project: int, holder: int | str) -> bool:
        """Free the project if it is held by this round: its number, or before it has one the id of its first job."""
        names = ("owner" if isinstance(holder, int) else "busy", "busy", "owner", "jobs")
        return bool(self.redis.eval(RELEASE, 4, *[_key(project, name) for name in names], holder))

    def abandon(self, project: int, step: str, holder: int | str | None, heals: bool) -> None:
        """A step failed: free the project if nothing of its round is left to run, and plan when to try again.

        Args:
            project: Label Studio's project id.
            step: which step.
            holder: the round's number, or the id of its first job; None for a step of no round.
            heals: whether the fault may be gone by itself later. Others wait for a change or the next reconcile.
        """
        job = get_current_job()
        if job is not None:
            job.retries_left = 0  # those are for workers that died; a round that failed is tried again after a pause
        if holder is None:
            return
        if step in ENDS:
            if not self.release(project, holder):
                return
            self.redis.set(_key(project, "again"), f"{step} failed")
        if heals:
            self.retry_later(project)

    def retry_later(self, project: int, first: float = PAUSES[0]) -> None:
        """Have another round started after a pause, each time a longer one; in the end the reconcile must do.

        Args:
            project: Label Studio's project id.
            first: seconds of the first pause.
        """
        if self.redis.exists(_key(project, "retry")):
            return  # a round is tried again once, whatever of it failed
        tries = int(self.redis.incr(_key(project, "tries")))
        pauses = PAUSES if first == PAUSES[0] else (first, *PAUSES)
        if tries <= len(pauses):
            pause = pauses[tries - 1]
            log.warning("project %d: tried again in %g s", project, pause)
            self.redis.set(_key(project, "retry"), time.time() + pause)

    def retry_due(self, project: int) -> bool:
        """Start the round whose pause is over; returns whether there was one."""
        when = self.redis.get(_key(project, "retry"))
        if not isinstance(when, bytes) or float(when) > time.time() or self.busy(project):
            return False
        try:
            self.redis.rename(_key(project, "retry"), _key(project, "again"))
        except ResponseError:  # no such key: another process was quicker
            return False
        self.request_round(project, "another try")
        return True

    def under_way(self, project: int) -> bool:
        """Whether a round is in progress or will be tried again. A wish alone is none: that of a round that failed."""
        return self.busy(project) is not None or (
            self.wished(project) and bool(self.redis.exists(_key(project, "retry")))
        )

    def wished(self, project: int) -> bool:
        """Whether events or a failed round wait for the next round."""
        return bool(self.redis.exists(_key(project, "again"), _key(project, "changed"), _key(project, "deleted")))

    def rescue(self, project: int) -> bool:
        """Free a project whose round has no job left (a lost worker). Returns whether it did.

        Only at the second look in a row: at the first one a job may just be on its way into its queue.
        """
        token, lost = self.busy(project), _key(project, "lost")
        if token is None or any(job["status"] in LIVE for job in self.jobs(project)):
            self.redis.delete(lost)
            return False
        before = self.redis.set(lost, token, get=True)
        if not isinstance(before, bytes) or before.decode() != token:
            return False
        log.warning("project %d: its last round was lost; starting another", project)
        if self.release(project, token):
            self.request_round(project, "the last round was lost")
        return True

    # -- stopping -----------------------------------------------------------------------------------------

    def stop(self, project: int, seconds: float = 30.0) -> bool:
        """Stop all that we do in a project: before `detach`, or before anything else that must not meet our jobs.

        From now on no round and no reconcile of the project starts, whoever asks: wishes are remembered, no more. Jobs
        that wait are cancelled. A job that runs ends by `RoundOver` at its next `go_on`, which every job calls as it
        starts, between two tasks and training steps (by `progress`), and right before each request that changes
        something in Label Studio (by `transport.asking`); a request that is under way is not broken off. The project
        stays stopped until `register` (`attach`) lifts it, or for `STOPPED` seconds after `forget`.

        Args:
            project: Label Studio's project id.
            seconds: to wait for jobs that run.

        Returns:
            Whether no job of the project runs any more. If False one is still in a long request or computation; after
            that it changes nothing while the project is stopped.
        """
        self.redis.set(_key(project, "stopped"), 1)
        self.redis.delete(_key(project, "busy"), _key(project, "owner"), _key(project, "jobs"), _key(project, "retry"))
        until = time.monotonic() + seconds
        while True:
            self._cancel(project)
            if not self.running(project):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.1)

    def stopped(self, project: int) -> bool:
        """Whether the project was stopped (see `stop`)."""
        return bool(self.redis.exists(_key(project, "stopped")))

    def running(self, project: int) -> list[str]:
        """Ids of the project's jobs that a worker has in hand, but for the one that asks; not those of dead workers."""
        me = get_current_job()
        gone = {job for registry in self._started() for job in registry.get_expired_job_ids()}
        others = [job for job in self.in_hand() if not (me and me.id == job)]
        return [job for job in others if _of(job) == project and job not in gone]

    def in_hand(self) -> list[str]:
        """Ids of all jobs that a worker has in hand, or had when it died."""
        return [job for registry in self._started() for job in registry.get_job_ids(cleanup=False)]

    def _started(self) -> list[StartedJobRegistry]:
        return [self.queue(name).started_job_registry for name in (GPU, DEFAULT)]

    def _cancel(self, project: int) -> None:
        for name in (GPU, DEFAULT):
            queue = self.queue(name)
            ids = [*queue.job_ids, *queue.deferred_job_registry.get_job_ids(cleanup=False)]
            for job in {job for job in ids if _of(job) == project}:
                queue.remove(job)
                if (there := self.job(job)) is not None:
                    there.delete()
                queue.deferred_job_registry.remove(job)

    # -- jobs ---------------------------------------------------------------------------------------------

    def queue(self, name: str, jobs: type[Job] = Job) -> Queue:
        """The rq queue of that name; payloads are JSON."""
        return Queue(name, connection=self.redis, serializer=JSONSerializer, job_class=jobs)

    def trim_failures(self) -> None:
        """Delete the oldest failed jobs beyond `MOST_FAILURES` per queue."""
        for name in (GPU, DEFAULT):
            registry = self.queue(name).failed_job_registry
            for raw in self.redis.zrange(registry.key, 0, -MOST_FAILURES - 1):
                name = bytes(raw).decode()  # type: ignore[arg-type]
                if (there := self.job(name)) is not None:
                    there.delete()
                self.redis.zrem(registry.key, name)

    def waiting(self) -> bool:
        """Whether a job waits for this process, if it is a worker, or else for any."""
        return any(self.redis.llen(self.queue(name).key) for name in self.serves)

    def interleave(self, queue: str) -> None:
        """Have projects take turns in a queue: a small round does not wait for the shards of a large one."""
        self.redis.eval(INTERLEAVE, 1, self.queue(queue).key)

    def enqueue(self, step: str, project: int, *args: Any, after: Sequence[Job] = (), job_id: str | None = None) -> Job:
        """Queue `backend.jobs.<step>(project, *args)`.

        It runs when every job of `after` has ended, well or not: each step looks at what is in the store, so that
        a failed shard costs only itself. A step of a round is queued once, also when the job that queues it runs again.

        Raises:
            RoundOver: the project was stopped, or another round has it by now.
        """
        number = int(args[0]) if step in IN_ROUND else None
        _check(self.redis, project, number)
        name = job_id or "-".join([step, str(project), *_place(step, args)])
        if number is not None and (there := self.job(name)) is not None:
            return there
        job = self.queue(QUEUE_OF.get(step, DEFAULT)).enqueue(
            f"backend.jobs.{step}",
            args=(project, *args),
            job_id=name,
            job_timeout=TIMEOUTS.get(step, TIMEOUT),
            result_ttl=KEEP_RESULT,
            failure_ttl=KEEP_FAILURE,
            retry=Retry(max=2),
            depends_on=Dependency(jobs=list(after), allow_failure=True) if after else None,
            meta={"project": project, "step": step, "done": 0, "total": 0, "round": number},
            description=f"{step} project {project}",
        )
        self.redis.rpush(_key(project, "jobs"), job.id)
        self.redis.ltrim(_key(project, "jobs"), -2000, -1)
        return job

    def job(self, name: str) -> Job | None:
        """The job with this id, None when it is gone, or nothing that can be read."""
        try:
            return Job.fetch(name, connection=self.redis, serializer=JSONSerializer)
        except (NoSuchJobError, ValueError, KeyError, TypeError):
            return None

    def jobs(self, project: int) -> list[dict[str, Any]]:
        """The jobs of the round in progress: id, step, queue, status, done, total."""
        found = []
        for raw in self.redis.lrange(_key(project, "jobs"), 0, -1):
            job = self.job(_text(raw))
            if job is None:
                continue
            status = job.get_status(refresh=False)
            found.append({**job.meta, "id": job.id, "queue": job.origin, "status": status.value if status else "?"})
        return found

    def reconciling(self, project: int) -> Job | None:
        """The last comparison with Label Studio that was queued, while its job is there."""
        name = self.redis.get(_key(project, "reconciling"))
        return self.job(name.decode()) if isinstance(name, bytes) else None

    def reconcile(self, project: int) -> None:
        """Queue a comparison with Label Studio, unless one waits or runs already (a lost one: watch.py)."""
        if self.stopped(project):
            return
        self.redis.sadd("firstrow:projects", project)  # those of the others are not looked after
        there = self.reconciling(project)
        if there is not None and there.get_status(refresh=False) in LIVE:
            return
        name = f"reconcile-{project}-{uuid.uuid4().hex[:12]}"
        self.redis.set(_key(project, "reconciling"), name)
        self.queue(DEFAULT).enqueue(
            "backend.jobs.reconcile",
            args=(project,),
            job_id=name,
            job_timeout=TIMEOUT,
            result_ttl=KEEP_RESULT,
            failure_ttl=KEEP_FAILURE,
            retry=Retry(max=2),
            meta={"project": project, "step": "reconcile"},
            description=f"reconcile project {project}",
        )

    def want_fine_tuning(self, project: int) -> None:
        """Have fine-tuning do something for the project as soon as no other job waits."""
        self.redis.set(_key(project, "fine_tuning"), 1)

    def fine_tune(self, project: int) -> None:
        """Queue what fine-tuning was asked for, if no other job waits; one job of a project at a time."""
        wanted = _key(project, "fine_tuning")
        if GPU not in self.serves or not self.redis.exists(wanted) or self.waiting() or self.stopped(project):
            return
        there = self.job(f"fine_tune-{project}-1")
        if there is not None and there.get_status(refresh=False) in LIVE:
            return
        if self.redis.delete(wanted):
            self.enqueue("fine_tune", project, job_id=f"fine_tune-{project}-1")

    def clean_later(self, project: int) -> None:
        """Have what earlier rounds left cleaned up after a pause, each time a longer one: cleaning up has failed."""
        tries, keep = int(self.redis.incr(_key(project, "cleaned"))), PUT_OFF[-1] + STOPPED
        self.redis.expire(_key(project, "cleaned"), keep)
        self.redis.set(_key(project, "clean"), time.time() + PUT_OFF[min(tries, len(PUT_OFF)) - 1], ex=keep)

    def cleaned(self, project: int) -> None:
        """Cleaning up went well."""
        self.redis.delete(_key(project, "clean"), _key(project, "cleaned"))

    def clean_due(self, project: int) -> None:
        """Queue the cleaning up whose pause is over."""
        when = self.redis.get(_key(project, "clean"))
        due = isinstance(when, bytes) and float(when) < time.time()
        if due and not self.busy(project) and self.redis.delete(_key(project, "clean")):
            self.enqueue("clean", project)

    def forgot(self) -> bool:
        """True for one caller after Redis has lost its memory."""
        return bool(self.redis.set("firstrow:memory", 1, nx=True))

    def turn(self, name: str, seconds: float) -> bool:
        """True for one caller per so many seconds, of all processes."""
        return bool(self.redis.set(name, 1, nx=True, px=max(1, int(1000 * seconds))))

    def alone(self, project: int, name: str, run: Callable[[], None]) -> None:
        """Run something, but not beside another process: one that runs it just then runs it once more instead.

        Who dies in the middle keeps others away for `ALONE` seconds.
        """
        wish, lock = _key(project, f"{name}:wish"), self.redis.lock(_key(project, f"{name}:lock"), timeout=ALONE)
        self.redis.set(wish, 1)
        while self.redis.exists(wish) and lock.acquire(blocking=False):
            try:
                self.redis.delete(wish)
                run()
            finally:
                with suppress(LockError):  # it took longer
                    lock.release()

    def time_to_count(self, project: int) -> bool:
        """Whether it is time to look at the project's counters; true for one caller, who calls `count_later` next."""
        return self.turn(_key(project, "counting"), KEEP_COUNTING)

    def count_later(self, project: int, soon: float, late: float, moved: bool = True) -> None:
        """Have the project's counters looked at again after a pause: `soon`, or longer each time up to `late`."""
        before = self.redis.get(_key(project, "pause"))
        longer = 1.25 * float(before) if isinstance(before, bytes) and not moved else soon
        pause = min(max(longer, soon), late)
        self.redis.set(_key(project, "pause"), pause)
        self.redis.set(_key(project, "counting"), 1, px=int(1000 * pause))

    def counters(self, project: int) -> str:
        """The project's counters at the last look; empty before the first."""
        value = self.redis.get(_key(project, "counters"))
        return value.decode() if isinstance(value, bytes) else ""

    def set_counters(self, project: int, counters: str) -> None:
        """Remember the project's counters."""
        self.redis.set(_key(project, "counters"), counters)

    def settings_moved(self, project: int, settings: str) -> bool:
        """Whether the project has other settings than at the last call, by this digest of them; remembers it."""
        before = self.redis.set(_key(project, "settings"), settings, get=True)
        return not isinstance(before, bytes) or before.decode() != settings

    def uncounted(self, project: int) -> None:
        """What the counters told was not looked into: the next look asks again."""
        self.redis.delete(_key(project, "counters"))

    def due(self, interval: int) -> bool:
        """True for one caller per `interval` seconds, however many workers ask."""
        return bool(self.redis.set("firstrow:tick", int(time.time()), nx=True, ex=max(1, interval)))

    # -- benchmark ----------------------------------------------------------------------------------------

    def enqueue_curve(self, name: str, curve: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> Job:
        """Queue one learning curve of the benchmark of that name."""
        return self.queue(GPU).enqueue(
            "backend.curves.curve_job",
            args=(name, curve, done),
            job_timeout=CURVE_TIMEOUT,
            result_ttl=KEEP_RESULT,
            failure_ttl=KEEP_FAILURE,
            retry=Retry(max=2),
            meta={"step": "curve", "done": 0, "total": 0},
            description=f"curve {curve['strategy']} seed {curve['seed']}",
        )

    def put_row(self, name: str, row: Mapping[str, str]) -> None:
        """Hand a row of a curve to whoever gathers them; it waits there for a week."""
        self.redis.rpush(_rows(name), json.dumps(row))
        self.redis.expire(_rows(name), KEEP_FAILURE)

    def curve_rows(self, name: str, jobs: Sequence[Job], wait: float) -> Iterator[dict[str, str] | str]:
        """Rows as they come, and a sentence for each curve that failed, until every job has ended."""
        left = {job.id: job for job in jobs}
        while True:
            ended = [job for job in left.values() if job.get_status() in (JobStatus.FINISHED, JobStatus.FAILED)]
            # First which jobs have ended, then their rows: none is left behind.
            while found := self.redis.lpop(_rows(name)):
                yield dict(json.loads(bytes(found)))  # type: ignore[arg-type]
            for job in ended:
                del left[job.id]
                if job.get_status() is JobStatus.FAILED:
                    result = job.latest_result()
                    yield f"{job.description}: {((result and result.exc_string) or 'failed').strip().splitlines()[-1]}"
            if not left:
                return
            time.sleep(wait)

    # -- state --------------------------------------------------------------------------------------------

    def register(self, project: int) -> None:
        """Make the project known to the periodic reconcile; lifts a `stop`."""
        self.redis.delete(_key(project, "stopped"))
        self.redis.sadd("firstrow:projects", project)

    def forget(self, project: int) -> None:
        """Remove all that Redis holds of a project (after detach), but for `STOPPED` seconds that it is stopped."""
        self.redis.srem("firstrow:projects", project)
        self.redis.expire(_key(project, "stopped"), STOPPED)
        keys = [key for key in self.redis.scan_iter(match=_key(project, "*"), count=1000) if not _stops(key)]
        if keys:
            self.redis.delete(*keys)

    def projects(self) -> list[int]:
        """Projects this backend has been asked about, in rising order."""
        return sorted(int(i) for i in self.redis.smembers("firstrow:projects"))

    def state(self, project: int) -> dict[str, Any]:
        """The project's small state, written at each publish; empty when Redis has none."""
        raw = self.redis.get(_key(project, "state"))
        return dict(json.loads(raw)) if isinstance(raw, bytes) else {}

    def set_state(self, project: int, state: Mapping[str, Any]) -> None:
        """Replace the project's small state."""
        self.redis.set(_key(project, "state"), json.dumps(state))

    def fail(self, project: int, step: str, message: str, passing: bool = False) -> None:
        """Leave the reason of a failure where `status` looks.

        Args:
            project: Label Studio's project id.
            step: what failed.
            message: why, and what to do.
            passing: whether it is over once the round ends well: a job that was run again.
        """
        error = {"step": step, "message": message, "time": time.time()} | ({"passing": True} if passing else {})
        self.redis.set(_key(project, "error"), json.dumps(error))

    def error(self, project: int) -> dict[str, Any] | None:
        """The last failure: step, message, time; None after a round that went well."""
        raw = self.redis.get(_key(project, "error"))
        return dict(json.loads(raw)) if isinstance(raw, bytes) else None

    def clear_error(self, project: int) -> None:
        """A new round may do better."""
        self.redis.delete(_key(project, "error"))


def progress(done: int, total: int) -> None:
    """Show how far the running job is (in `status`); does nothing outside a worker.

    Raises:
        RoundOver: the project was stopped, or another round has it by now; looked for once a second.
    """
    job = get_current_job()
    if job is None:
        return
    job.meta.update(done=done, total=total)
    job.save_meta()  # type: ignore[no-untyped-call]
    if time.monotonic() - getattr(job, "looked", 0.0) > 1:
        job.looked = time.monotonic()  # type: ignore[attr-defined]
        if isinstance(project := job.meta.get("project"), int):
            _check(job.connection, project, job.meta.get("round"))


def _check(redis: Redis, project: int, number: int | None) -> None:
    """Raise unless the project may be worked at, by the round of this number or by a job of no round."""
    stopped, owner = redis.mget(_key(project, "stopped"), _key(project, "owner"))
    if stopped is not None:
        raise RoundOver(f"project {project} was stopped")
    if number is not None and (owner is None or int(owner) != number):
        raise RoundOver(f"project {project}: round {number} is over, its project was freed")


def _place(step: str, args: Sequence[Any]) -> list[str]:
    """What makes a step's job id its own: round and shard; chance for a step of no round."""
    if step not in IN_ROUND:
        return [uuid.uuid4().hex[:12]]
    return [str(arg) for arg in args[: 2 if step in ("prepare", "score") else 1]]


def _of(job: str) -> int | None:
    """The project in a job's id."""
    parts = job.split("-")
    return int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else None


def _stops(key: bytes) -> bool:
    return key.endswith(b":stopped")


def _key(project: int, name: str) -> str:
    return f"firstrow:{project}:{name}"


def _ours(project: int, annotation: int) -> str:
    return _key(project, f"ours:{annotation}")


def _missed(project: int, annotation: int) -> str:
    return _key(project, f"missed:{annotation}")


def _rows(name: str) -> str:
    return f"firstrow:bench:{name}"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
