"""Compiled search over a lattice of ideals: tails backward, then labels forward. `graph_latency` has the method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero.planner.graph_latency_lattice import Graph
    from hetero.planner.workload import Floats, Ints

WIDE = 1e300  # no such solution; finite, so that sums stay comparable


class Calls(NamedTuple):
    """Scratch: all calls that may follow an ideal (`count` rows), and the state of their enumeration."""

    ideal: Ints  # (I,) the ideal after the call
    load: Floats  # (I,)
    read: Ints  # (I,) bit j: the call reads the j-th open output of the ideal before it
    sent: Ints  # (I,) bit j: the j-th open output of the ideal after it is the call's
    stamp: Ints  # (I + 1,): number of the enumeration that came to an ideal last; the last entry counts them
    readers: Ints  # (O,) readers of each output inside the call
    inside: NDArray[np.bool_]  # (U,)
    place: Ints  # (O,) of open outputs of the ideal before the call
    grouped: Ints  # (G,)
    stack: Ints  # (U + 1, 4): ideal, next step, unit, read
    sums: Floats  # (U + 1, 3): compute, memory, moved


def scratch(graph: Graph) -> Calls:
    """Working arrays for `_calls`."""
    n_ideals, n_units, n_outputs = len(graph.step_ptr) - 1, len(graph.time), len(graph.owner)
    return Calls(
        ideal=np.zeros(n_ideals, np.int64),
        load=np.zeros(n_ideals),
        read=np.zeros(n_ideals, np.int64),
        sent=np.zeros(n_ideals, np.int64),
        stamp=np.zeros(n_ideals + 1, np.int64),
        readers=np.zeros(n_outputs, np.int64),
        inside=np.zeros(n_units, np.bool_),
        place=np.full(n_outputs, -1, np.int64),
        grouped=np.zeros(len(graph.group_size), np.int64),
        stack=np.zeros((n_units + 1, 4), np.int64),
        sums=np.zeros((n_units + 1, 3)),
    )


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _calls(g: Any, c: Any, start: int, capacity: float) -> int:
    """Every call that can follow ideal `start`, depth first: a unit changes the sums by what it reads and owns."""
    for j in range(g.open_ptr[start], g.open_ptr[start + 1]):
        c.place[g.open_output[j]] = j - g.open_ptr[start]
    count, depth, partial = 0, 0, 0
    c.stack[0, 0], c.stack[0, 1], c.stack[0, 3] = start, g.step_ptr[start], 0
    c.sums[0, :] = 0.0
    c.stamp[-1] += 1
    serial = c.stamp[-1]
    while depth >= 0:
        here = c.stack[depth, 0]
        if c.stack[depth, 1] == g.step_ptr[here + 1]:
            if depth > 0:
                unit = c.stack[depth, 2]
                c.inside[unit] = False
                for i in range(g.read_ptr[unit], g.read_ptr[unit + 1]):
                    c.readers[g.read_output[i]] -= 1
                group = g.group[unit]
                if group >= 0:
                    partial += _leave(c.grouped, g.group_size, group)
            depth -= 1
            continue
        step = c.stack[depth, 1]
        c.stack[depth, 1] += 1
        unit, ideal = g.step_unit[step], g.step_ideal[step]
        memory = c.sums[depth, 1] + g.nbytes[unit]
        if c.stamp[ideal] == serial or memory > capacity + g.slack[0] or g.time[unit] > WIDE:
            continue
        c.stamp[ideal] = serial
        moved, read = c.sums[depth, 2], c.stack[depth, 3]
        for i in range(g.own_ptr[unit], g.own_ptr[unit + 1]):
            moved += g.sent[g.own_output[i]]
        for i in range(g.read_ptr[unit], g.read_ptr[unit + 1]):
            output = g.read_output[i]
            owner = g.owner[output]
            c.readers[output] += 1
            if owner >= 0 and c.inside[owner]:
                if c.readers[output] == g.n_readers[output]:
                    moved -= g.sent[output]
                continue
            if c.readers[output] == 1:
                moved += g.received[output]
                if owner >= 0:
                    read |= 1 << c.place[output]
            if owner < 0 and c.readers[output] == g.n_readers[output]:
                moved += g.inside[output] - g.received[output]
        c.inside[unit] = True
        group = g.group[unit]
        if group >= 0:
            partial += _enter(c.grouped, g.group_size, group)
        depth += 1
        c.stack[depth, 0], c.stack[depth, 1], c.stack[depth, 2], c.stack[depth, 3] = (
            ideal,
            g.step_ptr[ideal],
            unit,
            read,
        )
        c.sums[depth, 0], c.sums[depth, 1], c.sums[depth, 2] = c.sums[depth - 1, 0] + g.time[unit], memory, moved
        if partial == 0:
            sent = 0
            for j in range(g.open_ptr[ideal], g.open_ptr[ideal + 1]):
                if c.inside[g.owner[g.open_output[j]]]:
                    sent |= 1 << (j - g.open_ptr[ideal])
                    memory -= g.spare[g.open_output[j]]
            if memory > capacity:
                continue
            c.ideal[count], c.read[count], c.sent[count] = ideal, read, sent
            c.load[count] = c.sums[depth, 0] + moved
            count += 1
    return count


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _enter(grouped: Any, size: Any, group: int) -> int:
    """Change of the number of groups that are partly inside."""
    grouped[group] += 1
    return int(grouped[group] == 1) - int(grouped[group] == size[group])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _leave(grouped: Any, size: Any, group: int) -> int:
    grouped[group] -= 1
    return int(grouped[group] == size[group] - 1) - int(grouped[group] == 0)


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})  # type: ignore[untyped-decorator]
def tails(g: Any, c: Any, n_devices: int, capacity: float, first: int, last: int, q: Any, z: Any) -> int:
    """Bounds of the time still to go from ideals `last - 1` down to `first`; returns the calls seen.

    q[j, k]: from the moment at which open output j is ready, with at most k devices left; z[ideal, k]: with all outputs
    ready at 0. Each entry is the least over all ways to go on, taken by itself: a relaxation, since another entry's
    least may need another way. The loops over k are innermost and contiguous: they become vector instructions.
    """
    value = np.zeros(64)
    carried = np.zeros(64, np.int64)
    rest = np.zeros(n_devices + 1)
    tail = np.zeros(len(g.node_cpu))
    seen = 0
    for ideal in range(last - 1, first - 1, -1):
        lo, n_open = g.open_ptr[ideal], g.open_ptr[ideal + 1] - g.open_ptr[ideal]
        if g.step_ptr[ideal] == g.step_ptr[ideal + 1]:
            z[ideal, :] = 0.0
            continue
        z[ideal, :] = WIDE
        q[lo : lo + n_open, :] = WIDE
        count = _calls(g, c, ideal, capacity if n_devices > 0 else -1.0)
        seen += count
        for i in range(count):
            after = c.ideal[i]
            at = g.open_ptr[after]
            carried[:n_open] = -1
            rest[:] = 0.0
            for j in range(g.open_ptr[after + 1] - at):
                if c.sent[i] >> j & 1:
                    for k in range(n_devices):
                        rest[k] = max(rest[k], q[at + j, k])
                else:
                    carried[c.place[g.open_output[at + j]]] = at + j
            for k in range(n_devices):
                rest[k] += c.load[i]
                z[ideal, k + 1] = min(z[ideal, k + 1], max(rest[k], z[after, k]))
            for j in range(n_open):
                old = carried[j]
                if old < 0:
                    for k in range(n_devices):
                        q[lo + j, k + 1] = min(q[lo + j, k + 1], rest[k])
                elif c.read[i] >> j & 1:
                    for k in range(n_devices):
                        q[lo + j, k + 1] = min(q[lo + j, k + 1], max(rest[k], q[old, k]))
                else:
                    for k in range(n_devices):
                        q[lo + j, k + 1] = min(q[lo + j, k + 1], q[old, k])
        for step in range(g.step_ptr[ideal], g.step_ptr[ideal + 1]):
            unit, after = g.step_unit[step], g.step_ideal[step]
            if not _runs_on_processor(g, unit):
                continue
            for k in range(n_devices + 1):
                longest = _processor_tails(g, c, unit, after, k, q, tail, value, n_open)
                z[ideal, k] = min(z[ideal, k], max(longest, z[after, k]))
                for j in range(n_open):
                    q[lo + j, k] = min(q[lo + j, k], value[j])
        for k in range(1, n_devices + 1):
            z[ideal, k] = min(z[ideal, k], z[ideal, k - 1])
            for j in range(n_open):
                q[lo + j, k] = min(q[lo + j, k], q[lo + j, k - 1])
    return seen


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _runs_on_processor(g: Any, unit: int) -> bool:
    for node in range(g.node_ptr[unit], g.node_ptr[unit + 1]):  # noqa: SIM110 (numba has no `all` of a generator)
        if g.node_cpu[node] > WIDE:
            return False
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _processor_tails(
    g: Any, c: Any, unit: int, after: int, k: int, q: Any, tail: Any, value: Any, n_open: int
) -> float:
    """Tails before a unit runs on processors, into `value`; returns the longest way that begins in the unit."""
    at, first, end = g.open_ptr[after], g.node_ptr[unit], g.node_ptr[unit + 1]
    value[:n_open] = 0.0
    for node in range(first, end):
        tail[node] = 0.0
    for j in range(g.open_ptr[after + 1] - at):
        output = g.open_output[at + j]
        if g.owner[output] != unit:
            value[c.place[output]] = q[at + j, k]
            continue
        for node in range(first, end):
            if g.node_output[node] == output:
                tail[node] = q[at + j, k]
    longest = 0.0
    for node in range(end - 1, first - 1, -1):
        tail[node] += g.node_cpu[node]
        longest = max(longest, tail[node])
        for i in range(g.arg_ptr[node], g.arg_ptr[node + 1]):
            arg = g.arg[i]
            if arg >= 0:
                tail[first + arg] = max(tail[first + arg], tail[node])
            elif g.owner[-1 - arg] >= 0:
                place = c.place[-1 - arg]
                value[place] = max(value[place], tail[node])
    return longest


class Labels(NamedTuple):
    """A pool of partial solutions. Those of ideal i with k devices used form a list from head[i, k].

    Attributes:
        ready: (n, W) when each open output of the label's ideal is ready.
        done: (n,) end of what no open output tells of.
        bound: (n,) of the latency of every completion.
        ideal, used, parent, is_call, following: (n,); is_call: the last step was a call, not a unit on processors.
        head, length: (I, K + 1).
    """

    ready: Floats
    done: Floats
    bound: Floats
    ideal: Ints
    used: Ints
    parent: Ints
    is_call: NDArray[np.bool_]
    following: Ints
    head: Ints
    length: Ints


def pool(graph: Graph, n_devices: int, n_labels: int) -> Labels:
    """Room for labels, with the first one made: nothing done, no device used."""
    n_ideals = len(graph.step_ptr) - 1
    width = max(1, int(np.diff(graph.open_ptr).max()))
    found = Labels(
        ready=np.zeros((n_labels, width)),
        done=np.zeros(n_labels),
        bound=np.zeros(n_labels),
        ideal=np.zeros(n_labels, np.int64),
        used=np.zeros(n_labels, np.int64),
        parent=np.zeros(n_labels, np.int64),
        is_call=np.zeros(n_labels, bool),
        following=np.zeros(n_labels, np.int64),
        head=np.full((n_ideals, n_devices + 1), -1, np.int64),
        length=np.zeros((n_ideals, n_devices + 1), np.int64),
    )
    found.parent[0] = found.following[0] = -1
    found.head[0, 0], found.length[0, 0] = 0, 1
    return found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _insert(g: Any, s: Any, ideal: int, used: int, ready: Any, done: float, bound: float, size: int, limit: int) -> int:
    """Add a label unless another is as good in every figure; returns its place, -1: as good, -2: the list is full."""
    n_open = g.open_ptr[ideal + 1] - g.open_ptr[ideal]
    for k in range(used + 1):
        label = s.head[ideal, k]
        while label >= 0:
            if s.done[label] <= done and _no_later(s.ready[label], ready, n_open):
                return -1
            label = s.following[label]
    for k in range(used, s.head.shape[1]):
        before, label = -1, s.head[ideal, k]
        while label >= 0:
            after = s.following[label]
            if done <= s.done[label] and _no_later(ready, s.ready[label], n_open):
                s.length[ideal, k] -= 1
                if before < 0:
                    s.head[ideal, k] = after
                else:
                    s.following[before] = after
            else:
                before = label
            label = after
    target = size
    if s.length[ideal, used] >= limit:
        worst, label = -1, s.head[ideal, used]
        while label >= 0:
            if worst < 0 or s.bound[label] > s.bound[worst]:
                worst = label
            label = s.following[label]
        if s.bound[worst] <= bound:
            return -2
        target = worst
    else:
        s.following[target] = s.head[ideal, used]
        s.head[ideal, used] = target
        s.length[ideal, used] += 1
    s.ready[target, :n_open] = ready[:n_open]
    s.done[target], s.bound[target], s.ideal[target], s.used[target] = done, bound, ideal, used
    return target


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _no_later(a: Any, b: Any, n: int) -> bool:
    for j in range(n):  # noqa: SIM110 (numba has no `all` of a generator)
        if a[j] > b[j]:
            return False
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def labels(
    g: Any, c: Any, n_devices: int, capacity: float, first: int, last: int, q: Any, z: Any, s: Any,
    size: int, limit: int, best: float,
) -> tuple[int, int, float, bool]:  # fmt: skip
    """Extend all labels of ideals `first` to `last - 1`.

    `size` labels are in the pool `s`. Of each ideal and number of devices, at most `limit` are kept: those with the
    least bounds. Labels whose bound reaches `best`, the latency to be undercut, are dropped.

    Returns the ideal reached (below `last`: the pool is full), the labels in the pool, the best value, and whether
    `limit` dropped any label.
    """
    ready = np.zeros(64)
    finish = np.zeros(len(g.node_cpu))
    dropped = False
    final = len(g.step_ptr) - 2
    for ideal in range(first, last):
        n_labels = 0
        for k in range(n_devices + 1):
            n_labels += s.length[ideal, k]
        if n_labels == 0 or ideal == final:
            continue
        n_calls = _calls(g, c, ideal, capacity if n_devices > 0 else -1.0)
        n_steps = g.step_ptr[ideal + 1] - g.step_ptr[ideal]
        for used in range(n_devices + 1):
            label = s.head[ideal, used]
            while label >= 0:
                if size + n_calls + n_steps > len(s.done):
                    return ideal, size, best, dropped
                for i in range(n_calls if used < n_devices else 0):
                    after = c.ideal[i]
                    left = n_devices - used - 1
                    if s.done[label] >= best or z[after, left] >= best:
                        continue
                    at, n_open = g.open_ptr[after], g.open_ptr[after + 1] - g.open_ptr[after]
                    end, j = 0.0, 0
                    read = c.read[i]
                    while read:
                        if read & 1:
                            end = max(end, s.ready[label, j])
                        read >>= 1
                        j += 1
                    end += c.load[i]
                    done = s.done[label] if c.sent[i] else max(s.done[label], end)
                    bound = max(done, z[after, left])
                    for j in range(n_open):
                        if c.sent[i] >> j & 1:
                            ready[j] = end
                        else:
                            ready[j] = s.ready[label, c.place[g.open_output[at + j]]]
                        bound = max(bound, ready[j] + q[at + j, left])
                        if bound >= best:
                            break
                    if bound >= best:
                        continue
                    place = _insert(g, s, after, used + 1, ready, done, bound, size, limit)
                    if place >= 0:
                        s.parent[place], s.is_call[place] = label, True
                        size += place == size
                        if after == final:
                            best = min(best, done)
                    dropped = dropped or place == -2 or 0 <= place < size - 1
                for step in range(g.step_ptr[ideal], g.step_ptr[ideal + 1]):
                    unit, after = g.step_unit[step], g.step_ideal[step]
                    left = n_devices - used
                    if not _runs_on_processor(g, unit) or z[after, left] >= best:
                        continue
                    done = _run_on_processor(g, c, unit, s.ready[label], finish, s.done[label])
                    bound = max(done, z[after, left])
                    at = g.open_ptr[after]
                    for j in range(g.open_ptr[after + 1] - at):
                        output = g.open_output[at + j]
                        if g.owner[output] == unit:
                            for node in range(g.node_ptr[unit], g.node_ptr[unit + 1]):
                                if g.node_output[node] == output:
                                    ready[j] = finish[node]
                        else:
                            ready[j] = s.ready[label, c.place[output]]
                        bound = max(bound, ready[j] + q[at + j, left])
                    if bound >= best:
                        continue
                    place = _insert(g, s, after, used, ready, done, bound, size, limit)
                    if place >= 0:
                        s.parent[place], s.is_call[place] = label, False
                        size += place == size
                        if after == final:
                            best = min(best, done)
                    dropped = dropped or place == -2 or 0 <= place < size - 1
                label = s.following[label]
    return last, size, best, dropped


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _run_on_processor(g: Any, c: Any, unit: int, ready: Any, finish: Any, done: float) -> float:
    """Ends of a unit's operators, into `finish`; returns `done`, raised by those that nobody reads."""
    first = g.node_ptr[unit]
    for node in range(first, g.node_ptr[unit + 1]):
        end = 0.0
        for i in range(g.arg_ptr[node], g.arg_ptr[node + 1]):
            arg = g.arg[i]
            if arg >= 0:
                end = max(end, finish[first + arg])
            elif g.owner[-1 - arg] >= 0:
                end = max(end, ready[c.place[-1 - arg]])
        finish[node] = end + g.node_cpu[node]
        if g.node_is_last[node]:
            done = max(done, finish[node])
    return done
