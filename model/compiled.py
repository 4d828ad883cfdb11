"""Loops over pixels as machine code: where a dozen array operations would each walk through memory again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import numba

#: Sums may be taken in any order and products fused; what is not finite stays so.
FAST = {"reassoc", "contract", "nsz", "arcp"}
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """A numeric loop as machine code, made at its first call; kept beside the module or in the user's cache."""
    try:
        return cast(F, numba.njit(nogil=True, cache=True, fastmath=FAST)(function))
    except RuntimeError:  # neither can be written
        return cast(F, numba.njit(nogil=True, fastmath=FAST)(function))


def in_slabs(job: Callable[[int, int], Any], rows: int) -> list[Any]:
    """What a job makes of the rows `start` to `stop`, for as many slabs as torch uses threads, at the same time.

    Args:
        job: releases Python's lock while it works, as what is `compiled` does.
        rows: of the whole image.
    """
    count = max(1, min(threads(), rows))
    edges = [rows * slab // count for slab in range(count + 1)]
    # The caller works too: a thread less to wake, and none of them is put where the caller waits.
    others = [_pool(count).submit(job, *slab) for slab in pairwise(edges[1:])]
    return [job(edges[0], edges[1]), *(other.result() for other in others)]


def threads() -> int:
    """How many threads torch uses; all there are, where nobody has loaded torch (it takes seconds, so we do not)."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else os.cpu_count() or 1


@lru_cache(maxsize=2)
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="pixels")
