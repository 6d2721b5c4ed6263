"""A workload made small without losing a placement worth having: what must, or may as well, share a device is one node.

Three contractions, in this order.

1. Operators of one colour are one node. The order among nodes is that of the forward operators. A colour without
   forward operators has no place in it, so the edges among backward operators that touch such a colour are mirrored:
   the gradient flows from the end to the beginning (Tarnawski et al., NeurIPS 2020, appendix: artificial nodes).
2. Nodes on a cycle, which colours can make, lie between the same two cuts, hence on one device.
3. A node s that takes no time on any class, whose neighbours in the order are at most one node t and all of whose nets
   (below) hold t, joins t. Nothing is lost: in a placement with s elsewhere, move s to the device of t. The order has
   no other neighbour of s, so the cuts stay ideals; no time is added anywhere; a net that held s held t, so it touches
   no device that it didn't touch before. Only memory could be in the way, so it's done where s has none or all
   operators together fit into any device.

Nets: an output u with its producer and its readers is a set h of nodes. A device that holds the set S of nodes is
charged for u if u is read on one side of its boundary and made on the other: if h meets S and isn't contained in it.
Outputs with the same nodes are one net with the sum of their costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from hetero.planner.workload import Floats, Ints, Workload


@dataclass(frozen=True)
class Contraction:
    """n nodes in a topological order, H nets, and the C classes that have devices.

    Attributes:
        node_of: (N,) the node of each operator.
        times: (n, C) time of a node; infinite: it can't run there.
        nbytes: (n,) memory of a node [B].
        parents: of each node, the nodes before it.
        nets: of each net, its nodes in ascending order; at least two.
        costs: (H, C) what a device of a class pays for a net that crosses its boundary.
        counts: (C,) devices of each class, no more than there are nodes.
        memory: (C,) of each device [B].
        kinds: (C,) index of each class in the workload.
    """

    node_of: Ints
    times: Floats
    nbytes: Floats
    parents: tuple[tuple[int, ...], ...]
    nets: tuple[tuple[int, ...], ...]
    costs: Floats
    counts: tuple[int, ...]
    memory: tuple[float, ...]
    kinds: tuple[int, ...]


def contract(workload: Workload) -> Contraction:
    """The contraction of a workload."""
    kinds = tuple(c for c, kind in enumerate(workload.classes) if kind.count > 0)
    memory = tuple(workload.classes[c].memory_bytes for c in kinds)
    colour = np.unique(workload.colours, return_inverse=True)[1].reshape(-1)
    node_of = _components(int(colour.max()) + 1, _order(workload, colour))[colour]
    order = {(int(node_of[a]), int(node_of[b])) for a, b in _ordered_edges(workload, colour)}
    order = {(a, b) for a, b in order if a != b}
    times, nbytes = _sums(node_of, workload.times[:, kinds]), _sums(node_of, workload.nbytes)
    may_join = (times == 0).all(axis=1) & ((nbytes == 0) | (nbytes.sum() <= min(memory)))
    joined = _join_leaves(order, _net_costs(workload, node_of, kinds), may_join)
    node_of = joined[node_of]
    edges = {(int(joined[a]), int(joined[b])) for a, b in order if joined[a] != joined[b]}
    n = int(node_of.max()) + 1
    position = _topological(n, edges)
    node_of = position[node_of]
    parents: list[list[int]] = [[] for _ in range(n)]
    for a, b in edges:
        parents[position[b]].append(int(position[a]))
    nets = _net_costs(workload, node_of, kinds)
    names = sorted(nets)
    return Contraction(
        node_of=node_of,
        times=_sums(node_of, workload.times[:, kinds]),
        nbytes=_sums(node_of, workload.nbytes),
        parents=tuple(tuple(sorted(one)) for one in parents),
        nets=tuple(names),
        costs=np.array([nets[name] for name in names], np.float64).reshape(len(names), len(kinds)),
        counts=tuple(min(workload.classes[c].count, n) for c in kinds),
        memory=memory,
        kinds=kinds,
    )


def _sums(node_of: Ints, values: Floats) -> Floats:
    total = np.zeros((int(node_of.max()) + 1, *values.shape[1:]))
    np.add.at(total, node_of, values)
    return total


def _ordered_edges(workload: Workload, colour: Ints) -> Iterable[tuple[int, int]]:
    """Pairs of operators, the first not after the second in any chain of cuts."""
    forward = np.zeros(int(colour.max()) + 1, bool)
    forward[colour[~workload.is_backward]] = True
    for a, b in workload.edges.tolist():
        if not workload.is_backward[a] and not workload.is_backward[b]:
            yield a, b
        elif workload.is_backward[a] and workload.is_backward[b] and not (forward[colour[a]] and forward[colour[b]]):
            yield b, a


def _order(workload: Workload, colour: Ints) -> set[tuple[int, int]]:
    return {(int(colour[a]), int(colour[b])) for a, b in _ordered_edges(workload, colour)}


def _net_costs(workload: Workload, node_of: Ints, kinds: Sequence[int]) -> dict[tuple[int, ...], Floats]:
    """What each class pays for each net that has a cost and two nodes."""
    ends: dict[int, set[int]] = {}
    for source, target in workload.edges.tolist():
        ends.setdefault(source, {int(node_of[source])}).add(int(node_of[target]))
    nets: dict[tuple[int, ...], Floats] = {}
    for source, nodes in sorted(ends.items()):
        cost = workload.transfers[source, kinds]
        if len(nodes) > 1 and cost.any():
            name = tuple(sorted(nodes))
            nets[name] = nets[name] + cost if name in nets else cost
    return nets


def _components(n: int, edges: set[tuple[int, int]]) -> Ints:
    """Number of the strongly connected component of each node (Kosaraju and Sharir: two depth-first searches)."""
    targets, sources = _adjacency(n, edges)
    component = np.full(n, -1, np.int64)
    for number, root in enumerate(_finished(n, targets, range(n))[::-1]):
        if component[root] >= 0:
            continue
        stack = [root]
        while stack:
            node = stack.pop()
            if component[node] < 0:
                component[node] = number
                stack += sources[node]
    return np.unique(component, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _adjacency(n: int, edges: Iterable[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    targets: list[list[int]] = [[] for _ in range(n)]
    sources: list[list[int]] = [[] for _ in range(n)]
    for a, b in sorted(edges):
        targets[a].append(b)
        sources[b].append(a)
    return targets, sources


def _finished(n: int, targets: Sequence[Sequence[int]], roots: Iterable[int]) -> list[int]:
    """Nodes in the order in which a depth-first search leaves them."""
    seen, left = [False] * n, []
    for root in roots:
        stack = [] if seen[root] else [(root, iter(targets[root]))]
        seen[root] = True
        while stack:
            node, rest = stack[-1]
            for target in rest:
                if not seen[target]:
                    seen[target] = True
                    stack.append((target, iter(targets[target])))
                    break
            else:
                left.append(node)
                stack.pop()
    return left


def _topological(n: int, edges: set[tuple[int, int]]) -> Ints:
    """Position of each node in an order that follows one branch to its end before it takes up the next."""
    targets, _ = _adjacency(n, edges)
    position = np.empty(n, np.int64)
    position[_finished(n, targets, range(n))[::-1]] = np.arange(n)
    return position


def _join_leaves(order: set[tuple[int, int]], nets: dict[tuple[int, ...], Floats], may_join: NDArray[np.bool_]) -> Ints:
    """New number of each node after the third contraction."""
    n = len(may_join)
    near: list[set[int]] = [set() for _ in range(n)]
    for a, b in order:
        near[a].add(b)
        near[b].add(a)
    sets = [set(net) for net in nets]
    of_node: list[set[int]] = [set() for _ in range(n)]
    for k, net in enumerate(sets):
        for node in net:
            of_node[node].add(k)
    home, waiting, alone = list(range(n)), list(range(n)), n
    while waiting:
        node = waiting.pop()
        if not may_join[node] or home[node] != node or alone == 1:
            continue
        hosts = near[node] or next((sets[k] - {node} for k in of_node[node]), set())
        hosts = hosts or {t for t in range(n) if home[t] == t != node}
        host = next((t for t in sorted(hosts) if all(t in sets[k] for k in of_node[node])), None)
        if len(near[node]) > 1 or host is None:
            continue
        home[node], alone = host, alone - 1
        near[host].discard(node)
        for k in of_node[node]:
            sets[k].discard(node)
            if len(sets[k]) == 1:
                of_node[host].discard(k)
        waiting.append(host)
    return np.unique([_root(home, node) for node in range(n)], return_inverse=True)[1].reshape(-1).astype(np.int64)


def _root(home: list[int], node: int) -> int:
    while home[node] != node:
        node = home[node]
    return node
