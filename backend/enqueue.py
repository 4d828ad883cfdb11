"""Queues, job ids, timeouts, and one pending round per project.

With `worker.py` alone in importing rq. Everything here is small and lives in Redis; losing Redis loses no
annotation, because a reconcile finds in Label Studio what the lost events would have told.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson
from redis import Redis
from rq import Queue, Retry, get_current_job
from rq.exceptions import NoSuchJobError
from rq.job import Dependency, Job, JobStatus
from rq.serializers import JSONSerializer

log = logging.getLogger(__name__)

#: Seconds a job may run, by the function's name. A model is trained and scored on whatever machine there is,
#: so these are generous; a worker that dies is noticed by its missing heartbeat, not by the timeout.
TIMEOUTS = {"train": 6 * 3600, "score": 2 * 3600, "prepare": 2 * 3600, "fit_codebook": 3600, "clean": 2 * 3600}
TIMEOUT = 900
CURVE_TIMEOUT = 7 * 24 * 3600
KEEP_RESULT = 3600
KEEP_FAILURE = 7 * 24 * 3600
#: Seconds for which an update made by ourselves is recognised when its event comes.
OURS = 3600
#: Seconds that an update by a person is kept which came while we were changing the same annotation.
KEEP_UPDATE = 24 * 3600
GPU, DEFAULT = "gpu", "default"
QUEUE_OF = {"train": GPU, "score": GPU}
#: Steps after whose failure nothing of the round is left to run.
ENDS = {"start_round", "plan_round", "plan_scores", "publish"}
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


class Board:
    """What web processes and workers tell each other, in Redis.

    Args:
        redis_url: address of the Redis server, for example `redis://127.0.0.1:6379/0`.
    """

    def __init__(self, redis_url: str) -> None:
        self.redis: Redis = Redis.from_url(redis_url, socket_connect_timeout=2, health_check_interval=30)

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

    def expect_own_update(self, annotation: int, content: str) -> None:
        """Say that we are about to change fields of an annotation, but not its regions.

        Args:
            annotation: Label Studio's annotation id.
            content: digest of its regions.
        """
        self.redis.delete(f"firstrow:update:{annotation}")
        self.redis.set(f"firstrow:ours:{annotation}", content, ex=OURS)

    def own_update(self, annotation: int) -> str:
        """Digest of the regions of an annotation that we have changed lately; empty for any other."""
        value = self.redis.get(f"firstrow:ours:{annotation}")
        return value.decode() if isinstance(value, bytes) else ""

    def keep_update(self, annotation: int, row: Mapping[str, Any]) -> None:
        """Keep what a person saved in an annotation while we were changing it: Label Studio may have lost it."""
        self.redis.set(f"firstrow:update:{annotation}", orjson.dumps(row), ex=KEEP_UPDATE)

    def forget_update(self, annotation: int) -> None:
        """What `keep_update` kept is in Label Studio again, and the annotation is no longer one that we change."""
        self.redis.delete(f"firstrow:update:{annotation}", f"firstrow:ours:{annotation}")

    def missed_update(self, annotation: int) -> dict[str, Any] | None:
        """What `keep_update` kept of an annotation; None for most."""
        value = self.redis.get(f"firstrow:update:{annotation}")
        return dict(orjson.loads(value)) if isinstance(value, bytes) else None

    # -- rounds -------------------------------------------------------------------------------------------

    def request_round(self, project: int, reason: str, train: bool = False) -> str | None:
        """Start a round, or have the running one followed by another. Never drops a wish.

        Args:
            project: Label Studio's project id.
            reason: for the log.
            train: retrain even when too few annotations are new.

        Returns:
            The id of the job that starts the round; that of the running round when the wish was coalesced.
        """
        self.register(project)
        if train:
            self.redis.set(_key(project, "train"), 1)
        # The wish is written before the attempt to start: a round that ends in between sees it.
        self.redis.set(_key(project, "again"), reason)
        number = int(self.redis.incr(_key(project, "count")))
        job = f"round-{project}-{number}"
        if not self.redis.set(_key(project, "busy"), job, nx=True):
            return self.busy(project)
        log.info("project %d: round %s requested (%s)", project, job, reason)
        self.enqueue("start_round", project, job_id=job)
        return job

    def busy(self, project: int) -> str | None:
        """Id of the job that started the round in progress, or None."""
        value = self.redis.get(_key(project, "busy"))
        return value.decode() if isinstance(value, bytes) else None

    def begin(self, project: int) -> bool:
        """Start of a round: clears the wish for one. Returns whether a training was asked for by hand."""
        with self.redis.pipeline() as pipe:
            pipe.delete(_key(project, "again"))
            pipe.getdel(_key(project, "train"))
            return bool(pipe.execute()[-1])

    def finish(self, project: int) -> None:
        """End of a round: free the project, and start the next round if one was wished for meanwhile."""
        self.redis.delete(_key(project, "busy"), _key(project, "jobs"))
        if self.wished(project):
            self.request_round(project, "changes during the last round")

    def abandon(self, project: int, step: str) -> None:
        """A step failed for good: free the project if nothing of its round is left to run.

        The next round starts with the next event or reconcile, not at once: whatever is broken gets time to heal.
        """
        job = get_current_job()
        if job is not None:
            job.retries_left = 0  # a fault of ours repeats itself; retries are for workers that died
        if step in ENDS:
            self.redis.set(_key(project, "again"), f"{step} failed")
            self.redis.delete(_key(project, "busy"), _key(project, "jobs"))

    def wished(self, project: int) -> bool:
        """Whether events or a failed round wait for the next round."""
        return bool(self.redis.exists(_key(project, "again"), _key(project, "changed"), _key(project, "deleted")))

    def rescue(self, project: int) -> bool:
        """Free a project whose round has no job left (a Redis flush, a lost worker). Returns whether it did."""
        if self.busy(project) is None or any(job["status"] in LIVE for job in self.jobs(project)):
            return False
        log.warning("project %d: its last round was lost; starting another", project)
        self.redis.set(_key(project, "again"), "the last round was lost")
        self.finish(project)
        return True

    # -- jobs ---------------------------------------------------------------------------------------------

    def queue(self, name: str) -> Queue:
        """The rq queue of that name; payloads are JSON."""
        return Queue(name, connection=self.redis, serializer=JSONSerializer)

    def waiting(self) -> bool:
        """Whether a job waits for a worker."""
        return any(self.redis.llen(self.queue(name).key) for name in (GPU, DEFAULT))

    def interleave(self, queue: str) -> None:
        """Have projects take turns in a queue: a small round does not wait for the shards of a large one."""
        self.redis.eval(INTERLEAVE, 1, self.queue(queue).key)

    def enqueue(self, step: str, project: int, *args: Any, after: Sequence[Job] = (), job_id: str | None = None) -> Job:
        """Queue `backend.jobs.<step>(project, *args)`.

        It runs when every job of `after` has ended, well or not: each step looks at what is in the store, so that
        a failed shard costs only itself.
        """
        job = self.queue(QUEUE_OF.get(step, DEFAULT)).enqueue(
            f"backend.jobs.{step}",
            args=(project, *args),
            job_id=job_id or f"{step}-{project}-{uuid.uuid4().hex}",
            job_timeout=TIMEOUTS.get(step, TIMEOUT),
            result_ttl=KEEP_RESULT,
            failure_ttl=KEEP_FAILURE,
            retry=Retry(max=2),
            depends_on=Dependency(jobs=list(after), allow_failure=True) if after else None,
            meta={"project": project, "step": step, "done": 0, "total": 0},
            description=f"{step} project {project}",
        )
        self.redis.rpush(_key(project, "jobs"), job.id)
        self.redis.ltrim(_key(project, "jobs"), -2000, -1)
        return job

    def jobs(self, project: int) -> list[dict[str, Any]]:
        """The jobs of the round in progress: id, step, queue, status, done, total."""
        found = []
        for raw in self.redis.lrange(_key(project, "jobs"), 0, -1):
            try:
                job = Job.fetch(_text(raw), connection=self.redis, serializer=JSONSerializer)
            except NoSuchJobError:
                continue
            status = job.get_status(refresh=False)
            found.append({**job.meta, "id": job.id, "queue": job.origin, "status": status.value if status else "?"})
        return found

    def reconcile(self, project: int) -> None:
        """Queue a comparison with Label Studio, unless one waits already."""
        if self.redis.set(_key(project, "reconciling"), 1, nx=True, ex=TIMEOUT):
            self.queue(DEFAULT).enqueue(
                "backend.jobs.reconcile",
                args=(project,),
                job_timeout=TIMEOUT,
                result_ttl=KEEP_RESULT,
                failure_ttl=KEEP_FAILURE,
                meta={"project": project, "step": "reconcile"},
            )

    def reconciled(self, project: int) -> None:
        """The comparison has run: the next one may be queued."""
        self.redis.delete(_key(project, "reconciling"))

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
        """Make the project known to the periodic reconcile."""
        self.redis.sadd("firstrow:projects", project)

    def forget(self, project: int) -> None:
        """Remove all that Redis holds of a project (after detach)."""
        self.redis.srem("firstrow:projects", project)
        keys = list(self.redis.scan_iter(match=_key(project, "*"), count=1000))
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

    def fail(self, project: int, step: str, message: str) -> None:
        """Leave the reason of a failure where `status` looks."""
        self.redis.set(_key(project, "error"), json.dumps({"step": step, "message": message, "time": time.time()}))

    def error(self, project: int) -> dict[str, Any] | None:
        """The last failure: step, message, time; None after a round that went well."""
        raw = self.redis.get(_key(project, "error"))
        return dict(json.loads(raw)) if isinstance(raw, bytes) else None

    def clear_error(self, project: int) -> None:
        """A new round may do better."""
        self.redis.delete(_key(project, "error"))


def progress(done: int, total: int) -> None:
    """Show how far the running job is (in `status`); does nothing outside a worker."""
    job = get_current_job()
    if job is not None:
        job.meta.update(done=done, total=total)
        job.save_meta()  # type: ignore[no-untyped-call]


def _key(project: int, name: str) -> str:
    return f"firstrow:{project}:{name}"


def _rows(name: str) -> str:
    return f"firstrow:bench:{name}"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
