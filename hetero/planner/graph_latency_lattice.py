"""The lattice of ideals of a graph of units, as arrays for the compiled search.

An ideal is a set of units that holds whatever its members read; going through a lattice from the empty ideal to the
full one decides unit after unit. An output is open in an ideal that holds its owner and lacks one of its readers: the
only outputs on which the rest depends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from hetero.planner.graph_latency_units import Units
    from hetero.planner.workload import Floats, Ints, Workload

MAX_OPEN = 62  # open outputs of an ideal: one bit each in an int64


class Graph(NamedTuple):
    """U units, O outputs, I ideals (numbered by growing size). Rows of ragged tables lie at ptr[k]:ptr[k + 1].

    Attributes:
        step_ptr, step_unit, step_ideal: the ideals that follow an ideal, and the unit that each one adds.
        open_ptr, open_output: outputs open in an ideal.
        time: (U,) of a unit in a call; infinite where unsupported.
        nbytes: (U,) bytes.
        group, group_size: of units; -1: none.
        own_ptr, own_output: outputs of a unit.
        read_ptr, read_output: outputs that a unit reads.
        sent, received: (O,) what moving an output costs the call that sends it, and one that reads it.
        spare: (O,) bytes that aren't counted in the call that sends an output.
        slack: (1,) the most bytes that all open outputs of an ideal spare.
        inside: (O,) what an output costs a call that holds all of its readers, if its owner is a leading rider.
        owner: (O,) unit; -1: a leading rider.
        n_readers: (O,).
        node_ptr, node_cpu, node_output: operators of a unit in order, their times on a processor, their outputs
            (-1: none).
        node_is_last: nobody reads the operator.
        arg_ptr, arg: what an operator reads: an operator of its unit (>= 0, counted from its unit's first) or the
            output -1 - arg.
    """

    step_ptr: Ints
    step_unit: Ints
    step_ideal: Ints
    open_ptr: Ints
    open_output: Ints
    time: Floats
    nbytes: Floats
    group: Ints
    group_size: Ints
    own_ptr: Ints
    own_output: Ints
    read_ptr: Ints
    read_output: Ints
    sent: Floats
    received: Floats
    spare: Floats
    slack: Floats
    inside: Floats
    owner: Ints
    n_readers: Ints
    node_ptr: Ints
    node_cpu: Floats
    node_output: Ints
    node_is_last: NDArray[np.bool_]
    arg_ptr: Ints
    arg: Ints


@dataclass(frozen=True)
class Lattice:
    """The arrays, and the units added by each step for reading a path back."""

    graph: Graph
    ideals: tuple[int, ...]  # bit k: unit k is in

    def layers(self) -> list[tuple[int, int]]:
        """Ranges of ideals of one size: none of a range holds another."""
        sizes = np.array([ideal.bit_count() for ideal in self.ideals])
        ends = np.flatnonzero(np.diff(sizes, append=-1)) + 1
        return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))

    def added(self, small: int, large: int) -> list[int]:
        """Units of ideal `large` that `small` lacks."""
        difference = self.ideals[large] & ~self.ideals[small]
        return [k for k in range(difference.bit_length()) if difference >> k & 1]


def ideals_of(preds: Sequence[Iterable[int]], *, limit: int) -> list[list[tuple[int, int, int]]] | None:
    """Steps (ideal, unit, larger ideal), ideals as bit sets, in layers by size; None: there are more than `limit`."""
    n = len(preds)
    need = [sum(1 << p for p in before) for before in preds]
    succs: list[list[int]] = [[] for _ in preds]
    for unit, before in enumerate(preds):
        for p in before:
            succs[p].append(unit)
    layer = {0: [unit for unit in range(n) if not need[unit]]}
    layers, total = [], 1
    for _ in range(n):
        following: dict[int, list[int]] = {}
        steps = []
        for ideal, ready in layer.items():
            for unit in ready:
                larger = ideal | 1 << unit
                if larger not in following:
                    freed = [s for s in succs[unit] if need[s] & larger == need[s]]
                    following[larger] = [r for r in ready if r != unit] + freed
                    total += 1
                    if total > limit:
                        return None
                steps.append((ideal, unit, larger))
        layers.append(steps)
        layer = following
    return layers


def lattice_of(workload: Workload, units: Units, layers: list[list[tuple[int, int, int]]]) -> Lattice:
    """All arrays of a lattice; `layers` from `ideals_of`."""
    numbers = {0: 0}
    for steps in layers:
        for _, _, larger in steps:
            numbers.setdefault(larger, len(numbers))
    flat = [(numbers[a], unit, numbers[b]) for steps in layers for a, unit, b in steps]
    table = np.array(flat, np.int64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    outputs = [*units.readers, *(rider.node for rider in units.sources)]
    ideals = tuple(numbers)
    is_open = _open(units, ideals)
    open_ptr, open_output = _ragged(is_open)
    slack = max(sum(units.spare[outputs[k]] for k in row) for row in is_open)
    counts = np.bincount(table[:, 0], minlength=len(ideals))
    graph = Graph(
        step_ptr=np.concatenate([[0], np.cumsum(counts)]),
        step_unit=np.ascontiguousarray(table[:, 1]),
        step_ideal=np.ascontiguousarray(table[:, 2]),
        open_ptr=open_ptr,
        open_output=open_output,
        slack=np.array([slack], np.float64),
        **_unit_arrays(workload, units),
        **_output_arrays(workload, units, outputs),
        **_operator_arrays(workload, units, outputs),
    )
    return Lattice(graph, ideals)


def _open(units: Units, ideals: tuple[int, ...]) -> list[list[int]]:
    """Outputs open in each ideal."""
    owner = {node: k for k, members in enumerate(units.members) for node in members}
    ends = [(1 << owner[node], sum(1 << r for r in readers)) for node, readers in units.readers.items()]
    return [[k for k, (own, readers) in enumerate(ends) if ideal & own and readers & ~ideal] for ideal in ideals]


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    ptr = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return ptr, np.array([value for row in rows for value in row], np.int64)


def _unit_arrays(workload: Workload, units: Units) -> dict[str, Any]:
    groups = np.array(units.groups, np.int64)
    size = np.array([int((groups == g).sum()) for g in range(int(groups.max(initial=-1)) + 1)], np.int64)
    return {
        "time": np.array([workload.times[list(one), 0].sum() for one in units.members], np.float64),
        "nbytes": np.array(units.nbytes, np.float64),
        "group": groups,
        "group_size": size,
    }


def _output_arrays(workload: Workload, units: Units, outputs: list[int]) -> dict[str, Any]:
    owner = {node: k for k, members in enumerate(units.members) for node in members}
    readers = [*units.readers.values(), *(rider.units for rider in units.sources)]
    own: list[list[int]] = [[] for _ in units.members]
    read: list[list[int]] = [[] for _ in units.members]
    for k, node in enumerate(outputs):
        if node in owner:
            own[owner[node]].append(k)
        for unit in readers[k]:
            read[unit].append(k)
    (own_ptr, own_output), (read_ptr, read_output) = _ragged(own), _ragged(read)
    sent, received, spare = (np.array(one, np.float64)[outputs] for one in (units.sent, units.received, units.spare))
    return {
        "own_ptr": own_ptr, "own_output": own_output, "read_ptr": read_ptr, "read_output": read_output,
        "sent": sent, "received": received, "spare": spare,
        "inside": np.minimum(received, workload.times[outputs, 0]),
        "owner": np.array([owner.get(node, -1) for node in outputs], np.int64),
        "n_readers": np.array([len(found) for found in readers], np.int64),
    }  # fmt: skip


def _operator_arrays(workload: Workload, units: Units, outputs: list[int]) -> dict[str, Any]:
    reads: dict[int, list[int]] = {node: [] for one in units.members for node in one}
    read = set()
    for source, target in workload.edges.tolist():
        read.add(source)
        if target in reads:
            reads[target].append(source)
    output = {node: k for k, node in enumerate(outputs)}
    args = []
    for one in units.members:
        place = {node: i for i, node in enumerate(one)}
        args += [[place[u] if u in place else -1 - output[u] for u in reads[node]] for node in one]
    nodes = [node for one in units.members for node in one]
    arg_ptr, arg = _ragged(args)
    return {
        "node_ptr": _ragged(units.members)[0],
        "node_cpu": np.array([units.cpu[node] for node in nodes], np.float64),
        "node_output": np.array([output.get(node, -1) for node in nodes], np.int64),
        "node_is_last": np.array([node not in read for node in nodes], bool),
        "arg_ptr": arg_ptr,
        "arg": arg,
    }
