"""The smallest largest load over chains of ideals: is a load T enough? Answered exactly, for one T after the other.

At a fixed T a state of the dynamic program is (ideal, devices of each class used), and all that matters is whether it
can be reached. Four observations keep that cheap.

* The load of the share J - I needs no sum over its nodes. With `cut` as in `Lattice`,
  load = work(J) - work(I) + cut(I) + cut(J) - overlap, where the overlap counts the nets that both ideals cut: their
  cost once if J holds more of the net than I (it was added twice and is due once), else twice (the share misses it).
* Of two ideals reached with the same devices one may be at least as good to go on from (`Lattice.better`). Only the
  best are expanded, and an ideal below a better one that was reached isn't tested at all.
* Any share from I to J has load >= work(J) + exit(J) - (work(I) - entry(I)). With starts sorted by the bracket, the
  test of J ends at the first start that is too far away.
* The same inequality, applied from the end backwards, tells below which work nothing can be finished with the devices
  that are left; see `Tail`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numba as nb
import numpy as np
from numpy.typing import NDArray

from hetero.planner.lattice import Flags, Lattice, b1, f1, i1, u2

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero.planner.contract import Contraction
    from hetero.planner.workload import Floats, Ints

# A bound that only prunes is loosened by so much, far above the rounding of sums and differences of its terms.
_SLACK = 1e-9
# Sums of bytes in another order than the evaluator's; half of what that one tolerates.
_MEMORY_ROUNDING = 5e-13
_BUDGET = 20_000_000  # pairs between two looks at the clock

Int32s = NDArray[np.int32]
Int8s = NDArray[np.int8]


class OutOfTimeError(Exception):
    """The time limit passed before the answer was known."""


@dataclass(frozen=True)
class Share:
    """What one device gets: the nodes between two ideals.

    Attributes:
        kind: index of the device's class in the contraction.
        nodes: it holds.
    """

    kind: int
    nodes: frozenset[int]


@dataclass
class _State:
    """Ideals that can be reached with given numbers of devices.

    Attributes:
        reached: (M,) exactly these.
        covered: (M,) reached with these devices or fewer, or below a better one that is.
        before: (M,) the cut before, for the ideals reached.
        kind: (M,) class of the device between the two cuts.
        starts: reached ideals with no better one covered.
    """

    covered: Flags
    before: Int32s
    kind: Int8s
    starts: Ints


class Search:
    """Feasibility of loads on one lattice.

    Attributes:
        pairs: of cuts tested so far.
    """

    def __init__(self, graph: Contraction, lattice: Lattice, *, in_time: Callable[[], bool] = lambda: True) -> None:
        self.graph, self.lattice, self.pairs = graph, lattice, 0
        self._in_time = in_time
        self._states = list(product(*(range(count + 1) for count in graph.counts)))
        self._index = {state: k for k, state in enumerate(self._states)}

    def shares(self, load: float) -> list[Share] | None:
        """Shares with no load above `load`, or None: there are none.

        Raises:
            OutOfTimeError: see `in_time`.
        """
        tail = Tail(self.graph, self.lattice, load)
        if not tail.open:
            return None
        found: list[_State] = []
        for state in self._states:
            found.append(self._reach(state, load, found, tail))
            if found[-1].covered[-1]:
                return self._chain(found)
        return None

    def _reach(self, counts: tuple[int, ...], load: float, found: list[_State], tail: Tail) -> _State:
        m = len(self.lattice.members)
        covered, before, kind = np.zeros(m, np.bool_), np.full(m, -1, np.int32), np.full(m, -1, np.int8)
        if not any(counts):
            covered[0] = True
            return _State(covered, before, kind, np.zeros(1, np.int64))
        sources = {c: self._index[_less(counts, c)] for c in range(len(counts)) if counts[c]}
        for source in sources.values():
            covered |= found[source].covered
        alive = tail.alive(tuple(n - k for n, k in zip(self.graph.counts, counts, strict=True)))
        for c, source in sources.items():
            self._extend(c, found[source].starts, load, alive, covered, before, kind)
            if covered[-1]:
                break
        one = self.lattice
        surpassed = np.zeros(m, np.bool_)
        _surpassed(one.step_start, one.step_to, one.better, covered, surpassed)
        return _State(covered, before, kind, np.flatnonzero((before >= 0) & ~surpassed))

    def _extend(
        self, c: int, starts: Ints, load: float, alive: Flags, covered: Flags, before: Int32s, kind: Int8s
    ) -> None:
        one = self.lattice
        keys = one.work[c, starts] - one.entry[c, starts]
        by_key = np.argsort(-keys, kind="stable")
        starts, keys = starts[by_key], keys[by_key]
        memory = self.graph.memory[c] * (1 + _MEMORY_ROUNDING)
        ideal = len(covered) - 1
        while ideal > 0:
            ideal, tested = _test(
                ideal, starts, keys, load, memory, alive, covered, before, kind, c, one.members, one.step_start,
                one.step_to, one.better, one.work[c], one.unfit[c], one.nbytes, one.cut[c], one.exit[c],
                one.net_start, one.nets, one.inside, one.costs[c], _BUDGET,
            )  # fmt: skip
            self.pairs += tested
            if covered[-1]:
                return
            if not self._in_time():
                raise OutOfTimeError

    def _chain(self, found: list[_State]) -> list[Share]:
        ideal, state, shares = len(self.lattice.members) - 1, found[-1], []
        counts = self._states[len(found) - 1]
        while ideal:
            kind, start = int(state.kind[ideal]), int(state.before[ideal])
            shares.append(Share(kind, frozenset(self.lattice.nodes(ideal) - self.lattice.nodes(start))))
            counts = _less(counts, kind)
            ideal, state = start, found[self._index[counts]]
        return shares[::-1]


class Tail:
    """From which ideals can the rest be done under load T at all? A relaxation: no ideal is lost.

    Let r be the class that matters most, w its work, and a share of another class c hold at most W_c of w (the
    fractional knapsack of capacity T). With devices k left, an ideal I isn't hopeless only if it is complete or some
    class c with k_c > 0 leads from it to an ideal J that isn't hopeless with one device of c less:

        c = r:   w(I) - entry(I) >= w(J) + exit(J) - T      for some such J: for the smallest right side
        c != r:  w(I) >= w(J) - W_c                          for the smallest w(J)

    so that two thresholds for each k say it all.
    """

    def __init__(self, graph: Contraction, lattice: Lattice, load: float) -> None:
        times, counts = graph.times, graph.counts
        finite = np.where(np.isfinite(times), times, 0.0)
        main = _main(graph)
        # Where T is far below the sums, their rounding (n * 1e-16 of them) counts as well.
        slack = _SLACK * load + 1e-13 * float(lattice.work[main, -1] + lattice.cut[main].max())
        self._work, self._entry = lattice.work[main], lattice.work[main] - lattice.entry[main]
        absorbed = [most_work(times[:, c], finite[:, main], load) for c in range(len(counts))]
        ends = self._work + lattice.exit[main]
        self._thresholds = thresholds = dict[tuple[int, ...], tuple[float, float]]()
        nearest = dict[tuple[int, ...], tuple[float, float]]()
        for left in product(*(range(count + 1) for count in counts)):
            by_main, by_other = np.inf, np.inf
            for c in (c for c in range(len(counts)) if left[c]):
                fewer = _less(left, c)
                by_main, by_other = min(by_main, thresholds[fewer][0]), min(by_other, thresholds[fewer][1])
                if c == main:
                    by_main = min(by_main, nearest[fewer][0] - load - slack)
                else:
                    by_other = min(by_other, nearest[fewer][1] - absorbed[c] - slack)
            self._thresholds[left] = by_main, by_other
            alive = self.alive(left)
            nearest[left] = float(ends[alive].min()), float(self._work[alive].min())
        self.open = bool(alive[0])

    def alive(self, left: tuple[int, ...]) -> Flags:
        """(M,) ideals from which the rest isn't hopeless with the devices left."""
        by_main, by_other = self._thresholds[left]
        alive: Flags = (self._entry >= by_main) | (self._work >= by_other)
        alive[-1] = True
        return alive


def _less(counts: tuple[int, ...], c: int) -> tuple[int, ...]:
    return (*counts[:c], counts[c] - 1, *counts[c + 1 :])


def _main(graph: Contraction) -> int:
    """The class whose devices together are fastest."""
    times = np.where(np.isfinite(graph.times), graph.times, graph.times[np.isfinite(graph.times)].max(initial=0))
    return int(np.argmax(np.array(graph.counts) / np.maximum(times.sum(axis=0), np.finfo(float).tiny)))


def most_work(times: Floats, work: Floats, load: float) -> float:
    """Most work that nodes of at most `load` time hold together, parts of nodes allowed: a fractional knapsack."""
    can = np.isfinite(times) & (work > 0)
    t, w = times[can], work[can]
    free = t == 0
    total, t, w = float(w[free].sum()), t[~free], w[~free]
    best = np.argsort(-w / t, kind="stable")
    t, w = t[best], w[best]
    room = np.clip(load - (np.cumsum(t) - t), 0, t)
    return total + float((w * (room / t)).sum())


@nb.njit(nb.void(i1, i1, b1, b1, b1), cache=True)
def _surpassed(step_start, step_to, better, covered, out):  # type: ignore[no-untyped-def]
    """Mark ideals with one more node of which is covered and better."""
    for i in range(len(covered)):
        for e in range(step_start[i], step_start[i + 1]):
            if better[e] and covered[step_to[e]]:
                out[i] = True


@nb.njit(
    nb.types.UniTuple(nb.int64, 2)(
        nb.int64, i1, f1, nb.float64, nb.float64, b1, b1, nb.int32[::1], nb.int8[::1], nb.int64, u2, i1, i1, b1,
        f1, i1, f1, f1, f1, i1, i1, i1, f1, nb.int64,
    ),
    cache=True,
)  # fmt: skip
def _test(  # type: ignore[no-untyped-def]
    ideal, starts, keys, load, memory, alive, covered, before, kind, c, members, step_start,
    step_to, better, work, unfit, nbytes, cut, leave, net_start, nets, inside, costs, budget,
):  # fmt: skip
    """From `ideal` downwards, mark what a device of class c reaches from a start; returns where the budget ended."""
    tested, n_words = 0, members.shape[1]
    limit = load * (1 + 1e-9)
    while ideal > 0 and tested < budget:
        j = ideal
        ideal -= 1
        if covered[j] or not alive[j]:
            continue
        for e in range(step_start[j], step_start[j + 1]):
            if better[e] and covered[step_to[e]]:
                covered[j] = True
                break
        if covered[j]:
            continue
        for k in range(len(starts)):
            if work[j] - keys[k] > limit:
                break
            tested += 1
            i = starts[k]
            compute = work[j] - work[i]
            if compute + leave[j] > limit or i >= j or unfit[j] != unfit[i] or nbytes[j] - nbytes[i] > memory:
                continue
            subset = True
            for word in range(n_words):
                if members[i, word] & ~members[j, word]:
                    subset = False
                    break
            if not subset:
                continue
            total = compute + cut[i] + cut[j]
            if total > load:
                a, b = net_start[i], net_start[j]
                end_a, end_b = net_start[i + 1], net_start[j + 1]
                while a < end_a and b < end_b:
                    if nets[a] < nets[b]:
                        a += 1
                    elif nets[a] > nets[b]:
                        b += 1
                    else:
                        total -= costs[nets[a]] if inside[a] != inside[b] else 2 * costs[nets[a]]
                        a += 1
                        b += 1
            if total <= load:
                covered[j], before[j], kind[j] = True, i, c
                if j == len(covered) - 1:
                    return ideal, tested
                break
    return ideal, tested
