"""Latency of one sample through a placed graph, by formulas that no solver shares.

Rules: Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators", NeurIPS 2020, as the
authors' programs have them (github.com/msr-fiddle/dnn-partitioning, latency-ip/lip.py and latency-greedy/greedy.cpp):

- Processors are as many as the graph is wide, whatever their count says. An operator there starts once all outputs that
  it reads are ready, and nothing is charged for moving them: host memory is where all outputs meet.
- An accelerator is called once. The call starts when all outputs that it reads from outside are ready, and takes the
  sum of their transfers (each output once), of its operators' times, and of the transfers of its own outputs that
  someone outside reads (each once). All its outputs are ready at its end, none earlier. An edge between two
  accelerators is therefore charged on both: on the one as an output, on the other as an input.
- Calls that wait for one another in a circle never start, even if each holds an interval of the graph: refused.
- Memory, colours and unsupported operators as in `workload_plan.check`. All processors are one device for colours:
  operators of one colour on two processors are together.
"""

from __future__ import annotations

import graphlib
from typing import TYPE_CHECKING

from hetero.errors import PlacementError
from hetero.planner.workload import ACCELERATOR, CPU
from hetero.planner.workload_plan import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.workload import Workload


def latency(workload: Workload, devices: Sequence[int], *, contiguous: bool) -> float:
    """Time from a sample's arrival to its last output, in the workload's unit.

    Args:
        workload: a graph of forward operators on accelerators and processors.
        devices: (N,) index of each operator's device in `workload.devices`.
        contiguous: each accelerator is called once. Otherwise an accelerator whose operators are no interval of the
            graph is called once for each level of it (`_level`), in turn, as in the authors' program.

    Raises:
        PlacementError: the placement breaks a rule; see above.
    """
    check_inference(workload)
    check(workload, _pooled(workload, devices), contiguous=False)
    calls = _calls(workload, devices, contiguous=contiguous)
    members: dict[tuple[int, int], set[int]] = {call: set() for call in calls}
    for node, call in enumerate(calls):
        members[call].add(node)
    sources, targets = (dict[int, list[int]]() for _ in range(2))
    for source, target in workload.edges.tolist():
        sources.setdefault(target, []).append(source)
        targets.setdefault(source, []).append(target)
    ready: dict[int, float] = {}
    for call in _in_order(workload, devices, calls):
        own = members[call]
        read = {source for node in own for source in sources.get(node, ()) if source not in own}
        sent = {node for node in own if not own.issuperset(targets.get(node, ()))}
        kind = int(_is_cpu(workload, devices[min(own)]))
        start = max((ready[node] for node in read), default=0.0)
        work = sum(float(workload.times[node, kind]) for node in own)
        moved = sum(float(workload.transfers[node, kind]) for node in read | sent)
        ready.update(dict.fromkeys(own, start + moved + work))
    return max(ready.values())


def check_inference(workload: Workload) -> None:
    """Refuse what has no latency of a single sample: a backward pass, or classes other than the file format's."""
    if workload.is_backward.any():
        node = workload.ids[int(workload.is_backward.argmax())]
        raise PlacementError(
            f"operator {node!r} belongs to the backward pass",
            expected="an inference graph: latency is that of one sample going forward",
            remedy="use the objective throughput for training graphs",
        )
    if [kind.name for kind in workload.classes] != [ACCELERATOR, CPU]:
        raise PlacementError(
            "latency is defined for two classes of devices",
            found=", ".join(kind.name for kind in workload.classes),
            expected=f"{ACCELERATOR}, {CPU}",
        )


def _is_cpu(workload: Workload, device: int) -> bool:
    return device >= workload.classes[0].count


def _pooled(workload: Workload, devices: Sequence[int]) -> list[int]:
    """The placement with all processors as one."""
    first = workload.classes[0].count
    return [first if _is_cpu(workload, device) else device for device in devices]


def _calls(workload: Workload, devices: Sequence[int], *, contiguous: bool) -> list[tuple[int, int]]:
    """(N,) the call that runs each operator: (-1, operator) on a processor, (device, piece) on an accelerator."""
    calls = [(-1, node) for node in range(len(devices))]
    for device in {d for d in devices if not _is_cpu(workload, d)}:
        level = _level(workload, {node for node, d in enumerate(devices) if d == device})
        if contiguous and max(level.values()) > 1:
            node = next(node for node, piece in level.items() if piece > 1)
            raise PlacementError(
                f"the operators on {workload.devices[device]} are not contiguous",
                found=f"a path leaves the device and comes back to {workload.ids[node]!r}",
            )
        calls = [(device, level[node]) if node in level else call for node, call in enumerate(calls)]
    return calls


def _level(workload: Workload, members: set[int]) -> dict[int, int]:
    """How often a path of the graph has to enter a set of operators to come to each of them, at most.

    Operators of one level are an interval of the graph; the authors' program breaks a set into these.
    """
    level: dict[int, int] = {}
    for node, sources in _sources_in_order(workload):
        inside = node in members
        level[node] = max((level[u] + (inside and u not in members) for u in sources), default=int(inside))
    return {node: level[node] for node in members}


def _sources_in_order(workload: Workload) -> list[tuple[int, set[int]]]:
    graph: dict[int, set[int]] = {node: set() for node in range(len(workload.ids))}
    for source, target in workload.edges.tolist():
        graph[target].add(source)
    return [(node, graph[node]) for node in graphlib.TopologicalSorter(graph).static_order()]


def _in_order(workload: Workload, devices: Sequence[int], calls: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All calls, each after those whose outputs it reads.

    That puts the pieces of one device in turn: an operator of level p > 1 has on some path into it an operator of
    level p - 1 whose output left the device.
    """
    graph: dict[tuple[int, int], set[tuple[int, int]]] = {call: set() for call in calls}
    for source, target in workload.edges.tolist():
        if calls[source] != calls[target]:
            graph[calls[target]].add(calls[source])
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        names = [workload.devices[d] if d >= 0 else repr(workload.ids[k]) for d, k in reversed(error.args[1])]
        raise PlacementError(
            "the calls wait for one another in a circle", found=" -> ".join(names), expected="an acyclic order"
        ) from None
