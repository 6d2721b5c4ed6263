"""A workload without contiguity is a partition of a hypergraph: its items, its nets, and merges that lose nothing.

Cutting an output's net. Operator u sends its output to the operators R. A device pays transfers[u] once if an edge of
u crosses its boundary, that is if it holds u but not all of R, or some of R but not u: in both cases, if it holds some
but not all of {u} | R. So senders and receivers play the same part; what matters is the set of pins. With colour
classes as items, nets of equal pins add up, and nets inside one item vanish.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from hetero.planner.workload import Floats, Ints, Workload

# Relative distance below which two loads count as one: far above the rounding of sums of thousands of float64 terms,
# far below what a measurement can tell apart.
EXACT = 1e-9


@dataclass(frozen=True)
class Hypergraph:
    """n items joined by m nets, to be split over the D devices of C classes.

    Attributes:
        times: (n, C) of an item on a device of a class; infinite: it can't run there.
        nbytes: (n,) of an item [B].
        nets: pins, and (C,) what a device of each class pays that holds some of the pins but not all.
        item_of: (N,) item of each operator of the workload.
        counts: (C,) devices of each class.
        memory_bytes: (C,) of one device of each class [B].
    """

    times: Floats
    nbytes: Floats
    nets: tuple[tuple[tuple[int, ...], Floats], ...]
    item_of: Ints
    counts: Ints
    memory_bytes: Floats
    class_of: Ints = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_of", np.repeat(np.arange(len(self.counts)), self.counts))

    def __len__(self) -> int:
        return len(self.nbytes)

    @cached_property
    def nets_of(self) -> list[list[int]]:
        """(n,) lists of the nets of each item."""
        found: list[list[int]] = [[] for _ in range(len(self))]
        for e, (pins, _) in enumerate(self.nets):
            for item in pins:
                found[item].append(e)
        return found

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """(n, C) which classes can run an item and have room for it, alone."""
        fits = self.nbytes[:, None] <= self.memory_bytes[None] * (1 + 1e-12)
        return np.isfinite(self.times) & fits & (self.counts > 0)[None]

    def loads(self, devices: Ints) -> Floats:
        """(D,) load of each device when item i runs on devices[i]."""
        load = np.zeros(len(self.class_of))
        np.add.at(load, devices, self.times[np.arange(len(self)), self.class_of[devices]])
        for pins, cost in self.nets:
            touched = np.unique(devices[list(pins)])
            if len(touched) > 1:
                load[touched] += cost[self.class_of[touched]]
        return load


def from_workload(workload: Workload) -> Hypergraph:
    """Items are the workload's colour classes."""
    _, item_of = np.unique(workload.colours, return_inverse=True)
    pins: dict[int, set[int]] = {}
    for source, target in workload.edges.tolist():
        pins.setdefault(source, {int(item_of[source])}).add(int(item_of[target]))
    n, n_classes = int(item_of.max()) + 1, len(workload.classes)
    times, nbytes = np.zeros((n, n_classes)), np.zeros(n)
    np.add.at(times, item_of, workload.times)
    np.add.at(nbytes, item_of, workload.nbytes)
    return Hypergraph(
        times=times,
        nbytes=nbytes,
        nets=_nets((ends, workload.transfers[source]) for source, ends in pins.items()),
        item_of=item_of.astype(np.int64),
        counts=np.array([c.count for c in workload.classes], np.int64),
        memory_bytes=np.array([c.memory_bytes for c in workload.classes]),
    )


def reduced(graph: Hypergraph, value: float) -> Hypergraph:
    """The graph with items merged that some best placement keeps together, as long as one below `value` exists.

    Two rules, applied until neither finds anything:

    * A net whose cut costs too much. Each device that holds some of its pins but not all pays the net and runs at
      least one of the pins. If that reaches `value` on all devices but one, the net lies within one device.
    * A leaf without cost. An item that costs no time on any device and has one net can follow any other pin of this
      net: it then touches no device that the net doesn't touch already, so no load grows. Its bytes must not matter:
      there are none, or all items together fit on each device.
    """
    while True:
        smaller = _merged(_merged(graph, _uncuttable(graph, value)), None)
        if len(smaller) == len(graph):
            return graph
        graph = smaller


def _uncuttable(graph: Hypergraph, value: float) -> list[tuple[int, int]]:
    limit = value * (1 - EXACT)
    pairs = []
    for pins, cost in graph.nets:
        least = cost + graph.times[list(pins)].min(axis=0)
        if graph.counts[least < limit].sum() <= 1:
            pairs += [(pins[0], other) for other in pins[1:]]
    return pairs


def _free_leaves(graph: Hypergraph) -> list[tuple[int, int]]:
    fits = graph.nbytes.sum() <= graph.memory_bytes.min()
    leaves = {
        item
        for item, nets in enumerate(graph.nets_of)
        if len(nets) == 1 and not graph.times[item].any() and (fits or graph.nbytes[item] == 0)
    }
    pairs = []
    for leaf in sorted(leaves):
        pins, _ = graph.nets[graph.nets_of[leaf][0]]
        others = [item for item in pins if item not in leaves] or [pins[0]]
        pairs.append((leaf, others[0]))
    return pairs


def _merged(graph: Hypergraph, pairs: list[tuple[int, int]] | None) -> Hypergraph:
    """The graph with both items of each pair as one; None: the free leaves with their neighbours."""
    root = list(range(len(graph)))

    def find(item: int) -> int:
        while root[item] != item:
            root[item] = root[root[item]]
            item = root[item]
        return item

    for a, b in _free_leaves(graph) if pairs is None else pairs:
        root[find(a)] = find(b)
    _, new = np.unique([find(item) for item in range(len(graph))], return_inverse=True)
    n = int(new.max()) + 1
    times, nbytes = np.zeros((n, graph.times.shape[1])), np.zeros(n)
    np.add.at(times, new, graph.times)
    np.add.at(nbytes, new, graph.nbytes)
    return Hypergraph(
        times=times,
        nbytes=nbytes,
        nets=_nets(({int(new[item]) for item in pins}, cost) for pins, cost in graph.nets),
        item_of=new[graph.item_of].astype(np.int64),
        counts=graph.counts,
        memory_bytes=graph.memory_bytes,
    )


def _nets(found: Iterable[tuple[set[int], Floats]]) -> tuple[tuple[tuple[int, ...], Floats], ...]:
    """Nets of at least two pins that cost something; those of equal pins as one."""
    costs: dict[tuple[int, ...], Floats] = {}
    for pins, cost in found:
        if len(pins) > 1 and cost.any():
            key = tuple(sorted(pins))
            costs[key] = costs[key] + cost if key in costs else cost
    return tuple(sorted(costs.items(), key=lambda net: net[0]))
