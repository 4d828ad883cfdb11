"""The class that label-studio-ml loads: predict reads what workers stored, fit enqueues; no learning, no state.

It takes the constructor and method forms of label-studio-ml 1.0.9 (`label_config, train_output, **kwargs`) and of 2.x
(`project_id, label_config`, `setup()`, `predict(tasks, context)`, `fit(event, data)`), so either server can load it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from label_studio_ml.model import LabelStudioMLBase
from redis import RedisError

from backend.context import Context, context
from backend.errors import FirstRowError, StoreError
from backend.events import EVENTS, EventError, handle, parse, project_id
from backend.prelabels import known_tasks, predictions

log = logging.getLogger(__name__)

#: What `/setup` names before the first round: nothing is stored under it, so Label Studio asks again each time.
NO_VERSION = "first-row-waits"
#: Label Studio may send a whole project in one request and reads the answer for 100 s.
CHUNK, SECONDS = 16, 60.0
#: Numbers of masks in one answer: 160 MB while it is put together.
ROOM = 20_000_000

Answer = list[list[dict[str, Any]]]


class FirstRow(LabelStudioMLBase):  # type: ignore[misc]  # label-studio-ml has no types
    """One instance per request, for one project; what it knows is in Redis and in the store.

    Args:
        project_id: Label Studio's project id, or `<id>.<time stamp>`; without it (1.0.9's
            own server) each task names it.
        label_config: not used here; workers read it from Label Studio.
        train_output: of 1.0.9, not used; results are in the store.
        where: the doors to use; those of the environment by default.
        kwargs: of 1.0.9 (`hostname`, `access_token`, ...), not used: the token that Label Studio sends is refused by
            current Label Studios.
    """

    TRAIN_EVENTS = EVENTS
    #: After which `predict` leaves out the rest of a request.
    seconds: float = SECONDS
    room: int = ROOM

    def __init__(
        self,
        project_id: str | int | None = None,
        label_config: str | None = None,
        train_output: Mapping[str, Any] | None = None,
        where: Context | None = None,
        **kwargs: Any,
    ) -> None:
        # The base classes' constructors keep state (1.0.9 a parsed config, 2.x a cache file): neither is called.
        self._project, self._where = project_id, where

    def setup(self) -> None:
        """2.x calls this once per instance; there is nothing to load."""

    @property
    def model_version(self) -> str:
        """What `/setup` answers: the version of the prelabels in force."""
        return version(self._doors(), project_id(self._project)) if self._project is not None else NO_VERSION

    def get(self, key: str) -> str | None:
        """2.x reads its model version this way."""
        return self.model_version if key == "model_version" else None

    def predict(self, tasks: Sequence[Any], context: Any = None, **kwargs: Any) -> Answer:
        """Prelabels that workers have stored.

        Args:
            tasks: as Label Studio sends them.
            context: what the editor sent of an interactive request; not used.
            kwargs: `login`, `password` and the like; not used.

        Returns:
            One list per task, empty when nothing is ready or the task cannot be served; never None. A task that
            comes twice, or after the answer has become too large or too slow, is left out.
        """
        answers: Answer = [[] for _ in tasks]
        wanted, done, room, began = self._ready(tasks), 0, self.room, time.monotonic()
        for places in _chunks(wanted):
            if time.monotonic() - began > self.seconds or room < 0:
                break
            for place, answer in zip(places, self._prelabels([tasks[place] for place in places]), strict=True):
                answers[place], room = answer, room - _numbers(answer)
            done += len(places)
        if done < len(wanted):
            log.warning(
                "predict: %d of %d tasks left out: the answer was too slow or too large",
                len(wanted) - done,
                len(wanted),
            )
        return answers

    def fit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass an event on: `fit(event, data)` in 2.x, `fit((), event=..., data=...)` in 1.0.9.

        Returns:
            The id of the job that will look at it, under `job`.
        """
        event = kwargs.get("event", args[0] if args else None)
        data = kwargs.get("data", args[1] if len(args) > 1 else None)
        found = parse({**(data or {}), "action": event})
        return {"job": handle(found, self._doors().board) if found else None}

    def _doors(self) -> Context:
        return self._where or context()

    def _ready(self, tasks: Sequence[Any]) -> list[int]:
        """Places of the tasks that may have a prelabel, each task once; the others cost nothing further."""
        first: dict[int, int] = {}
        known: dict[int, Container[int]] = {}
        for place, task in enumerate(tasks):
            try:
                number = int(task["id"])
                project = project_id(self._project if self._project is not None else task.get("project"))
            except (TypeError, KeyError, ValueError, OverflowError, AttributeError, EventError):
                continue
            if project not in known:
                known[project] = self._known(project)
            if number in known[project]:
                first.setdefault(number, place)
        return sorted(first.values())

    def _known(self, project: int) -> Container[int]:
        """Tasks of a project that were there when its order was published."""
        doors = self._doors()
        try:
            return known_tasks(doors.project(project), state(doors, project))
        except FirstRowError as error:
            log.error("project %d gets no prelabels: %s", project, error)
            return ()

    def _prelabels(self, tasks: Sequence[Any]) -> Answer:
        """One list per task; a failure is found task by task."""
        try:
            return self._stored(tasks)
        except Exception as error:  # whatever one task does, the others are served
            if len(tasks) > 1:
                return [answer for task in tasks for answer in self._prelabels([task])]
            log.warning("predict: a task gets no prelabel: %s: %s", type(error).__name__, error)
            return [[]]

    def _stored(self, tasks: Sequence[Mapping[str, Any]]) -> Answer:
        doors = self._doors()
        project = project_id(self._project if self._project is not None else tasks[0].get("project"))
        found = predictions(doors.store, state(doors, project), project, tasks)
        if len(found) != len(tasks):
            raise ValueError(f"{len(found)} answers for {len(tasks)} tasks")
        return [list(answer or []) for answer in found]


def state(doors: Context, project: int) -> dict[str, Any]:
    """The project's small state, from Redis, or from the store while Redis is down or has lost it; else empty."""
    try:
        if found := doors.board.state(project):
            return found
    except RedisError as error:
        log.warning("project %d: Redis does not answer (%s); using the store", project, type(error).__name__)
    try:
        return doors.project(project).state()
    except StoreError as error:
        log.error("project %d: %s", project, error)
        return {}


def version(doors: Context, project: int) -> str:
    """The version of the prelabels in force."""
    return str(state(doors, project).get("version") or NO_VERSION)


def _chunks(places: Sequence[int]) -> Iterator[Sequence[int]]:
    return (places[start : start + CHUNK] for start in range(0, len(places), CHUNK))


def _numbers(answer: Sequence[Mapping[str, Any]]) -> int:
    """How many numbers the masks of an answer are made of."""
    return sum(len(region["value"].get("rle", ())) for prediction in answer for region in prediction["result"])
