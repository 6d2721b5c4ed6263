"""A stopwatch for the backends' measurements."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def median_s(call: Callable[[], object], *, budget_s: float = 0.4, least: int = 5) -> float:
    """Median time of a call [s], after one call to warm up.

    Args:
        call: what to time; it returns when its work is done.
        budget_s: repetitions stop after this time.
        least: but not before this many.
    """
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < least or (time.perf_counter() < end and len(times) < 10_000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
