"""The parent of a worker process: starts it, restarts it when it dies, passes on the wish to stop.

It never imports torch, and sets the child's allocator and threads before torch reads them.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

#: Seconds that a worker told to stop at once gets to put its job back, and after which it is told so again.
MERCY, AGAIN = 10, 0.5
#: Seconds before a worker that died is replaced: doubles up to the longest, back to the shortest after a long life.
SHORTEST, LONGEST = 1.0, 30.0
#: glibc hands every large block back to the system and fetches it again: an eager forward took 2.8 times as long.
#: Waiting OpenMP threads that spin make alternating torch and numpy calls up to 16 times slower.
CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "OMP_WAIT_POLICY": "passive",
}


class Supervisor:
    """Keeps one worker process running until it is told to stop.

    The first SIGTERM or SIGINT lets the running job end; the second has it put back into its queue at once.

    Args:
        command: starts the worker.
        environment: of the worker.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = list(command), environment
        self.child: subprocess.Popen[bytes] | None = None
        self.signals = 0
        self.woken = threading.Event()

    def run(self) -> int:
        """Start the worker, and another whenever one dies.

        Returns:
            The exit status of this process, 0.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        pause = SHORTEST
        while not self.signals:
            born = time.monotonic()
            code = self._one_life()
            if self.signals:
                break
            if time.monotonic() - born > LONGEST:
                pause = SHORTEST
            log.error("worker %s; another starts in %.0f s", _ending(code), pause)
            self.woken.wait(pause)
            pause = min(2 * pause, LONGEST)
        return 0

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: pass the wish to stop on."""
        self.signals += 1
        self.woken.set()
        if self.child is None or self.child.returncode is not None:
            return
        log.info("worker: %s", "stops after its job" if self.signals == 1 else "stops now, its job goes back")
        self.child.send_signal(signal.SIGTERM)
        if self.signals == 2:
            threading.Thread(target=self._insist, args=(self.child,), daemon=True).start()

    def _insist(self, child: subprocess.Popen[bytes]) -> None:
        # Two signals that come at nearly the same time are one to a process: so they are sent again.
        for _ in range(round(MERCY / AGAIN)):
            time.sleep(AGAIN)
            if child.returncode is not None:
                return
            child.send_signal(signal.SIGTERM)
        child.kill()

    def _one_life(self) -> int:
        # A process group of its own: Ctrl-C in a terminal reaches the worker once, through us.
        self.child = subprocess.Popen(self.command, env=self.environment, process_group=0)
        if self.signals:
            self.child.terminate()
        return self.child.wait()


def run(queues: Sequence[str], entry: str = "backend.worker") -> int:
    """Run a worker for these queues, the first one first, until told to stop.

    Args:
        queues: names, in order of preference.
        entry: the module that is the worker's program.

    Returns:
        The exit status, 0.
    """
    name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    command = [sys.executable, "-m", entry, "--queues", ",".join(queues), "--name", name]
    return Supervisor([*command, "--parent", str(os.getpid())], child_environment(dict(os.environ))).run()


def child_environment(environment: dict[str, str]) -> dict[str, str]:
    """The worker's environment: what the operator set wins over ours."""
    return {**CHILD_ENVIRONMENT, "OMP_NUM_THREADS": str(processors()), **environment}


def processors(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors this container may use; torch alone counts those of the whole machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
        return usable if limit == "max" else max(1, min(usable, math.ceil(int(limit) / int(period))))
    except (OSError, ValueError):
        return usable


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
