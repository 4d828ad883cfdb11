"""What grows while people label: nothing. Ten minutes, with pauses, since other tests run beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Backend
from soak import MAY_GROW, PICTURES, Sample, Soak, growing

from backend.generations import MOST_ORDERS

#: Long enough for curves to be compared with themselves; and between two orders.
SECONDS, PAUSE = 600, 8


def test_what_grows_is_told() -> None:
    flat = [Sample(n, n, 500, 100, 200, 20, 200, 60, 80.0) for n in range(30)]
    assert growing(flat) == []
    rising = [Sample(n, n, 500 + 20 * n, 100, 200 + 40 * n, 20, 200 + 40 * n, 60, 80.0) for n in range(30)]
    assert [fault.split()[0] for fault in growing(rising)] == ["worker_mb", "redis_keys", "predictions"]
    assert set(MAY_GROW) == set(Sample.__dataclass_fields__) - {"seconds", "orders"}


@pytest.mark.timeout(900)
def test_nothing_grows_while_people_label(make_backend: Callable[..., Backend], tmp_path: Path) -> None:
    backend = make_backend(FIRSTROW_COARSE_TASKS="1")
    samples = Soak(backend.context, tmp_path).run(SECONDS, 15, lambda sample: None, PAUSE)
    last = samples[-1]
    assert last.orders > samples[0].orders
    assert last.redis_keys < 800, last
    assert last.versions <= 2 * MOST_ORDERS + 12, last
    assert last.predictions <= (MOST_ORDERS + 2) * PICTURES + 40 * MOST_ORDERS, last
    assert growing(samples) == [], samples
