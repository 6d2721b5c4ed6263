"""The chain of least cost over device classes with counts, where no stage may exceed given loads: exact.

A partial chain is known by its cut, its last class and how many devices of each class it used. Prices of devices turn
the counts into costs, which bounds the rest of a chain (`class_core.multipliers`); whatever can't stay within a ceiling
on the whole cost is never made. So the ceiling starts just above the bound of the whole chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero.planner import class_core

if TYPE_CHECKING:
    from hetero.planner.bounds import Weights
    from hetero.planner.class_problem import ClassChain
    from hetero.planner.problem import Floats
    from hetero.planner.symmetry import Ints

_SAME = 1e-12
_ROUNDS = 60
_BEAM = 4
_MOST_VALUES = 1 << 25

Path = tuple[tuple[int, int], ...]
"""Class and end of each stage."""

Limits = tuple[float, float]
"""Largest forward and backward load of a stage [s]."""


@dataclass(frozen=True)
class Relaxed:
    """A lower bound of the sum within limits, and the tables that a search needs for them."""

    bound: float
    far: Ints
    hop: Floats
    rest: Floats


@dataclass(frozen=True)
class Least:
    """A chain, or none; no chain that was asked for costs less than the bound; whether all of them were considered."""

    path: Path
    lower_bound: float
    is_certain: bool


class Sums:
    """One class chain under the sum part of one objective; the largest loads are limits."""

    def __init__(self, chain: ClassChain, objective: Weights, *, reference: Path = ()) -> None:
        self.chain, self.objective = chain, objective
        runs = np.isfinite(chain.forward)
        tables = [np.where(runs, table, 0.0) for table in (chain.forward, chain.backward)]
        self.loads = np.stack([_prefix(table) for table in tables])
        self.fixed = np.ascontiguousarray(chain.overhead.T)
        self.prefix = _prefix(objective.forward * tables[0] + objective.backward * tables[1])
        self.opening = objective.forward * self.fixed[0] + objective.backward * self.fixed[1]
        self.hops = chain.hops()
        self.weighted_hops = np.where(np.isfinite(self.hops), objective.transfer, 1.0) * self.hops
        self.stop = chain.stops()
        self.strides = np.concatenate([[1], np.cumprod(chain.counts[:-1] + 1)]).astype(np.int64)
        self.reference = np.array(reference, np.int64).reshape(-1, 2)
        self.price = np.zeros(len(chain.counts))

    def far(self, limits: Limits) -> Ints:
        """(C, L + 1) last cut that a stage from each cut may reach."""
        result: Ints = class_core.furthest(self.loads, self.fixed, self.stop, np.array(limits, float))
        return result

    def largest(self) -> Limits:
        """The largest forward and backward load that any stage can have."""
        ends = np.broadcast_to(self.stop, self.loads.shape)
        spans = (np.take_along_axis(self.loads, ends, axis=2) - self.loads) + self.fixed[:, :, None]
        forward, backward = spans.max(axis=(1, 2))
        if self.objective.links:
            forward = max(forward, self.hops[np.isfinite(self.hops)].max(initial=0.0))
        return float(forward), float(backward)

    def floor(self, kind: int, *, precision: float = 1e-13) -> tuple[float, float]:
        """Bracket of the least largest load of one kind, if no hand-over took time.

        Returns:
            What no placement is below, even with hand-overs, and what is possible without them; both infinite where
            nothing is. They are equal or differ by the relative precision at most.
        """
        low, high = 0.0, float((self.loads[kind, :, -1] + self.fixed[kind]).max())
        limits = [np.inf, np.inf]

        def is_enough(limit: float) -> bool:
            limits[kind] = limit
            reached = class_core.reach(self.far((limits[0], limits[1])), self.chain.counts, self.strides)
            return int(reached[-1]) == len(self.chain.forward)

        if not is_enough(high):
            return np.inf, np.inf
        if is_enough(0.0):
            return 0.0, 0.0
        while high - low > precision * high and high > 1e-300:
            middle = (low + high) / 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        return low, high

    def least(self, limits: Limits, *, below: float = np.inf) -> Least:
        """The chain of least S within limits of F and B, if S <= `below`.

        The ceiling on S starts near the lower bound and grows while nothing is found below it.
        """
        relaxed = self.relaxed(limits)
        bound = relaxed.bound
        if not bound <= below + _SAME * abs(below):
            return Least((), bound, True)
        first = class_core.needed(relaxed.far, self.chain.counts, self.strides)
        if first[0] > 0:
            return Least((), np.inf, True)
        step = 1e-3
        while True:
            ceiling = min(bound + step * abs(bound), below) if bound and step < 1 else below
            found = self._search(relaxed, first, ceiling)
            if found[0] < np.inf:
                is_certain = found[1] == class_core.COMPLETE
                return Least(self._trace(found, relaxed), found[0] if is_certain else bound, is_certain)
            if found[1] != class_core.COMPLETE:
                found = self._search(relaxed, first, below, width=_BEAM)
                return Least(self._trace(found, relaxed) if found[0] < np.inf else (), bound, False)
            if ceiling >= below:
                return Least((), below, True)
            bound, step = ceiling, step * 5

    def any(self, limits: Limits) -> Least:
        """Some chain within limits of F and B; the windows of layers that can be reached are the only guide."""
        relaxed = self.relaxed(limits)
        first = class_core.needed(relaxed.far, self.chain.counts, self.strides)
        if first[0] > 0 or not relaxed.bound < np.inf:
            return Least((), np.inf, True)
        found = self._search(relaxed, first, np.inf)
        is_certain = found[1] == class_core.COMPLETE
        return Least(self._trace(found, relaxed) if found[0] < np.inf else (), relaxed.bound, is_certain)

    def reached(self) -> int:
        """How many layers a chain can place at most, where none can place all."""
        far = self.far((np.inf, np.inf))
        n_states = int(self.strides[-1]) * (int(self.chain.counts[-1]) + 1)
        everywhere = np.zeros((len(far) + 1, far.shape[1]))
        relaxed = Relaxed(0.0, far, self.weighted_hops, everywhere)
        span = self._search(relaxed, np.zeros(n_states, np.int64), np.inf, price=np.zeros(len(far)))[4]
        return int(span[1::2].max())

    def _search(
        self, relaxed: Relaxed, first: Ints, ceiling: float, *, width: int = 0, price: Floats | None = None
    ) -> Any:
        return class_core.search(
            self.prefix,
            self.opening,
            relaxed.hop,
            relaxed.far,
            self.chain.counts,
            self.strides,
            relaxed.rest,
            self.price if price is None else price,
            first,
            ceiling + _SAME * abs(ceiling),
            width,
            _MOST_VALUES,
            self.reference,
        )

    def relaxed(self, limits: Limits, *, enough: float = np.inf) -> Relaxed:
        """A bound of S within limits, no better than `enough`, and what a search needs for them."""
        far, hop = self.far(limits), self.allowed(limits)
        bound, self.price, rest = class_core.multipliers(
            self.prefix, self.opening, hop, far, self.chain.counts, self.price, _ROUNDS, enough
        )
        return Relaxed(bound, far, hop, rest)

    def allowed(self, limits: Limits) -> Floats:
        """Weighted hand-overs; infinite where one would be slower than the limit and counts as a load."""
        if not self.objective.links:
            return self.weighted_hops
        within: Floats = np.where(self.hops <= limits[0], self.weighted_hops, np.inf)
        return within

    def _trace(self, found: Any, relaxed: Relaxed) -> Path:
        """The stages that lead to the end of a search, backwards."""
        _, _, pool, start, span, (state, c) = found
        hop, far = relaxed.hop, relaxed.far
        own = self._beginnings(hop, far)
        j, stages = len(self.chain.forward), []
        while True:
            stages.append((int(c), int(j)))
            state = state - self.strides[c]
            best, came = np.inf, (-1, 0, False)
            for last in range(len(self.chain.counts)):
                if (at := start[state, last]) >= 0:
                    a, b = span[2 * state, last], min(span[2 * state + 1, last], j - 1)
                    cuts = np.arange(a, b + 1)
                    values = pool[at : at + len(cuts)] + hop[last, c, cuts] - self.prefix[c, cuts]
                    values[far[c, cuts] < j] = np.inf
                    if len(cuts) and values.min() < best:
                        best, came = float(values.min()), (last, int(cuts[np.argmin(values)]), False)
            if (prefix := own.get(int(state))) is not None:
                last, i, value, following = prefix
                way = hop[last, c, i] if last >= 0 else 0.0
                if i < j <= far[c, i] and following != stages[-1] and value + way - self.prefix[c, i] < best:
                    came = (last, i, True)
            if came[2]:
                lead = [(int(k), int(end)) for k, end in self.reference if end <= came[1]]
                return (*lead, *reversed(stages))
            c, j = came[:2]

    def _beginnings(self, hop: Floats, far: Ints) -> dict[int, tuple[int, int, float, tuple[int, int] | None]]:
        """State -> last class (-1: none), cut, cost and following stage of each beginning of the reference."""
        if not len(self.reference):
            return {0: (-1, 0, 0.0, None)}
        state, last, cut, cost = 0, -1, 0, 0.0
        found: dict[int, tuple[int, int, float, tuple[int, int] | None]] = {}
        for c, j in self.reference.tolist():
            found[state] = (last, cut, cost, (c, j))
            if far[c, cut] < j:
                break
            cost += (hop[last, c, cut] if last >= 0 else 0.0) + self.opening[c]
            cost += self.prefix[c, j] - self.prefix[c, cut]
            state, last, cut = state + int(self.strides[c]), c, j
        return found

    def price_of(self, path: Path) -> tuple[float, float, float]:
        """S, F and B of a chain."""
        total, loads, last, i = 0.0, [0.0, 0.0], -1, 0
        for c, j in path:
            for k in (0, 1):
                loads[k] = max(loads[k], self.fixed[k, c] + (self.loads[k, c, j] - self.loads[k, c, i]))
            total += self.opening[c] + self.prefix[c, j] - self.prefix[c, i]
            if last >= 0:
                total += self.weighted_hops[last, c, i]
                if self.objective.links:
                    loads[0] = max(loads[0], self.hops[last, c, i])
            last, i = c, j
        return total, loads[0], loads[1]


def _prefix(table: Floats) -> Floats:
    """(C, L + 1) sums of an (L, C) table's layers before each cut."""
    return np.ascontiguousarray(np.vstack([np.zeros(table.shape[1]), np.cumsum(table, axis=0)]).T)
