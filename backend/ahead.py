"""Items that a thread makes while their reader is busy with those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

#: Items that wait for their reader.
AHEAD = 2


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, of which a thread makes the next ones meanwhile; it knows whose job it works for."""

    def coming() -> Future[T | None]:
        return maker.submit(copy_context().run, make)

    def make() -> T | None:
        return next(items, None)

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as maker:
        try:
            pending = deque(coming() for _ in range(AHEAD))
            while (item := pending.popleft().result()) is not None:
                pending.append(coming())
                yield item
        finally:
            maker.shutdown(cancel_futures=True)
