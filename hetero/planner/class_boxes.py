"""The best chain over device classes under any objective: the least sum below limits on the largest loads.

An objective is  S + w_f F + w_b B  (`Weights`): S a sum over stages and hand-overs, F and B the largest forward and
backward load of a stage. `Sums` gives the least S within limits (F_1, B_1). What is left is a search over the two
limits, by boxes  F_0 <= F <= F_1,  B_0 <= B <= B_1,  in which the objective is at least

    S_min(F_1, B_1) + w_f F_0 + w_b B_0 .

S_min is first bounded by prices of devices, which costs microseconds; only boxes that this leaves open are searched. A
placement found there with loads F', B' is the best of all in the box with F >= F', B >= B', so that two smaller boxes
are left. The proof is in float64: two values within 1e-12 of each other are equal.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero.planner.bounds import Weights
from hetero.planner.class_sums import Least, Limits, Path, Sums

if TYPE_CHECKING:
    from hetero.planner.class_problem import ClassChain

_SAME = 1e-12
_FINE = 1e-4  # of the value: narrower boxes are always searched
_STRETCHES = (1.02, 1.1, 1.3, np.inf)
_COARSE = 1e-3


@dataclass(frozen=True)
class ClassPlan:
    """The best chain found (none: an empty path), a lower bound, and whether nothing better can exist."""

    value: float
    lower_bound: float
    path: Path
    is_complete: bool


def best(chain: ClassChain, objective: Weights, *, deadline: float, reference: Path = ()) -> ClassPlan:
    """The best chain.

    Args:
        chain: the problem.
        objective: its weights.
        deadline: `time.monotonic()` after which no further search is begun.
        reference: a chain that doesn't count.
    """
    has_sum = bool(objective.forward or objective.backward or objective.transfer)
    factors = (objective.max_forward, objective.max_backward)
    sums = Sums(chain, objective, reference=reference)
    if factors == (0.0, 0.0):
        found = sums.least((np.inf, np.inf))
        value = _value(sums, factors, found.path)
        return ClassPlan(
            value, value if found.is_certain else min(found.lower_bound, value), found.path, found.is_certain
        )
    if has_sum or all(factors):
        return _Boxes(sums, factors, deadline).run()
    return _least_load(chain, objective, deadline, reference)


def _value(sums: Sums, factors: tuple[float, float], path: Path) -> float:
    """The objective of a chain; infinite without one."""
    if not path:
        return np.inf
    total, forward, backward = sums.price_of(path)
    return total + factors[0] * forward + factors[1] * backward


def _least_load(chain: ClassChain, objective: Weights, deadline: float, reference: Path) -> ClassPlan:
    """The chain with the least largest load of one kind, and of those the one of least latency."""
    kind = 0 if objective.max_forward else 1
    factor = max(objective.max_forward, objective.max_backward)
    sums = Sums(chain, Weights(forward=1.0, transfer=1.0, links=objective.links), reference=reference)

    def within(limit: float) -> Least:
        return sums.any((limit, np.inf) if kind == 0 else (np.inf, limit))

    low, high = sums.floor(kind)
    if not np.isfinite(low):
        return ClassPlan(np.inf, np.inf, (), True)
    found, is_certain = within(high), True
    if not found.path:
        found, high = within(np.inf), np.inf
        if not found.path:
            return ClassPlan(np.inf, np.inf if found.is_certain else factor * low, (), found.is_certain)
        high, step = sums.price_of(found.path)[1 + kind], 0.01
        while high > low * (1 + _SAME) and high > 1e-300:
            if time.monotonic() > deadline:
                is_certain = False
                break
            middle = min(low * (1 + step) or high / 2, (low + high) / 2)
            attempt = within(middle)
            if attempt.path:
                found, high = attempt, min(middle, sums.price_of(attempt.path)[1 + kind])
            elif attempt.is_certain:
                low, step = middle, 4 * step
            else:
                is_certain = False
                break
    shortest = sums.least((high, np.inf) if kind == 0 else (np.inf, high))
    path = shortest.path or found.path
    value = factor * sums.price_of(path)[1 + kind]
    return ClassPlan(value, value if is_certain else factor * low, path, is_certain)


@dataclass(frozen=True, order=True)
class _Box:
    """Limits of F and B, with bounds of all placements within: of the objective, and of its sum part S.

    `least_sum` holds for the loads up to `high`, whether or not they reach `low`.
    """

    bound: float
    least_sum: float
    low: Limits
    high: Limits


class _Boxes:
    """Branch and bound over the limits of F and B, the box with the least bound first."""

    def __init__(self, sums: Sums, factors: tuple[float, float], deadline: float) -> None:
        self.sums, self.factors, self.deadline = sums, factors, deadline
        self.path: Path = ()
        self.value, self.uncertain = np.inf, np.inf
        self.deepest = np.inf

    def run(self) -> ClassPlan:
        low = (self.sums.floor(0, precision=_COARSE)[0], self.sums.floor(1, precision=_COARSE)[0])
        high = self.sums.largest()
        if not all(map(np.isfinite, low)):
            return ClassPlan(np.inf, np.inf, (), True)
        low, high = self._weighed(low, 0.0), self._weighed(high, np.inf)
        for stretch in _STRETCHES:
            limits = (min(low[0] * stretch, high[0]), min(low[1] * stretch, high[1]))
            self._take(self.sums.least(self._weighed(limits, np.inf), below=self.value - self._weight(low)).path)
        boxes = [_Box(self._weight(low), 0.0, low, high)]
        while boxes and boxes[0].bound < self.value * (1 - _SAME):
            if time.monotonic() > self.deadline:
                self.uncertain = min(self.uncertain, boxes[0].bound)
                break
            for part in self._inspect(heapq.heappop(boxes)):
                heapq.heappush(boxes, part)
        is_complete = self.uncertain >= self.value * (1 - _SAME)
        return ClassPlan(self.value, self.value if is_complete else self.uncertain, self.path, is_complete)

    def _take(self, path: Path) -> None:
        value = _value(self.sums, self.factors, path)
        if value < self.value:
            self.path, self.value = path, value

    def _inspect(self, box: _Box) -> list[_Box]:
        """The boxes that are left of one.

        A box whose bound at its upper corner exceeds the value may be done with once it is halved. Where the bound is
        loose, though, it falls below the value in a whole region, and halving along the rim of that would never end;
        so boxes are searched once they are small beside the deepest that the bound has been seen below the value.
        """
        enough = self.value - self._weight(box.low)
        least = max(box.least_sum, self.sums.relaxed(box.high, enough=enough).bound)
        width = self._weight(box.high) - self._weight(box.low)
        bound = least + self._weight(box.low)
        if bound >= self.value * (1 - _SAME):
            return []
        self.deepest = min(self.deepest, bound + width)
        if bound + width >= self.value and width > max(_FINE * self.value, (self.value - self.deepest) / 4):
            return self._halves(dataclasses.replace(box, bound=bound, least_sum=least))
        found = self.sums.least(box.high, below=enough)
        if not found.is_certain:
            self.uncertain = min(self.uncertain, bound)
        self._take(found.path)
        return self._rest(box, found) if found.path and found.is_certain else []

    def _rest(self, box: _Box, found: Least) -> list[_Box]:
        """What can be better than the chain of least sum in a box: a smaller F, or as large a one and a smaller B."""
        total, *loads = self.sums.price_of(found.path)
        forward, backward = (load * (1 - 2 * _SAME) for load in loads)
        parts = []
        if self.factors[0] and forward > box.low[0]:
            parts.append(_Box(total + self._weight(box.low), total, box.low, (forward, box.high[1])))
        if self.factors[1] and backward > box.low[1]:
            low = (max(loads[0], box.low[0]) if self.factors[0] else 0.0, box.low[1])
            parts.append(_Box(total + self._weight(low), total, low, (box.high[0], backward)))
        return parts

    def _halves(self, box: _Box) -> list[_Box]:
        """A box cut in the middle of its (by weight) longer side."""
        sides = [f * (high - low) if f else 0.0 for f, high, low in zip(self.factors, box.high, box.low, strict=True)]
        k = int(sides[1] > sides[0])
        middle = (box.low[k] + box.high[k]) / 2
        high = (middle, box.high[1]) if k == 0 else (box.high[0], middle)
        low = (middle, box.low[1]) if k == 0 else (box.low[0], middle)
        above = box.least_sum + self._weight(low)
        return [dataclasses.replace(box, high=high), dataclasses.replace(box, low=low, bound=above)]

    def _weighed(self, loads: Limits, otherwise: float) -> Limits:
        """Loads, with another value for those that the objective does not weigh."""
        return (loads[0] if self.factors[0] else otherwise, loads[1] if self.factors[1] else otherwise)

    def _weight(self, loads: Limits) -> float:
        """w_f F + w_b B."""
        return sum(factor * load for factor, load in zip(self.factors, loads, strict=True) if factor)
