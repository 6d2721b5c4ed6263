"""The most valuable set of items for one device within a load: a dynamic programme over a decision diagram.

Items are decided one by one: in the set or out of it. What the past means for the future are the nets that have pins
on both sides of the moment: whether the pins so far are out (0), in (1), or both (2, and the net is paid). Graphs of
neural networks are long and narrow, so that in a good order few nets are open at a time, and the reachable states are
few: 60 to 15000 in all for graphs of 30 to 420 items. The diagram depends on neither the worths nor the limit and is
built once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero.planner.noncontiguous_hypergraph import Hypergraph
    from hetero.planner.workload import Floats, Ints

_N_ORDERS = 16
MAX_STATES = 300_000
_ROUGH_CELLS, _FINE_CELLS = 10_000_000, 30_000_000
_FINE_BINS = 2048
_FEWEST_BINS = 16

State = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Diagram:
    """Layers of states, one layer for each item in `order`, and one final state; for devices of one class.

    Attributes:
        order: (n,) items as they are decided.
        offsets: (n + 1,) first state of each layer; the last is the final state.
        out, into: (S,) next state when the item stays out of the set, or goes into it.
        pays_out, pays_in: (S,) what each of these adds to the device's load.
    """

    order: Ints
    offsets: Ints
    out: Ints
    into: Ints
    pays_out: Floats
    pays_in: Floats

    def best(self, worth: Floats, limit: float, bins: int) -> tuple[float, NDArray[np.bool_]]:
        """A set of load <= limit, of large worth: the more bins, the surer the largest.

        Args:
            worth: (n,) of each item, of any sign.
            limit: on the load.
            bins: of loads, of each of which one way is kept.

        Returns:
            The worth, and the set (n,).
        """
        value, chosen = self._run(worth, limit, min(bins, _ROUGH_CELLS // len(self.out)), is_bound=False)
        members = np.zeros(len(self.order), bool)
        members[self.order[chosen]] = True
        return value, members

    def upper_bound(self, worth: Floats, limit: float) -> float:
        """No set of load <= limit is worth more; never below 0, what nothing is worth."""
        return self._run(worth, limit, min(_FINE_BINS, _FINE_CELLS // len(self.out)), is_bound=True)[0]

    def _run(self, worth: Floats, limit: float, bins: int, *, is_bound: bool) -> tuple[float, NDArray[np.bool_]]:
        found: tuple[float, NDArray[np.bool_]] = _knapsack(
            self.offsets,
            self.out,
            self.into,
            self.pays_out,
            self.pays_in,
            worth[self.order],
            limit,
            max(_FEWEST_BINS, bins),
            is_bound,
        )
        return found


def build(graph: Hypergraph) -> tuple[Diagram, ...] | None:
    """A diagram for each class of devices; None where one would have more than MAX_STATES states."""
    order = _narrow_order(graph)
    diagrams = [_build(graph, order, kind) for kind in range(len(graph.counts))]
    found = tuple(diagram for diagram in diagrams if diagram is not None)
    return found if len(found) == len(diagrams) else None


def _build(graph: Hypergraph, order: list[int], kind: int) -> Diagram | None:
    remaining = np.array([len(pins) for pins, _ in graph.nets])
    layer: dict[State, int] = {(): 0}
    offsets, following, pays = [0], [], []
    for item in order:
        # A net that costs this class nothing says nothing.
        nets = [e for e in graph.nets_of[item] if graph.nets[e][1][kind] > 0]
        first = offsets[-1] + len(layer)
        after: dict[State, int] = {}
        for state in layer:
            for is_in in (0, 1):
                reached, paid = _step(state, nets, remaining, is_in)
                following.append(first + after.setdefault(reached, len(after)))
                cost = sum(float(graph.nets[e][1][kind]) for e in paid)
                pays.append(cost + float(graph.times[item, kind]) if is_in else cost)
        remaining[nets] -= 1
        offsets.append(first)
        layer = after
        if first > MAX_STATES:
            return None
    nexts, costs = np.array(following, np.int64), np.array(pays)
    return Diagram(
        order=np.array(order, np.int64),
        offsets=np.array(offsets, np.int64),
        out=nexts[::2].copy(),
        into=nexts[1::2].copy(),
        pays_out=costs[::2].copy(),
        pays_in=costs[1::2].copy(),
    )


def _step(state: State, nets: list[int], remaining: Ints, is_in: int) -> tuple[State, list[int]]:
    """The state after an item of these nets is decided, and the nets to be paid from now on."""
    status = dict(state)
    paid = []
    for e in nets:
        before = status.setdefault(e, is_in)
        if before not in (2, is_in):
            status[e] = 2
            paid.append(e)
        if remaining[e] == 1:
            del status[e]
    return tuple(sorted(status.items())), paid


def _narrow_order(graph: Hypergraph) -> list[int]:
    """The narrowest of several greedy orders, each from another first item."""
    degrees = [len(nets) for nets in graph.nets_of]
    rng = np.random.default_rng(0)
    others = rng.permutation(len(graph))[: _N_ORDERS - 1].tolist()
    tags = rng.integers(1, 2**62, len(graph)).tolist()
    orders = [_greedy_order(graph, first, tags) for first in [int(np.argmin(degrees)), *others]]
    return min(orders)[1]


def _greedy_order(graph: Hypergraph, first: int, tags: list[int]) -> tuple[float, list[int]]:
    """Always the item next that leaves fewest statuses to remember, of those the one reached last.

    Open nets of which the same pins are decided have the same status, as an operator's output and its gradient do:
    they are told apart by the sum of their decided pins' tags, random numbers.
    """
    remaining = [len(pins) for pins, _ in graph.nets]
    decided: dict[int, int] = {}  # sum of tags for each open net
    reached = {first: 0}
    left = dict.fromkeys(range(len(graph)))
    order: list[int] = []
    width = 0.0

    def after(item: int) -> int:
        nets = graph.nets_of[item]
        still = [decided.get(e, 0) + tags[item] for e in nets if remaining[e] > 1]
        return len({*still, *(tag for e, tag in decided.items() if e not in nets)})

    while left:
        if not reached:
            reached[next(iter(left))] = 0
        item = min(reached, key=lambda i: (after(i), -reached[i], i))
        order.append(item)
        del left[item], reached[item]
        for e in graph.nets_of[item]:
            remaining[e] -= 1
            decided[e] = decided.get(e, 0) + tags[item]
            if not remaining[e]:
                del decided[e]
            reached.update((other, len(order)) for other in graph.nets[e][0] if other in left)
        width += 2.0 ** min(len(set(decided.values())), 60)
    return width, order


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _knapsack(
    offsets: Ints,
    out: Ints,
    into: Ints,
    pays_out: Floats,
    pays_in: Floats,
    worth: Floats,
    limit: float,
    bins: int,
    is_bound: bool,
) -> tuple[float, NDArray[np.bool_]]:
    """Longest path through the diagram within the limit, by labels (worth, load) of which each bin of loads keeps one.

    Loads are never rounded. Where two labels of one state meet in one bin, a bound keeps the larger worth with the
    smaller load, which is at least as good as either: no path is lost, so the result is at least the true optimum.
    Otherwise the label of larger worth stays, and the result is the worth of a real set.
    """
    n = len(offsets) - 1
    widest = 1
    for i in range(n):
        widest = max(widest, offsets[i + 1] - offsets[i])
    value, load = np.full((2, widest, bins + 1), -np.inf), np.full((2, widest, bins + 1), np.inf)
    came_from = np.full((1 if is_bound else offsets[n] + 1, bins + 1), -1, np.int32)
    value[0, 0, 0] = load[0, 0, 0] = 0.0
    # A little more than the limit: rounding in sums of thousands of terms must not lose a set that fits.
    roof = limit * (1 + 1e-11)
    for i in range(n):
        now, then = i % 2, (i + 1) % 2
        value[then] = -np.inf
        load[then] = np.inf
        for s in range(offsets[i], offsets[i + 1]):
            most = -np.inf
            for b in range(bins + 1):
                if value[now, s - offsets[i], b] <= most:
                    continue  # no better than a lighter one
                most = value[now, s - offsets[i], b]
                for x in range(2):
                    target = (into[s] if x else out[s]) - offsets[i + 1]
                    total = load[now, s - offsets[i], b] + (pays_in[s] if x else pays_out[s])
                    if total > roof:
                        continue
                    gained = most + (worth[i] if x else 0.0)
                    c = min(bins, int(total / roof * bins))
                    old, old_load = value[then, target, c], load[then, target, c]
                    if is_bound:
                        value[then, target, c] = max(old, gained)
                        load[then, target, c] = min(old_load, total)
                    elif gained > old or (gained == old and total < old_load):
                        value[then, target, c] = gained
                        load[then, target, c] = total
                        came_from[offsets[i + 1] + target, c] = (s * (bins + 1) + b) * 2 + x
    chosen = np.zeros(n, np.bool_)
    b = int(np.argmax(value[n % 2, 0]))
    if not is_bound:
        s, c = offsets[n], b
        for i in range(n - 1, -1, -1):
            code = came_from[s, c]
            chosen[i] = code % 2 == 1
            s, c = code // 2 // (bins + 1), code // 2 % (bins + 1)
    return value[n % 2, 0, b], chosen
