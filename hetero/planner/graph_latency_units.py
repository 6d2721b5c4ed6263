"""What the search for the least latency decides about: units of operators, and the outputs that pass between them.

A unit is a set of operators that goes to one place as a whole: a colour. Three kinds of operators are no decision of
their own ("riders" and loners below), which keeps the lattice of ideals small; all rules are exact but for memory:

- A source that costs the processor no time is best left there, ready at 0, unless one call holds all of its readers
  (moving it in would spare that call nothing but its transfer c; with a reader outside, the call would have to send it
  out for the same c). The call then takes min(c, time on the accelerator).
- A sink that costs nothing anywhere and reads from one unit follows that unit: with it, its output need not be sent.
- An operator without edges whose time on a processor is below a bound of the latency runs there, unnoticed.

Bytes of the first two are ignored here, so that the search is over a relaxation; `graph_latency_read` puts them back
where they fit, and the result is priced anew. The bound stays true.

On processors a colour's operators run one by one. So a colour is a unit only if that makes no difference: if it is in
no circle of colours (a -> b -> a', a and a' alike), and each of its operators that reads from outside leads to each
that is read outside. Else a call could hold what runs before the one and after the other, while the colour is on
processors.
Operators of other colours are units of their own with a `group`, of which a call holds all or none.

Why the second condition is enough: let U be such a colour, on processors, and no calls and operators wait for one
another in a circle. Would they with U as one unit, the circle came into U at some e and left it at some x; but the path
from e to x is one of calls and operators too, and closes the circle without U.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from hetero.planner.workload import Workload

_RELATIVE = 1 - 1e-9  # what a float64 sum may be off, many times over


@dataclass(frozen=True)
class Rider:
    """An operator that goes where others go: a source after its readers, or a sink after the unit that it reads."""

    node: int
    units: frozenset[int]


@dataclass(frozen=True)
class Units:
    """Units in a topological order, and what passes between them.

    Attributes:
        members: operators of each unit, in a topological order.
        preds: units that have to come earlier.
        groups: of each unit; units of one group are in one call together, or none of them is in any; -1: no group.
        readers: of each operator whose output leaves its unit: the other units that read it.
        sources: riders that lead: ready at 0 on a processor.
        sinks: riders that follow, members of their unit as well.
        nbytes: of each unit, without riders.
        cpu: time of each operator on a processor.
        sent, received: what moving an operator's output costs the call that sends it, and one that reads it.
        spare: bytes that are not counted in the call that sends an operator's output.
    """

    members: tuple[tuple[int, ...], ...]
    preds: tuple[frozenset[int], ...]
    groups: tuple[int, ...]
    readers: dict[int, frozenset[int]]
    sources: tuple[Rider, ...]
    sinks: tuple[Rider, ...]
    nbytes: tuple[float, ...]
    cpu: tuple[float, ...]
    sent: tuple[float, ...]
    received: tuple[float, ...]
    spare: tuple[float, ...]


def units_of(workload: Workload, *, max_rider_bytes: float) -> Units:
    """Contract a workload, as checked by `workload_latency.check_inference`.

    Args:
        workload: the graph.
        max_rider_bytes: larger operators are no riders but units of their own.
    """
    cpu = processor_times(workload)
    reads, read_by = neighbours(workload)
    owner, groups = _owners(workload)
    size = Counter(owner.values())
    alone = [n for n, key in owner.items() if size[key] == 1 and groups[n] < 0]
    light = {n for n in alone if workload.nbytes[n] <= max_rider_bytes}
    bound = longest_path(workload) * _RELATIVE
    loners = {n for n in alone if not reads[n] and not read_by[n] and cpu[n] <= bound}
    sources = [n for n in alone if n in light and cpu[n] == 0 and not reads[n] and read_by[n]]
    sinks = []
    for node in light:
        hosts = {owner[u] for u in reads[node]}
        costs_nothing = cpu[node] == 0 and workload.times[node, 0] == 0
        if costs_nothing and len(hosts) == 1 and not read_by[node] and reads[node].isdisjoint(sources):
            owner[node] = hosts.pop()
            groups[node] = groups[min(reads[node])]
            sinks.append(node)
    owner = {node: key for node, key in owner.items() if node not in loners and node not in sources}
    return _ordered(workload, owner, groups, sources, sinks)


def _owners(workload: Workload) -> tuple[dict[int, tuple[bool, int]], list[int]]:
    """The unit of each operator, named by its colour or by the operator itself, and (N,) groups."""
    colour, component = colour_components(workload)
    n_colours = Counter(c for c, _ in set(zip(component, colour, strict=True)))
    size = Counter(colour)
    loose = _loose_colours(workload, colour)
    is_split = [n_colours[k] > 1 or c in loose for c, k in zip(colour, component, strict=True)]
    owner = {n: (True, n) if split else (False, colour[n]) for n, split in enumerate(is_split)}
    groups = [c if split and size[c] > 1 else -1 for c, split in zip(colour, is_split, strict=True)]
    return owner, groups


def _loose_colours(workload: Workload, colour: list[int]) -> set[int]:
    """Colours that something enters and leaves without a path from the one operator to the other."""
    reads, read_by = neighbours(workload)
    reached = [0] * len(colour)  # bit v: a path leads to operator v
    for node in reversed(topological(reads)):
        reached[node] = 1 << node
        for target in read_by[node]:
            reached[node] |= reached[target]
    entered, left = defaultdict[int, list[int]](list), defaultdict[int, int](int)
    for node, own in enumerate(colour):
        if any(colour[u] != own for u in reads[node]):
            entered[own].append(node)
        if any(colour[v] != own for v in read_by[node]):
            left[own] |= 1 << node
    return {own for own, nodes in entered.items() if any(left[own] & ~reached[node] for node in nodes)}


def _ordered(
    workload: Workload, owner: dict[int, tuple[bool, int]], groups: list[int], sources: list[int], sinks: list[int]
) -> Units:
    """Number the units in a topological order."""
    reads, _ = neighbours(workload)
    keys = {key: k for k, key in enumerate(dict.fromkeys(owner.values()))}
    preds: list[set[int]] = [set() for _ in keys]
    for node, key in owner.items():
        preds[keys[key]] |= {keys[owner[u]] for u in reads[node] if u in owner and owner[u] != key}
    order = topological(preds)
    position = {k: i for i, k in enumerate(order)}
    unit = {node: position[keys[key]] for node, key in owner.items()}
    members: list[list[int]] = [[] for _ in order]
    readers: dict[int, set[int]] = defaultdict(set)
    for node in topological(reads):
        if node in unit:
            members[unit[node]].append(node)
            for u in reads[node]:
                if unit.get(u) != unit[node]:
                    readers[u].add(unit[node])
    return Units(
        members=tuple(tuple(one) for one in members),
        preds=tuple(frozenset(position[u] for u in preds[k]) for k in order),
        groups=tuple(max(groups[n] for n in one) for one in members),
        readers={u: frozenset(found) for u, found in readers.items() if u in unit},
        sources=tuple(Rider(n, frozenset(readers[n])) for n in sources),
        sinks=tuple(Rider(n, frozenset({unit[n]})) for n in sinks),
        nbytes=tuple(float(sum(workload.nbytes[n] for n in one if n not in sinks)) for one in members),
        cpu=tuple(processor_times(workload)),
        sent=tuple(workload.transfers[:, 0].tolist()),
        received=tuple(workload.transfers[:, 0].tolist()),
        spare=(0.0,) * len(workload.ids),
    )


def processor_times(workload: Workload) -> list[float]:
    """(N,) infinite where there is no processor."""
    return [t if workload.classes[1].count else math.inf for t in workload.times[:, 1].tolist()]


def neighbours(workload: Workload) -> tuple[list[set[int]], list[set[int]]]:
    """(N,) operators that each one reads, and that read it."""
    reads: list[set[int]] = [set() for _ in workload.ids]
    read_by: list[set[int]] = [set() for _ in workload.ids]
    for source, target in workload.edges.tolist():
        reads[target].add(source)
        read_by[source].add(target)
    return reads, read_by


def topological(preds: list[set[int]]) -> list[int]:
    """Depth first, so that what is begun is finished early: such orders keep few outputs open."""
    succs: list[list[int]] = [[] for _ in preds]
    for node, before in enumerate(preds):
        for u in before:
            succs[u].append(node)
    waiting = [len(before) for before in preds]
    stack = [node for node, n in enumerate(waiting) if n == 0]
    order = []
    while stack:
        node = stack.pop()
        order.append(node)
        for target in succs[node]:
            waiting[target] -= 1
            if waiting[target] == 0:
                stack.append(target)
    return order


def longest_path(workload: Workload) -> float:
    """A bound: each operator at its fastest, nothing moved."""
    cpu = processor_times(workload)
    reads, _ = neighbours(workload)
    end = [0.0] * len(reads)
    for node in topological(reads):
        end[node] = max((end[u] for u in reads[node]), default=0.0) + min(cpu[node], float(workload.times[node, 0]))
    return max(end)


def colour_components(workload: Workload) -> tuple[list[int], list[int]]:
    """(N,) index of each operator's colour from 0, and of the circle of colours that it is in."""
    _, colour = np.unique(workload.colours, return_inverse=True)
    n = int(colour.max()) + 1
    pairs = colour[workload.edges]
    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, component = connected_components(links, directed=True, connection="strong")
    return colour.tolist(), component[colour].tolist()
