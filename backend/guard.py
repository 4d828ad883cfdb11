"""Which jobs a worker runs: those named here, with arguments of the right kind, and nothing else that is in Redis.

A job in Redis names a function, and rq imports and calls whatever it names, callbacks and addresses to call included.
So whoever can write to Redis could run code. Here the name is compared before anything is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rq.exceptions import DeserializationError
from rq.job import Job

from backend.errors import FirstRowError

#: Kinds of a job's arguments, in order; None: any.
Kinds = tuple[type, ...] | None
#: Every function that a worker runs, by its full name.
ALLOWED: Mapping[str, Kinds] = {
    "backend.jobs.start_round": (int, str),
    "backend.jobs.fit_codebook": (int, int),
    "backend.jobs.prepare": (int, int, int),
    "backend.jobs.plan_round": (int, int, int, bool),
    "backend.jobs.train": (int, int),
    "backend.jobs.plan_scores": (int, int),
    "backend.jobs.score": (int, int, int),
    "backend.jobs.publish": (int, int),
    "backend.jobs.fine_tune": (int,),
    "backend.jobs.clean": (int,),
    "backend.jobs.reconcile": (int,),
    "backend.curves.curve_job": (str, dict, list),
}


class Refused(FirstRowError):
    """A job that is none of ours: somebody else writes to this Redis."""


class GuardedJob(Job):
    """A job that calls only what is allowed; callbacks and web hooks, which we never use, are not called at all."""

    allowed: Mapping[str, Kinds] = ALLOWED

    @property
    def func(self) -> Any:
        """The function to call.

        Raises:
            Refused: this job is none of ours; nothing was imported.
        """
        self.check()
        return super().func

    def check(self) -> None:
        """Raise if this job is none of ours; it is not tried again.

        Raises:
            Refused: says why.
        """
        if reason := self.fault():
            self.retries_left = 0
            self.repeats_left = 0
            raise Refused(f"job {self.id} was refused: {reason}; is Redis open to others?")

    def fault(self) -> str:
        """Why this job is none of ours; empty when it is."""
        try:
            name = self.func_name
        except DeserializationError:
            return "it is not JSON"
        if not isinstance(name, str) or name not in self.allowed:
            return f"{str(name)[:80]!r} is not a job of First Row"
        kinds = self.allowed[name]
        given = [type(arg) for arg in self.args]
        if self.instance is not None or self.kwargs or (kinds is not None and given != list(kinds)):
            return f"{name} does not take these arguments"
        if any(isinstance(arg, int) and arg < 0 for arg in self.args):
            return f"{name} takes no negative numbers"
        if self._success_callback_name or self._failure_callback_name or self._stopped_callback_name or self.webhooks:
            return "jobs of First Row call nobody back"
        return ""

    @property
    def success_callback(self) -> None:
        """None is called."""
        return None

    @property
    def failure_callback(self) -> None:
        """None is called."""
        return None

    @property
    def stopped_callback(self) -> None:
        """None is called."""
        return None

    def send_webhooks(self, *args: Any, **more: Any) -> None:
        """None are sent."""


def guarded(allowed: Mapping[str, Kinds]) -> type[GuardedJob]:
    """Jobs that call only these functions."""
    return type("GuardedJob", (GuardedJob,), {"allowed": dict(allowed)})
