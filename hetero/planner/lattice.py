"""All ideals of a contracted graph: the sets of nodes that hold every parent of their nodes. Compiled by numba.

A chain of ideals is a sequence of cuts, each behind the one before; what lies between two cuts is one device's share.
Ideals are numbered by size, so that a subset's number is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba as nb
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.contract import Contraction
    from hetero.planner.workload import Floats, Ints

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Lattice:
    """M ideals, the steps from one to the next larger ones, and what a search asks about each.

    Attributes:
        members: (M, W) bit v of the row is set if node v belongs to the ideal.
        step_start: (M + 1,) the steps out of ideal i are step_start[i]..step_start[i + 1] - 1.
        step_to: (steps,) the ideal with one node more.
        better: (steps,) whether the larger ideal is at least as good to go on from (`_measure`).
        work: (C, M) time of an ideal's nodes on a class; a node that can't run there counts 0 and is in `unfit`.
        unfit: (C, M) how many nodes of the ideal can't run on a class.
        nbytes: (M,) memory of the ideal's nodes [B].
        cut: (C, M) cost of all nets that an ideal cuts: that it meets and doesn't contain.
        entry: (C, M) what any non-empty share behind the ideal pays at least for nets that the ideal cuts.
        exit: (C, M) what any non-empty share that ends with the ideal pays at least for nets that begin in it.
        net_start: (M + 1,) the nets cut by ideal i are nets[net_start[i] : net_start[i + 1]], ascending.
        nets: the nets cut by each ideal.
        inside: for each of them, how many of its nodes the ideal holds.
        costs: (C, H) what a device of a class pays for a net.
    """

    members: Words
    step_start: Ints
    step_to: Ints
    better: Flags
    work: Floats
    unfit: Ints
    nbytes: Floats
    cut: Floats
    entry: Floats
    exit: Floats
    net_start: Ints
    nets: Ints
    inside: Ints
    costs: Floats

    def nodes(self, ideal: int) -> set[int]:
        """The nodes of an ideal."""
        bits = np.unpackbits(self.members[ideal].view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())


def lattice(graph: Contraction, parents: Sequence[Sequence[int]], *, limit: int) -> Lattice | None:
    """The lattice of ideals, or None where it has more than `limit` of them.

    Args:
        graph: what the nodes cost.
        parents: of each node; the graph's own, or those of a stricter order.
        limit: of ideals.
    """
    found = _listed(parents, limit)
    if found is None:
        return None
    members, step_start, step_node, step_to = found
    of_node: list[list[int]] = [[] for _ in parents]
    for k, net in enumerate(graph.nets):
        for node in net:
            of_node[node].append(k)
    sizes = np.array([len(net) for net in graph.nets], np.int64)
    costs, times = np.ascontiguousarray(graph.costs.T), np.ascontiguousarray(graph.times.T)
    shape = (len(costs), len(members))
    work, cut, entry = np.zeros(shape), np.zeros(shape), np.full(shape, np.inf)
    leave, unfit, nbytes = np.full(shape, np.inf), np.zeros(shape, np.int64), np.zeros(len(members))
    better, net_start = np.ones(len(step_to), np.bool_), np.zeros(len(members) + 1, np.int64)
    rows, room = _rows(of_node), 1024
    while True:
        nets, inside = np.empty(room, np.int64), np.empty(room, np.int64)
        used = _cut_nets(step_start, step_node, step_to, *rows, sizes, net_start, nets, inside)
        if used <= room:
            break
        room = used
    nets, inside = nets[:used].copy(), inside[:used].copy()
    _measure(
        step_start, step_node, step_to, *rows, sizes, costs, times, graph.nbytes, net_start, nets, inside,
        better, work, unfit, nbytes, cut, entry, leave,
    )  # fmt: skip
    entry[:, -1] = 0  # nothing comes behind the last
    return Lattice(
        members, step_start, step_to, better, work, unfit, nbytes, cut, entry, leave, net_start, nets, inside, costs
    )


def _listed(parents: Sequence[Sequence[int]], limit: int) -> tuple[Words, Ints, Ints, Ints] | None:
    """Members of each ideal, and the steps between them; None: more than `limit`."""
    n = len(parents)
    children: list[list[int]] = [[] for _ in range(n)]
    needed = np.zeros((n, (n + 63) // 64), np.uint64)
    for node, before in enumerate(parents):
        for parent in before:
            children[parent].append(node)
            needed[node, parent >> 6] |= np.uint64(1 << (parent & 63))
    keys = np.random.default_rng(0).integers(1, 2**63, n).astype(np.uint64)
    rows, room, n_steps = _rows(children), 1024, 8192
    while True:
        room = min(room, limit)
        members, hashes = np.zeros((room, needed.shape[1]), np.uint64), np.zeros(room, np.uint64)
        origin, step_start = np.zeros((2, room), np.int64), np.zeros(room + 1, np.int64)
        step_node, step_to = np.empty(n_steps, np.int64), np.empty(n_steps, np.int64)
        slots = np.full(1 << (2 * room).bit_length(), -1, np.int64)
        count, used = _enumerate(*rows, needed, keys, members, hashes, origin, slots, step_start, step_node, step_to)
        if count > limit:
            return None
        if count <= room and used <= n_steps:
            return (
                members[:count].copy(),
                step_start[: count + 1].copy(),
                step_node[:used].copy(),
                step_to[:used].copy(),
            )
        room, n_steps = room * (8 if count > room else 1), n_steps * 8


def _rows(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Lists in one array: where each starts, and all entries."""
    start = np.zeros(len(lists) + 1, np.int64)
    start[1:] = np.cumsum([len(one) for one in lists])
    return start, np.array([x for one in lists for x in one], np.int64)


# Types of the compiled functions' arguments. Signatures are written out so that each is compiled once, at the first
# import, and read from numba's cache from then on.
b1, i1, f1, u1 = nb.boolean[::1], nb.int64[::1], nb.float64[::1], nb.uint64[::1]
i2, f2, u2 = nb.int64[:, ::1], nb.float64[:, ::1], nb.uint64[:, ::1]


@nb.njit(nb.types.UniTuple(nb.int64, 2)(i1, i1, u2, u1, u2, u1, i2, i1, i1, i1, i1), cache=True)
def _enumerate(  # type: ignore[no-untyped-def]
    child_start, child, needed, keys, members, hashes, origin, slots, step_start, step_node, step_to
):
    """Breadth first from the empty ideal, into the arrays given; stops with one ideal or step too many.

    An ideal's hash is the exclusive or of its nodes' random keys. `origin` holds by which ideal and node it was first
    reached: what can be added to it next is what could be added there, and children of the node.
    """
    n, n_words = needed.shape
    room, n_steps, mask = len(members), len(step_to), len(slots) - 1
    count, used, ideal = 1, 0, 0
    slots[0] = 0
    while ideal < count:
        if used + n > n_steps:
            return count, n_steps + 1
        if ideal == 0:
            for node in range(n):
                free = True
                for k in range(n_words):
                    if needed[node, k]:
                        free = False
                if free:
                    step_node[used] = node
                    used += 1
        else:
            last = origin[1, ideal]
            for e in range(step_start[origin[0, ideal]], step_start[origin[0, ideal] + 1]):
                if step_node[e] != last:
                    step_node[used] = step_node[e]
                    used += 1
            for e in range(child_start[last], child_start[last + 1]):
                free = True
                for k in range(n_words):
                    if needed[child[e], k] & ~members[ideal, k]:
                        free = False
                if free:
                    step_node[used] = child[e]
                    used += 1
        step_start[ideal + 1] = used
        for e in range(step_start[ideal], used):
            node = step_node[e]
            word, bit = node >> 6, np.uint64(1) << np.uint64(node & 63)
            value = hashes[ideal] ^ keys[node]
            slot = np.int64(value >> np.uint64(20)) & mask
            while True:
                other = slots[slot]
                if other < 0:
                    break
                same = hashes[other] == value
                if same:
                    for k in range(n_words):
                        if members[other, k] != (members[ideal, k] | bit if k == word else members[ideal, k]):
                            same = False
                if same:
                    break
                slot = (slot + 1) & mask
            if other < 0:
                if count == room:
                    return count + 1, used
                other = count
                for k in range(n_words):
                    members[other, k] = members[ideal, k]
                members[other, word] |= bit
                hashes[other], origin[0, other], origin[1, other], slots[slot] = value, ideal, node, other
                count += 1
            step_to[e] = other
        ideal += 1
    return count, used


@nb.njit(nb.int64(i1, i1, i1, i1, i1, i1, i1, i1, i1), cache=True)
def _cut_nets(step_start, step_node, step_to, of_start, of_node, sizes, net_start, nets, inside):  # type: ignore[no-untyped-def]
    """Nets that each ideal cuts, and how much of each it holds; returns the room needed.

    From those of the ideal by which it was first reached and those of the node added: two ascending lists merged.
    """
    n_nets, room, used, done = len(sizes), len(nets), 0, 1
    for i in range(len(step_start) - 1):
        for e in range(step_start[i], step_start[i + 1]):
            j, v = step_to[e], step_node[e]
            if j < done:
                continue
            done = j + 1
            a, end_a, b, end_b = net_start[i], net_start[i + 1], of_start[v], of_start[v + 1]
            while a < end_a or b < end_b:
                x, y = nets[a] if a < min(end_a, room) else n_nets, of_node[b] if b < end_b else n_nets
                number, net = 0, min(x, y)
                if x <= y:
                    number = inside[a] if a < room else 0
                    a += 1
                if y <= x:
                    number += 1
                    b += 1
                if net < n_nets and number < sizes[net]:
                    if used < room:
                        nets[used], inside[used] = net, number
                    used += 1
            net_start[j + 1] = used
    return used


@nb.njit(nb.void(i1, i1, i1, i1, i1, i1, f2, f2, f1, i1, i1, i1, b1, f2, i2, f1, f2, f2, f2), cache=True)
def _measure(  # type: ignore[no-untyped-def]
    step_start, step_node, step_to, of_start, of_node, sizes, costs, times, node_bytes, net_start, nets, inside,
    better, work, unfit, nbytes, cut, entry, leave,
):  # fmt: skip
    """Figures of each ideal, into the arrays given; see `Lattice`.

    When is I + v at least as good as I to go on from? Take any chain of cuts behind I and add v to each of them. Only
    the share S that held v changes: it loses v. It saves the time of v, and the nets whose only node in S was v; among
    these are those that have all nodes but v in I. It pays anew at most for the nets of v that S contained, which
    therefore don't meet I. So if, on every class that may run v,

        cost of v's nets that don't meet I  <=  time of v + cost of the nets with all nodes but v in I,

    no share becomes dearer, whatever follows; memory and support can only gain. Both sides only improve from S's
    first cut on to later ones, so the condition at I serves for any later share too.
    """
    held, done = np.zeros(len(sizes), np.int64), 1
    for c in range(len(costs)):
        leave[c, 0] = 0
    for i in range(len(step_start) - 1):
        for k in range(net_start[i], net_start[i + 1]):
            held[nets[k]] = inside[k]
            for c in range(len(costs)):
                cut[c, i] += costs[c, nets[k]]
        for e in range(step_start[i], step_start[i + 1]):
            v, j = step_node[e], step_to[e]
            new_ideal = j >= done
            if new_ideal:
                done = j + 1
                nbytes[j] = nbytes[i] + node_bytes[v]
            for c in range(len(costs)):
                fits = times[c, v] < np.inf
                if new_ideal:
                    work[c, j] = work[c, i] + (times[c, v] if fits else 0.0)
                    unfit[c, j] = unfit[c, i] + (0 if fits else 1)
                new, saved, paid = 0.0, times[c, v], 0.0
                for k in range(of_start[v], of_start[v + 1]):
                    net = of_node[k]
                    if held[net] == 0:
                        new += costs[c, net]
                    else:
                        paid += costs[c, net]
                        if held[net] == sizes[net] - 1:
                            saved += costs[c, net]
                if new > saved:
                    better[e] = False
                leave[c, j] = min(leave[c, j], new)
                entry[c, i] = min(entry[c, i], paid)
        for k in range(net_start[i], net_start[i + 1]):
            held[nets[k]] = 0
