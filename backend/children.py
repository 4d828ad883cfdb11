"""Child processes that never outlive us: each in a process group, its output in a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backend.errors import JobError

#: What a child is told to end, and the seconds it then gets. A worker puts its job back at the second SIGTERM.
FAREWELL = ((signal.SIGTERM, 2.0), (signal.SIGTERM, 6.0), (signal.SIGKILL, 8.0))
#: Seconds between two looks whether a child answers.
LOOK = 0.05
#: What a child does before it becomes the command: ask the system (Linux) to kill it when we die. Not a `preexec_fn`:
#: that runs every library's fork hooks, where Ctrl-C is lost and another thread's lock may never be released.
LEASH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died at once")
os.execvp(sys.argv[2], sys.argv[2:])
"""
#: Variables, by their beginnings, that children get from us alone and never from our own environment.
OURS = ("FIRSTROW_", "LABEL_STUDIO_", "REDIS_URL", "DJANGO_")


@dataclass(frozen=True)
class Child:
    """A running child.

    Attributes:
        name: what it is, for people.
        process: its process, leader of a process group.
        log: file with all it printed.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def child(name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Child]:
    """Run a command until the block ends, or until we die, however we die.

    Args:
        name: what it is; its output is appended to `<name>.log`.
        command: what to run.
        folder: where the log goes.
        environment: what it gets beside our own environment without the settings of First Row and Label Studio.

    Yields:
        The child.
    """
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LEASH, str(os.getpid()), *command],
            env={**inherited(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches us alone
        )
    try:
        yield Child(name, process, log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], farewell: tuple[tuple[signal.Signals, float], ...] = FAREWELL) -> None:
    """End a child and its whole process group.

    Args:
        process: leader of a process group.
        farewell: signals, and the seconds after each; whoever is left in the group at the end is killed.
    """
    for number, patience in farewell:
        if not _signal(process, number):
            break
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    _signal(process, signal.SIGKILL)
    process.wait()


def wait(ready: Callable[[], bool], running: Child, seconds: float) -> None:
    """Wait until a child answers.

    Raises:
        JobError: it ended, or did not answer in time; with the end of its log.
    """
    until = time.monotonic() + seconds
    while not ready():
        code = running.process.poll()
        if code is not None or time.monotonic() > until:
            tail = running.log.read_text(errors="replace")[-2000:]
            what = f"did not answer within {seconds:g} s" if code is None else f"ended with status {code}"
            raise JobError(f"{running.name} {what}; the end of {running.log}:\n{tail}")
        time.sleep(LOOK)


def inherited() -> dict[str, str]:
    """What every child gets of our environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Send a signal to a child's group; False when nobody is left in it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
