"""Many webhook events at once: how long each waits, that none is lost. `python -m tests.burst` starts what it needs."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests

from backend.connection import SECRET_HEADER
from backend.context import connect
from backend.embedded import LOOPBACK, free_port, start_redis, start_serve
from backend.secret import project_secret
from backend.settings import Settings

#: Connections that send at once: Label Studio has some threads, each waits for our answer.
SENDERS = 8
PROJECT = 7
MASTER = "of a burst"


def burst(url: str, secret: str, events: int, seconds: float) -> list[float]:
    """Send annotations of so many tasks, evenly spread over the time; milliseconds until each answer, sorted."""
    began = time.monotonic()

    def send(sender: int) -> list[float]:
        waits = []
        with requests.Session() as session:
            for number in range(sender, events, SENDERS):
                time.sleep(max(0.0, began + seconds * number / events - time.monotonic()))
                event = {"action": "ANNOTATION_CREATED", "project": {"id": PROJECT}, "task": {"id": number + 1}}
                start = time.perf_counter()
                answer = session.post(
                    f"{url}/webhook",
                    json={**event, "annotation": {"id": number + 1, "task": number + 1, "result": []}},
                    headers={SECRET_HEADER: secret},
                    timeout=10,
                )
                waits.append(1000 * (time.perf_counter() - start))
                answer.raise_for_status()
        return waits

    with ThreadPoolExecutor(SENDERS) as pool:
        return sorted(wait for waits in pool.map(send, range(SENDERS)) for wait in waits)


def settings(folder: Path, redis_url: str) -> dict[str, str]:
    """Of a web process that nobody but us talks to."""
    port = free_port()
    return {
        "REDIS_URL": redis_url,
        "LABEL_STUDIO_URL": f"http://{LOOPBACK}:9",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "FIRSTROW_URL": f"http://{LOOPBACK}:{port}",
        "FIRSTROW_PORT": str(port),
        "FIRSTROW_STORE": str(folder / "store"),
        "FIRSTROW_SECRET": MASTER,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Send a burst and say how long events waited."""
    parser = argparse.ArgumentParser(prog="python -m tests.burst", description=__doc__)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, start_redis(Path(name)) as redis_url:
        environment = settings(Path(name), redis_url)
        board = connect(Settings.read(environment)).board
        with start_serve(Path(name), environment) as url:
            waits = burst(url, project_secret(MASTER, PROJECT), given.events, given.seconds)
        lost = given.events - len(board.take(PROJECT)[0])
    p99 = statistics.quantiles(waits, n=100)[98]
    sys.stdout.write(
        f"{given.events} events in {given.seconds:g} s: p50 {statistics.median(waits):.1f} ms, p99 {p99:.1f} ms, "
        f"longest {waits[-1]:.1f} ms, {lost} lost\n"
    )
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
