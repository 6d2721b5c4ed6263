"""The compiled searches of `class_chain`: chains over device classes of which each has a number of devices.

    L layers, cuts 0 .. L between them; C classes; a state is how many devices of each class are in use, in mixed radix

A stage is a class c and two cuts i < j; it costs  opening[c] + P[c, j] - P[c, i],  plus  hop[l, c, i]  after a stage of
class l. What forbids a stage (memory, a layer that the class can't run, a limit on the stage's loads) only gets worse
as the stage grows, so all of it is one table: far[c, i] is the last cut that a stage from i may reach, never falling in
i. Each minimum over the stages that end at j is then one over a window of i that only moves forward, which a queue of
candidates in rising order gives in constant time (the sliding window minimum).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from hetero.planner.problem import Floats
    from hetero.planner.symmetry import Ints

COMPLETE, TRUNCATED = 0, 1


@numba.njit("i8[:,:](f8[:,:,:], f8[:,:], i8[:,:], f8[:])", cache=True)  # type: ignore[untyped-decorator]
def furthest(prefix: Floats, opening: Floats, stop: Ints, caps: Floats) -> Any:
    """(C, L + 1) last cut that a stage from each cut may reach; the cut itself: there is no such stage.

    Args:
        prefix: (K, C, L + 1) sums of K kinds of load.
        opening: (K, C) fixed part of each.
        stop: (C, L + 1) last cut that memory and missing times allow.
        caps: (K,) largest load of a stage.
    """
    kinds, classes, cuts = prefix.shape
    far = np.empty((classes, cuts), np.int64)
    for c in range(classes):
        j = 0
        for i in range(cuts):
            j = max(i, j)
            while j < stop[c, i]:
                for k in range(kinds):
                    if opening[k, c] + (prefix[k, c, j + 1] - prefix[k, c, i]) > caps[k]:
                        break
                else:
                    j += 1
                    continue
                break
            far[c, i] = j
    return far


@numba.njit("Tuple((f8[:,:], i8[:,:]))(f8[:,:], f8[:], f8[:,:,:], i8[:,:])", cache=True)  # type: ignore[untyped-decorator]
def completion(prefix: Floats, opening: Floats, hop: Floats, far: Ints) -> Any:
    """Least cost of the layers from a cut on, after a stage of a class, with any number of devices of each.

    Returns:
        (C + 1, L + 1) costs, row C for the start of the chain, before which there is no hand-over; and (C, L + 1) the
        best end of a stage of each class from each cut, -1: there is none.
    """
    classes, cuts = prefix.shape
    ends = np.full((classes, cuts), -1, np.int64)
    table = np.full((classes + 1, cuts), np.inf)
    table[:, cuts - 1] = 0.0
    queue = np.empty((classes, cuts), np.int64)
    head, tail = np.full(classes, cuts, np.int64), np.full(classes, cuts, np.int64)  # filled from the right
    for i in range(cuts - 2, -1, -1):
        for c in range(classes):
            key = prefix[c, i + 1] + table[c, i + 1]
            if key < np.inf:
                while head[c] < tail[c]:
                    j = queue[c, head[c]]
                    if prefix[c, j] + table[c, j] < key:
                        break
                    head[c] += 1
                head[c] -= 1
                queue[c, head[c]] = i + 1
            while head[c] < tail[c] and queue[c, tail[c] - 1] > far[c, i]:
                tail[c] -= 1
            if head[c] == tail[c]:
                head[c] = tail[c] = cuts
                continue
            ends[c, i] = j = queue[c, tail[c] - 1]
            stage = opening[c] + prefix[c, j] + table[c, j] - prefix[c, i]
            for before in range(classes):
                table[before, i] = min(table[before, i], hop[before, c, i] + stage)
            table[classes, i] = min(table[classes, i], stage)
    return table, ends


@numba.njit("i8[:,:](f8[:,:], f8[:], f8[:,:,:], f8[:,:], i8[:,:])", cache=True)  # type: ignore[untyped-decorator]
def cheapest(prefix: Floats, opening: Floats, hop: Floats, table: Floats, ends: Ints) -> Any:
    """(n, 2) class and end of each stage of the chain that attains `completion`'s table; no rows: there is none."""
    classes, cuts = prefix.shape
    path = np.empty((cuts, 2), np.int64)
    if not table[classes, 0] < np.inf:
        return path[:0]
    n, i, before = 0, 0, classes
    while i < cuts - 1:
        best, best_c = np.inf, -1
        for c in range(classes):
            j = ends[c, i]
            if j >= 0:
                way = 0.0 if before == classes else hop[before, c, i]
                value = way + opening[c] + prefix[c, j] - prefix[c, i] + table[c, j]
                if value < best:
                    best, best_c = value, c
        path[n, 0], path[n, 1] = best_c, ends[best_c, i]
        n, i, before = n + 1, ends[best_c, i], best_c
    return path[:n]


@numba.njit("i8[:](i8[:,:], i8[:], i8[:])", cache=True)  # type: ignore[untyped-decorator]
def reach(far: Ints, counts: Ints, strides: Ints) -> Any:
    """(states,) last cut that the devices of each state can reach together, if every hand-over is possible.

    Without hand-overs who is further is never worse off: the other's stages, cut off where it stands, are possible.
    """
    classes = len(counts)
    n_states = strides[classes - 1] * (counts[classes - 1] + 1)
    reached = np.zeros(n_states, np.int64)
    digits = np.zeros(classes, np.int64)
    for state in range(1, n_states):
        c = 0
        while digits[c] == counts[c]:
            digits[c] = 0
            c += 1
        digits[c] += 1
        best = 0
        for c in range(classes):
            if digits[c]:
                best = max(best, far[c, reached[state - strides[c]]])
        reached[state] = best
    return reached


@numba.njit("i8[:](i8[:,:], i8[:], i8[:])", cache=True)  # type: ignore[untyped-decorator]
def needed(far: Ints, counts: Ints, strides: Ints) -> Any:
    """(states,) first cut from which the devices that a state leaves unused can reach the end, likewise."""
    classes, cuts = far.shape
    back = np.empty((classes, cuts), np.int64)
    for c in range(classes):
        i = 0
        for j in range(cuts):
            while far[c, i] < j:
                i += 1
            back[c, j] = i
    n_states = strides[classes - 1] * (counts[classes - 1] + 1)
    first = np.full(n_states, cuts - 1, np.int64)
    digits = counts.copy()
    for state in range(n_states - 2, -1, -1):
        c = 0
        while digits[c] == 0:
            digits[c] = counts[c]
            c += 1
        digits[c] -= 1
        best = cuts - 1
        for c in range(classes):
            if digits[c] < counts[c]:
                best = min(best, back[c, first[state + strides[c]]])
        first[state] = best
    return first


@numba.njit(  # type: ignore[untyped-decorator]
    "Tuple((f8, f8[:], f8[:,:]))(f8[:,:], f8[:], f8[:,:,:], i8[:,:], i8[:], f8[:], i8, f8)",
    cache=True,
)
def multipliers(
    prefix: Floats, opening: Floats, hop: Floats, far: Ints, counts: Ints, start: Floats, rounds: int, enough: float
) -> Any:
    """The largest lower bound found from prices of devices, those prices (C,), and their table of completions.

    For any prices p >= 0,  min over chains with used <= counts of their cost  >=  min over all chains of
    (cost + p used) - p counts.  Ascent along used - counts, with Polyak's step towards a value somewhat above the best
    bound; the distance shrinks while there is no progress (source: Held, Wolfe, Crowder, Math. Programming 6, 1974).
    It ends at a bound of `enough`.
    """
    classes, cuts = prefix.shape
    price, best_price = start.copy(), start.copy()
    best, ambition, stale = -np.inf, 0.05, 0
    best_table = np.zeros((classes + 1, cuts))
    for _ in range(rounds):
        table, ends = completion(prefix, opening + price, hop, far)
        value = table[classes, 0] - np.sum(price * counts)
        if value > best:
            stale = 0 if value > best + 1e-4 * abs(best) else stale + 1
            best, best_table = value, table
            best_price[:] = price
        else:
            stale += 1
        if not table[classes, 0] < np.inf or best >= enough:
            break
        used = np.zeros(classes)
        path = cheapest(prefix, opening + price, hop, table, ends)
        for k in range(len(path)):
            used[path[k, 0]] += 1
        slope = used - counts
        for c in range(classes):
            if price[c] == 0.0 and slope[c] < 0:
                slope[c] = 0.0
        norm = np.sum(slope * slope)
        if norm == 0.0:
            break
        if stale >= 3:
            ambition, stale = ambition / 2, 0
            price[:] = best_price
            if ambition < 1e-6:
                break
        target = best + ambition * max(abs(best), 1e-300)
        price = np.maximum(0.0, price + slope * ((target - value) / norm))
    return best, best_price, best_table


@numba.njit(  # type: ignore[untyped-decorator]
    "Tuple((f8, i8, f8[:], i8[:,:], i8[:,:], i8[:]))"
    "(f8[:,:], f8[:], f8[:,:,:], i8[:,:], i8[:], i8[:], f8[:,:], f8[:], i8[:], f8, i8, i8, i8[:,:])",
    cache=True,
)
def search(
    prefix: Floats,
    opening: Floats,
    hop: Floats,
    far: Ints,
    counts: Ints,
    strides: Ints,
    rest: Floats,
    price: Floats,
    first: Ints,
    limit: float,
    width: int,
    most: int,
    reference: Ints,
) -> Any:
    """The least cost of a chain within the counts, if it is at most `limit`.

    States are met in the order of their index, so all that leads to one comes before it. What ends in a state with a
    stage of class c comes from one state, that with one device of c fewer: a run of cuts with a value each, kept only
    where the completion bound stays within the limit and no chain ends there with fewer devices at no higher cost.

    Args:
        prefix: (C, L + 1) of the costs.
        opening: (C,)
        hop: (C, C, L + 1) cost of the hand-over at a cut; infinite: impossible.
        far: of `furthest`.
        counts: (C,) devices of each class.
        strides: (C,) of the state's index.
        rest: (C + 1, L + 1) completions under the prices.
        price: (C,) of `multipliers`.
        first: (states,) of `needed`.
        limit: dearer chains don't count.
        width: at most about so many cuts are kept of a run, those with the least bound; 0: all.
        most: values kept at most in all.
        reference: (n, 2) class and end of each stage of a chain that doesn't count.

    Returns:
        Cost, COMPLETE or TRUNCATED (then something may have been missed), the values, (states, C) start of each run of
        cuts in them, (2 states, C) its first and last cut, and (state, class) of the end.
    """
    classes, cuts = prefix.shape
    n_states = strides[classes - 1] * (counts[classes - 1] + 1)
    pool = np.empty(1 << 16)
    start = np.full((n_states, classes), -1, np.int64)
    span = np.zeros((2 * n_states, classes), np.int64)
    status, filled, best = COMPLETE, 0, np.inf
    end = np.full(2, -1, np.int64)
    digits = np.zeros(classes, np.int64)
    arriving = np.empty((classes, cuts))
    values = np.empty(cuts)
    bounds = np.empty(cuts)
    queue = np.empty(cuts, np.int64)
    keys = np.empty(cuts)
    own_state, own_cut, own_cost, own_last, own_next = 0, 0, 0.0, classes, 0
    credit = np.sum(price * counts)
    for state in range(n_states):
        if state:
            c = 0
            while digits[c] == counts[c]:
                digits[c] = 0
                credit += price[c] * counts[c]
                c += 1
            digits[c] += 1
            credit -= price[c]
        low, high = cuts, -1
        for last in range(classes):
            if start[state, last] >= 0:
                low, high = min(low, span[2 * state, last]), max(high, span[2 * state + 1, last])
        is_own = len(reference) > own_next and state == own_state
        if state == 0 and not is_own:
            low, high = 0, 0
        if is_own:
            low, high = min(low, own_cut), max(high, own_cut)
        if high < 0:
            continue
        for c in range(classes):
            if digits[c] == counts[c]:
                continue
            for i in range(low, high + 1):
                arriving[c, i] = np.inf
            if state == 0 and not is_own:
                arriving[c, 0] = 0.0
            for last in range(classes):
                at = start[state, last]
                if at < 0:
                    continue
                a, b = span[2 * state, last], span[2 * state + 1, last]
                for i in range(a, b + 1):
                    value = pool[at + i - a] + hop[last, c, i]
                    if value < arriving[c, i]:
                        arriving[c, i] = value
        for c in range(classes):
            if digits[c] == counts[c]:
                continue
            target = state + strides[c]
            budget = credit - price[c]
            head, tail, i = 0, 0, low
            a, b = cuts, -1
            final = far[c, high]
            for j in range(low + 1, final + 1):
                while i < j and i <= high:
                    key = arriving[c, i] - prefix[c, i]
                    if key < np.inf:
                        while tail > head and keys[tail - 1] >= key:
                            tail -= 1
                        keys[tail], queue[tail] = key, i
                        tail += 1
                    i += 1
                while head < tail and far[c, queue[head]] < j:
                    head += 1
                values[j] = keys[head] + opening[c] + prefix[c, j] if head < tail else np.inf
            if is_own:
                way = 0.0 if own_last == classes else hop[own_last, c, own_cut]
                for j in range(own_cut + 1, far[c, own_cut] + 1):
                    if c != reference[own_next, 0] or j != reference[own_next, 1]:
                        value = own_cost + way + opening[c] + prefix[c, j] - prefix[c, own_cut]
                        values[j] = min(values[j], value)
            for j in range(low + 1, final + 1):
                bounds[j] = np.inf
                value = values[j]
                bound = value + max(rest[c, j] - budget, 0.0)
                if not (bound <= limit and bound < np.inf) or j < first[target]:
                    continue
                if j == cuts - 1:
                    if value < best:
                        best, limit = value, min(limit, value)
                        end[0], end[1] = target, c
                    bounds[j], a, b = bound, min(a, j), j
                    continue
                for other in range(classes):
                    if (digits[other] + (other == c)) and start[target - strides[other], c] >= 0:
                        fewer = target - strides[other]
                        x = span[2 * fewer, c]
                        if x <= j <= span[2 * fewer + 1, c] and pool[start[fewer, c] + j - x] <= value:
                            break
                else:
                    bounds[j], a, b = bound, min(a, j), j
            if b < 0:
                continue
            if width and b - a + 1 > width:
                status = TRUNCATED
                at_best = a
                for j in range(a, b + 1):
                    if bounds[j] < bounds[at_best]:
                        at_best = j
                a, b = max(a, at_best - width // 2), min(b, at_best + width // 2)
            if filled + b - a + 1 > most:
                status = TRUNCATED
                continue
            while filled + b - a + 1 > len(pool):
                larger = np.empty(2 * len(pool))
                larger[:filled] = pool[:filled]
                pool = larger
            start[target, c] = filled
            span[2 * target, c], span[2 * target + 1, c] = a, b
            for j in range(a, b + 1):
                pool[filled + j - a] = values[j] if bounds[j] < np.inf else np.inf
            filled += b - a + 1
        if is_own:
            c, j = reference[own_next, 0], reference[own_next, 1]
            way = 0.0 if own_last == classes else hop[own_last, c, own_cut]
            own_cost += way + opening[c] + prefix[c, j] - prefix[c, own_cut]
            own_last, own_state = c, own_state + strides[c]
            own_next = own_next + 1 if far[c, own_cut] >= j else len(reference)
            own_cut = j
    return best, status, pool, start, span, end
