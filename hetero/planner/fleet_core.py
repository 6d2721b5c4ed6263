"""The compiled pricing of pipelines: which one earns most beyond what its devices are worth.

A pipeline with bottleneck T hands out 1/T micro-batches a second and takes u_c devices of class c, each worth p_c. Its
return is  r = 1 / (T p u).  With q(T) the least worth p u of a pipeline whose stages and hand-overs all take T at most,
a step function that falls as T grows, the largest return is that of  1 / (T q(T)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from hetero.planner.problem import Floats
    from hetero.planner.symmetry import Ints

_BELOW = 1 - 1e-12


@numba.njit("void(f8[:,:], f8[:], i8[:,:], f8[:,:,:], f8[:], f8, f8[:,:,:], i8[:,:,:])", cache=True)  # type: ignore[untyped-decorator]
def _tabulate(
    loads: Floats, fixed: Floats, stop: Ints, hops: Floats, worth: Floats, limit: float, tables: Floats, ends: Ints
) -> None:
    """Fill in the least worth of the devices for the layers from each cut on, by number of stages allowed.

    Args:
        loads: (C, L + 1) time of the layers before each cut.
        fixed: (C,) time of a stage's call.
        stop: (C, L + 1) last cut that memory and missing times let a stage from each cut reach.
        hops: (C, C, L + 1) time of a hand-over at each cut.
        worth: (C,) of a device.
        limit: T.
        tables: (K + 1, C + 1, L + 1) to be filled: after a stage of each class, row C at the start; K = 1: the number
            of stages has no limit.
        ends: (K + 1, C, L + 1) to be filled: end of the best stage of a class from each cut, -1: none.
    """
    levels, classes, cuts = len(tables) - 1, loads.shape[0], loads.shape[1]
    queue = np.empty((classes, cuts), np.int64)
    tables[:] = np.inf
    tables[:, :, cuts - 1] = 0.0
    ends[:] = -1
    for k in range(1, levels + 1):
        rest, table = tables[k if levels == 1 else k - 1], tables[k]
        head, tail = np.full(classes, cuts, np.int64), np.full(classes, cuts, np.int64)
        for i in range(cuts - 2, -1, -1):
            for c in range(classes):
                key = rest[c, i + 1]
                if key < np.inf:
                    while head[c] < tail[c] and rest[c, queue[c, head[c]]] > key:
                        head[c] += 1
                    head[c] -= 1
                    queue[c, head[c]] = i + 1
                while head[c] < tail[c]:
                    j = queue[c, tail[c] - 1]
                    if j <= stop[c, i] and fixed[c] + (loads[c, j] - loads[c, i]) <= limit:
                        break
                    tail[c] -= 1
                if head[c] == tail[c]:
                    head[c] = tail[c] = cuts
                    continue
                ends[k, c, i] = j = queue[c, tail[c] - 1]
                stage = worth[c] + rest[c, j]
                for before in range(classes):
                    if hops[before, c, i] <= limit and stage < table[before, i]:
                        table[before, i] = stage
                if stage < table[classes, i]:
                    table[classes, i] = stage


@numba.njit("Tuple((f8, i8))(f8[:,:], f8[:], i8[:,:], f8[:,:,:], f8[:], f8, f8[:,:,:], i8[:,:,:], i8[:,:])", cache=True)  # type: ignore[untyped-decorator]
def _follow(
    loads: Floats,
    fixed: Floats,
    stop: Ints,
    hops: Floats,
    worth: Floats,
    limit: float,
    tables: Floats,
    ends: Ints,
    path: Ints,
) -> Any:
    """Bottleneck and number of stages of the pipeline that the tables describe; its classes and ends into `path`."""
    levels, classes, cuts = len(tables) - 1, loads.shape[0], loads.shape[1]
    i, before, n, k, slowest = 0, classes, 0, levels, 0.0
    while i < cuts - 1:
        rest = tables[k if levels == 1 else k - 1]
        best, best_c = np.inf, -1
        for c in range(classes):
            if ends[k, c, i] >= 0 and (before == classes or hops[before, c, i] <= limit):
                value = worth[c] + rest[c, ends[k, c, i]]
                if value < best:
                    best, best_c = value, c
        j = ends[k, best_c, i]
        slowest = max(slowest, fixed[best_c] + (loads[best_c, j] - loads[best_c, i]))
        if before < classes:
            slowest = max(slowest, hops[before, best_c, i])
        path[n, 0], path[n, 1] = best_c, j
        n, i, before = n + 1, j, best_c
        if levels > 1:
            k -= 1
    return slowest, n


@numba.njit(  # type: ignore[untyped-decorator]
    "Tuple((f8, i8, f8[:], i8[:], i8[:,:,:]))(f8[:,:], f8[:], i8[:,:], f8[:,:,:], f8[:], f8, f8, i8, i8)", cache=True
)
def sweep(
    loads: Floats,
    fixed: Floats,
    stop: Ints,
    hops: Floats,
    worth: Floats,
    largest: float,
    step: float,
    most_stages: int,
    most: int,
) -> Any:
    """A bound for the return of all pipelines, and pipelines with a return above 1.

    T falls from `largest`. A pipeline found at T with bottleneck T' <= T has q(T') = q(T), so that up to T' all is
    known. Below T' the worth is q at least, and the return at most 1 / (T q): so that bottlenecks down to
    min(T', 1 / q) / (1 + step) have a return of at most max(1, 1 / (T' q)) (1 + step), and can be left out.

    Args:
        loads: as for `_tabulate`, with those that follow up to `worth`.
        fixed: see there.
        stop: see there.
        hops: see there; for pipelines of one stage all infinite.
        worth: see there.
        largest: no bottleneck is larger.
        step: relative step of T.
        most_stages: of a pipeline; 1 or L and more: no limit beside that of `hops`.
        most: pipelines are returned at most.

    Returns:
        The bound, the number of pipelines, their bottlenecks, numbers of stages, and (n, L, 2) class and end of stages.
    """
    classes, cuts = loads.shape
    levels = 1 if most_stages >= cuts - 1 else most_stages
    tables = np.empty((levels + 1, classes + 1, cuts))
    ends = np.empty((levels + 1, classes, cuts), np.int64)
    slowest, lengths = np.empty(most), np.empty(most, np.int64)
    paths = np.zeros((most, cuts - 1, 2), np.int64)
    path = np.zeros((cuts - 1, 2), np.int64)
    found, bound, limit = 0, 0.0, largest
    while True:
        _tabulate(loads, fixed, stop, hops, worth, limit, tables, ends)
        least = tables[levels, classes, 0]
        if not least < np.inf:
            return bound, found, slowest, lengths, paths
        reached, n = _follow(loads, fixed, stop, hops, worth, limit, tables, ends, path)
        if not reached > 0.0:
            return np.inf, found, slowest, lengths, paths
        gain = 1.0 / (reached * least) if least > 0.0 else np.inf
        if gain > 1.0 + 1e-9 and found < most:
            slowest[found], lengths[found] = reached, n
            paths[found, :n] = path[:n]
            found += 1
        following = reached / (1.0 + step)
        if gain < 1.0:
            following = min(following, 1.0 / (least * (1.0 + step)))
        bound = max(bound, max(1.0, min(gain, 1e300)) * (1.0 + step))
        limit = min(following, reached * _BELOW)
