"""Fewer units: a unit that only passes on what one other gives it (a norm, an activation) joins that one.

Two results. As they are, fused units only forbid some placements: what is found with them can be used. Relaxed, they
bound all placements from below. Let v be a single operator that reads one output of u and nothing else, that others
read, and let nothing of u be read but by v. Given any placement with u and v apart, put v where u is. The latency must
not grow, so the fused unit w gets what is left in the worst case (a: time in a call; p: on a processor; s, r: price of
sending and of receiving the output):

- u in a call A: A no longer sends u's output but v's, and takes v's time, so s_w = min(s_v, s_u - a_v). Its end is no
  later, and v's output is ready then. v's bytes are not counted in the call that sends w's output (A must: v's readers
  are outside, or A would not be contiguous).
- v in a call B: B reads v's output instead of u's, if anything, so r_w = min(r_u, r_v). It loses v's time and sending,
  and a_v + s_v >= 0 by induction: a_w + s_w = min(a_u + a_v + s_v, a_u + s_u).
- u on a processor, v in B: v's output was ready r_u + a_v + min(0, s_v) after u's at the earliest. On the processor it
  is ready after p_v' = min(p_v, max(0, r_u + a_v + min(0, s_v) - r_w)), and B's end is no later: B starts at most p_v'
  later and takes at least p_v' less.

With u and v together nothing changes but p_v' <= p_v and s_w <= s_v. Contiguity survives: v has no source but u, so
nothing can come between.
"""

from __future__ import annotations

import math

from hetero.planner.graph_latency_units import Rider, Units


def fused(units: Units, times: list[float], *, longest: int, max_bytes: float, relaxed: bool) -> Units:
    """Fuse wherever the rule allows it.

    Args:
        units: in a topological order.
        times: (N,) of operators in a call.
        longest: chain of units that becomes one; the longer, the fewer units and the looser the bound.
        max_bytes: no fused unit is heavier.
        relaxed: the result bounds all placements of `units`; otherwise it is a restriction of them.
    """
    reads = _reads(units)
    host = _hosts(units, reads, times, longest, max_bytes)
    order = [k for k in range(len(host)) if host[k] == k]
    number = {k: i for i, k in enumerate(order)}
    to = [number[h] for h in host]
    members: list[list[int]] = [[] for _ in order]
    nbytes = [0.0] * len(order)
    cpu, sent, received, spare = (list(one) for one in (units.cpu, units.sent, units.received, units.spare))
    inner = set()
    for k, one in enumerate(units.members):
        members[to[k]] += one
        nbytes[to[k]] += units.nbytes[k]
        if host[k] == k:
            continue
        (u,), v = reads[k], one[0]
        inner.add(u)
        if relaxed:
            least = received[u] + times[v] + min(0.0, sent[v])
            spare[v] = spare[u] + units.nbytes[k]
            sent[v] = min(sent[v], sent[u] - times[v])
            received[v] = min(received[u], received[v])
            cpu[v] = min(cpu[v], max(0.0, least - received[v]))
    return Units(
        members=tuple(tuple(one) for one in members),
        preds=tuple(frozenset(to[p] for p in units.preds[k]) for k in order),
        groups=tuple(units.groups[k] for k in order),
        readers={u: frozenset(to[k] for k in found) for u, found in units.readers.items() if u not in inner},
        sources=tuple(Rider(r.node, frozenset(to[k] for k in r.units)) for r in units.sources),
        sinks=tuple(Rider(r.node, frozenset(to[k] for k in r.units)) for r in units.sinks),
        nbytes=tuple(nbytes),
        cpu=tuple(cpu),
        sent=tuple(sent),
        received=tuple(received),
        spare=tuple(spare),
    )


def _reads(units: Units) -> list[set[int]]:
    """Operators outside that each unit reads, leading riders included."""
    reads: list[set[int]] = [set() for _ in units.members]
    for node, found in [*units.readers.items(), *((rider.node, rider.units) for rider in units.sources)]:
        for unit in found:
            reads[unit].add(node)
    return reads


def _hosts(units: Units, reads: list[set[int]], times: list[float], longest: int, max_bytes: float) -> list[int]:
    """The unit that each unit joins: itself, or an earlier one."""
    owner = {node: k for k, one in enumerate(units.members) for node in one}
    outputs = [[node for node in one if node in units.readers] for one in units.members]
    is_plain = [
        units.groups[k] < 0 and all(math.isfinite(times[n]) for n in one) for k, one in enumerate(units.members)
    ]
    host, size, nbytes = list(range(len(units.members))), [1] * len(units.members), list(units.nbytes)
    for k, one in enumerate(units.members):
        if not (is_plain[k] and len(one) == 1 and outputs[k] and len(reads[k]) == 1):
            continue
        (u,) = reads[k]
        if u not in owner or units.readers[u] != {k} or outputs[owner[u]] != [u] or not is_plain[owner[u]]:
            continue
        first = host[owner[u]]
        if size[first] < longest and nbytes[first] + nbytes[k] <= max_bytes:
            host[k] = first
            size[first] += 1
            nbytes[first] += nbytes[k]
    return host
