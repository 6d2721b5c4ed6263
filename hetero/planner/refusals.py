"""Why there is no placement, found by searching again with one rule after the other taken away."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.bounds import Weights, states
from hetero.planner.checks import refuse_memory, refuse_short_memory
from hetero.planner.labels import Found, LabelSearch
from hetero.planner.solution import NotFoundInTimeError
from hetero.planner.symmetry import classes
from hetero.schedule import GPIPE

if TYPE_CHECKING:
    from hetero.planner.problem import Problem

_BEAM = 100_000
_MOST_NAMED = 6


def check_hopeless(problem: Problem) -> None:
    """Refuse what needs no search: a layer that is left without a device, or too little memory in total."""
    for layer, times in zip(problem.layers, problem.forward, strict=True):
        if not np.isfinite(times).any():
            raise PlacementError(f"no other device can run layer {layer!r}")
    refuse_short_memory(problem)


def refuse(problem: Problem, found: Found, deadline: float, *, is_only: bool) -> NoReturn:
    """Say why there is no placement, or none was found; the reason is looked for until the deadline.

    Args:
        problem: as it was searched: under 1F1B from its last layer on.
        found: what the search gave.
        deadline: `time.monotonic()`.
        is_only: whether a placement is known, and no other one was found.
    """
    if is_only:
        raise PlacementError("there is no other placement")
    if not found.is_complete:
        raise NotFoundInTimeError("no placement was found in the time given", remedy="a larger time_limit_s")
    if problem.schedule != GPIPE:
        _refuse_microbatches(problem, deadline)
    unlimited, limited = _attempt(problem.without_memory_limits(), deadline), _attempt(problem, deadline)
    if not limited.is_complete or not (unlimited.path or unlimited.is_complete):
        raise NotFoundInTimeError(
            "no placement keeps to the limits; which one forbids it was not found in the time given",
            remedy="a larger time_limit_s",
        )
    if not unlimited.path:
        _refuse_links(problem, deadline)
        layer = problem.layers[unlimited.reached]
        able = [d for d, time in zip(problem.devices, problem.forward[unlimited.reached], strict=True) if time < np.inf]
        raise PlacementError(
            f"no placement reaches layer {layer!r}: a device holds one run of consecutive layers",
            found=f"{layer!r} can run on {', '.join(able)} only, which earlier layers had to take or no link leads to",
            remedy="remove a pin or a colocation, add a link, or add a device",
        )
    at = min(limited.reached, len(problem.layers) - 1)
    free = {problem.devices[d]: bytes_free for d, bytes_free in limited.free.items()}
    needed = int(problem.least_bytes[at][np.isfinite(problem.forward[at])].min())
    where = "before" if problem.schedule == GPIPE else "behind"
    refuse_memory(problem.layers[at], needed, free, after=f" after the {limited.reached} layers {where} it")


def _attempt(problem: Problem, deadline: float) -> Found:
    """Any placement."""
    groups = classes(problem)
    search = LabelSearch(problem, Weights(), groups, states(problem, groups), ())
    return search.run(upper=np.inf, beam=_BEAM, deadline=deadline)


def _refuse_microbatches(problem: Problem, deadline: float) -> None:
    """Raise the error if a placement of more stages than micro-batches would do."""
    m, most = problem.n_microbatches, len(problem.devices)
    if m < most and _attempt(dataclasses.replace(problem, n_microbatches=most), deadline).path:
        raise PlacementError(
            "1f1b needs at least as many micro-batches as stages",
            found=f"{m} micro-batches, and no placement of {m} stages or fewer that keeps to the limits",
            remedy="profile with more micro-batches, or use schedule='gpipe'",
        )


def _refuse_links(problem: Problem, deadline: float) -> None:
    """Raise the error if a placement would do that needs a link which is missing."""
    missing = ~np.isfinite(problem.latency)
    linked = dataclasses.replace(problem, latency=np.where(missing, 0.0, problem.latency))
    if not missing.any() or not _attempt(linked.without_memory_limits(), deadline).path:
        return
    pairs = [
        f"{a} and {b}" for (i, a), (j, b) in itertools.combinations(enumerate(problem.devices), 2) if missing[i, j]
    ]
    pairs += [
        f"{b} and {a}"
        for (i, a), (j, b) in itertools.combinations(enumerate(problem.devices), 2)
        if missing[j, i] and not missing[i, j]
    ]
    more = f" and {len(pairs) - _MOST_NAMED} more" if len(pairs) > _MOST_NAMED else ""
    raise PlacementError(
        "the topology is not connected: every placement would need a link that is missing",
        found=f"no link between {'; '.join(pairs[:_MOST_NAMED])}{more}",
        remedy="add it to the topology's links, with latency_s and bandwidth",
    )
