"""The smallest largest load of a workload whose devices hold intervals of the graph: exact, or with a true bound.

Bisection over the load with `ideals.Search`. Each load that is enough is replaced by the largest load of the placement
found, so the search ends at the value of a placement, with the proof that nothing is better by more than `_EXACT`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.contract import Contraction, contract
from hetero.planner.ideals import OutOfTimeError, Search, Share, Tail, most_work
from hetero.planner.lattice import Lattice, lattice
from hetero.planner.workload_plan import BOUNDED, OPTIMAL, Placement, max_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hetero.planner.workload import Floats, Workload

# Loads closer than this (relative) are the same: above the rounding of sums of thousands of terms.
_EXACT = 1e-11
# Sums hold values up to the load that they were clipped at; so far below it their differences are still precise.
_PRECISE = 1e-3
_BYTES = 2**30  # that ideals and states may fill
_IDEALS_PER_S = 50_000  # that are listed and measured with ease


@dataclass
class Effort:
    """How much work an answer took.

    Attributes:
        nodes: of the contracted graph.
        ideals: of the lattice searched; 0: none, there were too many.
        loads: tested for feasibility.
        pairs: of cuts tested.
    """

    nodes: int = 0
    ideals: int = 0
    loads: int = 0
    pairs: int = 0


@dataclass
class _Best:
    """The best shares known, their largest load, and a load below which there is nothing."""

    shares: list[Share] | None
    value: float
    lower: float

    @property
    def proven(self) -> bool:
        return self.lower >= self.value * (1 - _EXACT)


def solve(workload: Workload, *, time_limit_s: float, effort: Effort | None = None) -> Placement:
    """The placement of least largest load among those whose forward operators are differences of a chain of ideals.

    Args:
        workload: the graph.
        time_limit_s: after it the best placement known is returned, with its bound.
        effort: is filled in, if given.

    Raises:
        PlacementError: no placement keeps to memory and support; or none was found in time.
    """
    start = time.perf_counter()
    effort = Effort() if effort is None else effort
    in_time = lambda: time.perf_counter() - start < time_limit_s  # noqa: E731
    graph = contract(workload)
    effort.nodes = len(graph.times)
    _check_memory(workload, graph)
    best = _Best(None, math.inf, lower_bound(graph))
    try:
        complete = _search(graph, best, effort, in_time, time_limit_s)
    except OutOfTimeError:
        complete = False
    if best.shares is None:
        raise _nothing(workload, complete)
    devices = tuple(np.array(homes(workload, graph, best.shares))[graph.node_of].tolist())
    value = max_load(workload, devices, contiguous=True)
    proof = OPTIMAL if best.proven else BOUNDED
    lower = value if best.proven else min(best.lower, value)
    return Placement(devices, value, lower, proof, "dynamic program over ideals", time.perf_counter() - start)


def _search(graph: Contraction, best: _Best, effort: Effort, in_time: Callable[[], bool], time_limit_s: float) -> bool:
    """Improve `best` until it is proven or all has been tried; whether the whole lattice was searched."""
    limit = min(_most_ideals(graph), int(_IDEALS_PER_S * max(time_limit_s, 0.1)))
    simple = best.lower
    first = lattice(graph, _windowed(graph.parents, 1), limit=limit)
    if first is not None:
        _minimise(graph, first, best, effort, lambda: True, whole=False)
    if best.proven:
        return True
    while True:
        scale = best.value
        graph = _clipped(graph, scale)
        whole = lattice(graph, graph.parents, limit=limit)
        if whole is None:
            break
        effort.ideals = len(whole.members)
        _minimise(graph, whole, best, effort, in_time, whole=True)
        if not best.value < scale * _PRECISE:  # proven, or nothing is possible
            return True
        best.lower = simple
    for part in _partial(graph, limit, in_time):
        _minimise(graph, part, best, effort, in_time, whole=False)
        graph = _clipped(graph, best.value)
    return False


def _minimise(
    graph: Contraction, one: Lattice, best: _Best, effort: Effort, in_time: Callable[[], bool], *, whole: bool
) -> None:
    """Best placement over the chains of one lattice; a `whole` lattice moves the bound as well.

    Just below the best load, and in the middle between bound and best, by turns: the first proves, the second halves.
    """
    search = Search(graph, one, in_time=in_time)
    lower = max(best.lower, _tail_bound(graph, one, best))
    if whole:
        best.lower = min(lower, best.value)
    halve = best.shares is not None and whole is False
    while lower < best.value * (1 - _EXACT):
        load = (lower + best.value) / 2 if halve and math.isfinite(best.value) else best.value * (1 - _EXACT)
        halve = not halve
        try:
            shares = search.shares(load)
        finally:
            effort.loads, effort.pairs, search.pairs = effort.loads + 1, effort.pairs + search.pairs, 0
        value = math.inf if shares is None else largest_load(graph, shares)
        if value < best.value:
            best.shares, best.value = shares, value
        else:
            lower = load
        if whole:
            best.lower = min(lower, best.value)
        if shares is None and not math.isfinite(load):
            return


def _tail_bound(graph: Contraction, one: Lattice, best: _Best) -> float:
    """A load below which the relaxation `Tail` finds nothing, to a thousandth."""
    low, high = best.lower, best.value
    if not math.isfinite(high) or Tail(graph, one, low).open:
        return low
    while high > low * 1.001:
        middle = (low + high) / 2
        low, high = (low, middle) if Tail(graph, one, middle).open else (middle, high)
    return low


def largest_load(graph: Contraction, shares: Sequence[Share]) -> float:
    """Load of the busiest device."""
    loads = [0.0]
    for share in shares:
        paid = [k for k, net in enumerate(graph.nets) if 0 < len(share.nodes.intersection(net)) < len(net)]
        loads.append(float(graph.times[sorted(share.nodes), share.kind].sum() + graph.costs[paid, share.kind].sum()))
    return max(loads)


def lower_bound(graph: Contraction) -> float:
    """A load that no placement beats, contiguous or not: transfers are left out and nodes may be split.

    Each node takes its least time somewhere. And whichever class measures the work: with load T the devices of class c
    hold at most `most_work` each, and all devices together must hold all work.
    """
    times, counts = graph.times, graph.counts
    bound = float(times.min(axis=1).max())
    for main in range(len(counts)):
        work = np.where(np.isfinite(times[:, main]), times[:, main], 0.0)
        need = float(work.sum()) * (1 - 1e-12)

        def enough(load: float, work: Floats = work, need: float = need) -> bool:
            return sum(n * most_work(times[:, c], work, load) for c, n in enumerate(counts)) >= need

        low, high = bound, float(times.min(axis=1).sum())
        while high > low * (1 + 1e-6) and not enough(low):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        bound = max(bound, low)
    return bound


def _clipped(graph: Contraction, load: float) -> Contraction:
    """The same for loads up to `load`; what is far above it would swamp the sums that the search subtracts."""
    if not math.isfinite(load):
        return graph
    times = np.where(graph.times > load, math.inf, graph.times)
    return dataclasses.replace(graph, times=times, costs=np.minimum(graph.costs, 2 * load))


def _windowed(parents: Sequence[Sequence[int]], window: int) -> list[list[int]]:
    """A stricter order: a node comes after all that are `window` or more places before it in the topological order.

    Those more than twice as far away come before those named here.
    """
    return [
        sorted({*before, *range(max(0, node - 2 * window + 1), node - window + 1)})
        for node, before in enumerate(parents)
    ]


def _partial(graph: Contraction, limit: int, in_time: Callable[[], bool]) -> Iterator[Lattice]:
    """Ever larger parts of a lattice that is too large."""
    window = 2
    while in_time() and (part := lattice(graph, _windowed(graph.parents, window), limit=limit)) is not None:
        yield part
        window *= 2


def _most_ideals(graph: Contraction) -> int:
    """How many ideals fit into the memory allowed, with 16 steps and 16 cut nets each."""
    n, n_classes = len(graph.times), len(graph.counts)
    n_states = math.prod(count + 1 for count in graph.counts)
    return max(1000, _BYTES // (n // 8 + 16 * 17 + 16 * 16 + 48 * n_classes + 6 * n_states))


def homes(workload: Workload, graph: Contraction, shares: Sequence[Share]) -> list[int]:
    """(n,) index of each node's device; shares of a class take its devices in turn."""
    first = np.cumsum([0, *(kind.count for kind in workload.classes)])
    of_node, used = np.zeros(len(graph.times), np.int64), [0] * len(graph.counts)
    for share in shares:
        of_node[sorted(share.nodes)] = first[graph.kinds[share.kind]] + used[share.kind]
        used[share.kind] += 1
    return list(of_node.tolist())


def _check_memory(workload: Workload, graph: Contraction) -> None:
    """Refuse what one node makes impossible: no device can run it or hold it."""
    names = [workload.classes[kind].name for kind in graph.kinds]
    for node in range(len(graph.times)):
        can = [c for c in range(len(names)) if math.isfinite(graph.times[node, c])]
        members = [repr(workload.ids[k]) for k in np.flatnonzero(graph.node_of == node)[:3]]
        several = (graph.node_of == node).sum() > 1
        what = f"operators {', '.join(members)}..., which must share a device," if several else f"operator {members[0]}"
        if not can:
            raise PlacementError(f"{what} can run on no common device", found=", ".join(names))
        room = max(graph.memory[c] for c in can)
        if graph.nbytes[node] > room * (1 + 1e-12):
            raise PlacementError(
                f"{what} doesn't fit" if not several else f"{what} don't fit",
                found=f"{graph.nbytes[node]:.0f} B needed, {room:.0f} B free on the largest device that can run it",
                remedy="give a device more memory, or add a class that has it",
            )


def _nothing(workload: Workload, complete: bool) -> PlacementError:
    limits = ", ".join(f"{c.count} {c.name} of {c.memory_bytes:.0f} B" for c in workload.classes if c.count)
    found = f"{workload.nbytes.sum():.0f} B needed in all; {limits}"
    if complete:
        return PlacementError(
            "no contiguous placement fits into memory", found=found, remedy="add a device, or try --no-contiguous"
        )
    return PlacementError("no contiguous placement was found in time", found=found, remedy="raise the time limit")
