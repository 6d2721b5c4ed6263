"""Plans of 1F1B steps: a true lower bound that can be searched for exactly, and the simulator as the price.

Stage s of S has f_s, b_s; a hand-over takes c; m micro-batches, and k_s = min(m, S - s) of them in flight at stage s.
Let A = sum of all f + b + 2 c, the way of one micro-batch through the idle pipeline and back, and R_s the part of it
behind stage s: sum of f_i + b_i over i > s, and 2 c of the hand-overs after s. The device of stage s does k_s forward
passes, then one backward and one forward pass in turn, then the other backward passes. So

- its first forward pass starts no earlier than a micro-batch can arrive, its last backward pass is followed by the way
  back, and between them lie 2 m passes:                           T >= A - R_s + (m - 1)(f_s + b_s)
- its first backward pass starts no earlier than the first micro-batch returns, R_s after its forward pass, and behind
  it m - k_s forward passes and m - 1 backward passes remain:      T >= A + (m - 1) b_s + (m - k_s) f_s
- before the forward pass of the last micro-batch there are m - 1 forward and m - k_s backward passes; it returns after
  R_s:                                                             T >= A + (m - 1) f_s + (m - k_s) b_s

Devices that share cores only take longer. The greatest of these 3 S bounds is  A + max over the stages of a load, what
the label search minimises; from the last stage on, k_s is the number of stages placed. For the last stage (k = 1) the
bound is A + (m - 1)(f + b), which equal stages attain. In general the step takes longer, so placements are simulated in
the order of their bounds, until the bound of the next one is no less than the best simulated step. That needs all
placements below it, the dominated ones as well; where they are too many, the plan has a gap.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from hetero.planner.bottleneck import bottleneck
from hetero.planner.bounds import Weights, completion, multipliers, states
from hetero.planner.labels import Found, LabelSearch
from hetero.planner.refusals import check_hopeless, refuse
from hetero.planner.solution import Solution, fits, stages
from hetero.planner.symmetry import classes
from hetero.schedule import step_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.problem import Floats, Problem

WEIGHTS = Weights(forward=1.0, backward=1.0, transfer=2.0, max_forward=1.0)
"""A plus the largest load, of which a stage has three: see `labels`."""

_BEAMS = (1_000, 10_000, 100_000)
_ROUNDING = 1e-12


def solve(problem: Problem, deadline: float, reference: Sequence[int] | None) -> Solution:
    """The placement of least simulated step time, or the best one found and how far from it that may be.

    Args:
        problem: of schedule `1f1b`.
        deadline: `time.monotonic()` after which the best one so far is given.
        reference: a placement (device of each layer) that doesn't count.

    Raises:
        PlacementError: there is none.
    """
    check_hopeless(problem)
    start = time.monotonic()
    best = _Best(problem, None if reference is None else tuple(reference))
    cases = [_Case(case.reversed(), deadline) for case in problem.cases()]
    for case in cases:
        case.start(best)
    if not best.path:
        found = next((case.found for case in cases if not case.found.is_complete), cases[0].found)
        refuse(problem.reversed(), found, deadline, is_only=reference is not None and found.is_complete)
    best.polish(deadline)
    for case in cases:
        case.finish(best)
    lower = min(case.lower for case in cases)
    is_optimal = lower >= best.value * (1 - _ROUNDING)
    return Solution(
        stages=stages(problem, best.path),
        value=best.value,
        lower_bound=best.value if is_optimal else lower,
        is_optimal=is_optimal,
        seconds=time.monotonic() - start,
        recomputed=tuple(np.flatnonzero(best.recomputed).tolist()),
    )


def lower_bound(forward: Floats, backward: Floats, transfers: Floats, n_microbatches: int) -> float:
    """The greatest of the bounds above for stages with a device each [s]; what the label search minimises.

    Args:
        forward: (S,) of one micro-batch in each stage [s].
        backward: (S,) likewise.
        transfers: (S - 1,) of a hand-over [s].
        n_microbatches: of the step.
    """
    m, n = n_microbatches, len(forward)
    held = np.minimum(m, n - np.arange(n))
    way = forward + backward + 2 * np.append(transfers, 0.0)
    behind = np.append(np.cumsum(way[::-1])[::-1], 0.0)[:-1] - forward - backward
    loads = [
        (m - 1) * (forward + backward) - behind,
        (m - 1) * backward + (m - held) * forward,
        (m - 1) * forward + (m - held) * backward,
    ]
    return float(way.sum() + np.max(loads))


class _Best:
    """The best placement simulated so far; layers in execution order."""

    def __init__(self, problem: Problem, reference: tuple[int, ...] | None) -> None:
        self.problem, self.reference = problem, reference
        self.value = np.inf
        self.path: tuple[int, ...] = ()
        self.recomputed: tuple[bool, ...] = ()
        groups = [group for group in problem.core_groups if len(group) > 1]
        devices = range(len(problem.devices))
        self.cores = [tuple(k for k, group in enumerate(groups) if d in group) for d in devices]

    def consider(self, backwards: Sequence[int], recomputed: Sequence[bool]) -> None:
        """Simulate a placement, given from the last layer on."""
        path, again = tuple(backwards[::-1]), tuple(recomputed[::-1])
        if path != self.reference and (value := self._step_s(path, again)) < self.value:
            self.value, self.path, self.recomputed = value, path, again

    def polish(self, deadline: float) -> None:
        """Move the ends of stages by one layer as long as that helps: what is simulated first prunes the search."""
        before = np.inf
        while self.value < before and time.monotonic() < deadline:
            before = self.value
            for i in [i for i in range(1, len(self.path)) if self.path[i] != self.path[i - 1]]:
                path = self.path  # both moves start from this one: after each other they could tear a stage in two
                for at, device in ((i, path[i - 1]), (i - 1, path[i])):
                    moved = (*path[:at], device, *path[at + 1 :])
                    if self._is_allowed(moved):
                        self.consider(moved[::-1], self.recomputed[::-1])

    def _is_allowed(self, path: tuple[int, ...]) -> bool:
        """Whether a placement keeps to all rules, if it has the devices of one that does, in the same order."""
        p, rows = self.problem, range(len(path))
        return (
            all(np.isfinite(p.forward[i, path[i]]) for i in rows)
            and all(path[i] == path[i - 1] or not p.joined[i] for i in rows[1:])
            and all(p.kept[i, path[i]] < p.saved[i, path[i]] for i in rows if self.recomputed[i])
            and all(np.isfinite(p.latency[path[i - 1], path[i]]) for i in rows[1:])
            and fits(p, path, self.recomputed)
        )

    def _step_s(self, path: tuple[int, ...], again: tuple[bool, ...]) -> float:
        p = self.problem
        is_contended = sum(any(d in crew for d in path) for crew in p.crews) > 1
        slower = p.contention if is_contended else np.ones_like(p.contention)
        devices = list(dict.fromkeys(path))
        times = p.overhead[devices] * slower[devices]
        for i, d in enumerate(path):
            f, b = p.forward[i, d] * slower[d, 0], p.backward[i, d] * slower[d, 1]
            times[devices.index(d)] += f, b + (f if again[i] else 0.0)
        hops = [p.transfer(i - 1)[path[i - 1], path[i]] for i in range(1, len(path)) if path[i] != path[i - 1]]
        cores = [self.cores[d] for d in devices]
        return step_time(times[:, 0], times[:, 1], np.array(hops, float), p.n_microbatches, cores=cores)


class _Case:
    """The searches of one problem without contention, from its last layer on.

    Attributes:
        lower: no placement of it has a shorter step.
        found: by the first search.
    """

    def __init__(self, problem: Problem, deadline: float) -> None:
        self.problem, self.deadline = problem, deadline
        self.lower = 0.0
        self.classes = classes(problem)
        self.states = states(problem, self.classes)
        self.relaxed, self.weights = _relaxed(problem)
        none = np.zeros(len(problem.devices))
        self.plain = completion(self.relaxed, self.weights, self.classes, self.states, none, none)
        self.search = LabelSearch(problem, WEIGHTS, self.classes, self.states, [self.plain])

    def start(self, best: _Best) -> None:
        """Simulate the placement of least bound, as far as a narrow search finds it."""
        reference = None if best.reference is None else best.reference[::-1]
        self.found: Found = self.search.run(upper=np.inf, beam=_BEAMS[0], deadline=self.deadline, reference=reference)
        self.lower = self.found.lower_bound if self.found.path or not self.found.is_complete else np.inf
        if self.found.path:
            best.consider(self.found.path, self.found.recomputed)

    def finish(self, best: _Best) -> None:
        """Simulate whatever may be better, in wider and wider searches."""
        if self.lower >= best.value * (1 - _ROUNDING):
            return
        sharp = multipliers(self.relaxed, self.weights, self.classes, self.states, deadline=self.deadline)
        floor = bottleneck(self.relaxed, self.classes, self.states, deadline=self.deadline).floor
        self.search = LabelSearch(self.problem, WEIGHTS, self.classes, self.states, [self.plain, sharp])
        if not self.found.is_complete:
            found = self.search.run(upper=best.value, beam=_BEAMS[-1], deadline=self.deadline, floors=(floor, 0.0))
            self.lower = max(self.lower, found.lower_bound)
            if found.path:
                best.consider(found.path, found.recomputed)
        for beam in _BEAMS:
            if self.lower >= best.value * (1 - _ROUNDING) or time.monotonic() > self.deadline:
                return
            missing, found_all = self.search.every(upper=best.value, beam=beam, deadline=self.deadline)
            for value, path, recomputed in found_all:
                if value >= best.value * (1 - _ROUNDING):
                    break
                if time.monotonic() > self.deadline:
                    missing = min(missing, value)
                    break
                best.consider(path, recomputed)
            self.lower = max(self.lower, min(missing, best.value))


def _relaxed(problem: Problem) -> tuple[Problem, Weights]:
    """A problem with GPipe's kind of objective that is nowhere dearer: A + max of (m-1) b + (m-K) f.

    K is the most micro-batches that any stage holds. Its bounds hold for 1F1B's loads; shared cores are left out.
    """
    m, n_devices = problem.n_microbatches, len(problem.devices)
    rest = m - min(m, n_devices)
    runs = np.isfinite(problem.forward)
    f, b = np.where(runs, problem.forward, 0.0), np.where(runs, problem.backward, 0.0)
    opening_f, opening_b = problem.overhead.T
    relaxed = dataclasses.replace(
        problem,
        forward=np.where(runs, (m - 1) * b + rest * f, np.inf),
        backward=np.where(runs, f + b, np.inf),
        overhead=np.column_stack([(m - 1) * opening_b + rest * opening_f, opening_f + opening_b]),
        core_groups=tuple((d,) for d in range(n_devices)),
    )
    return relaxed, Weights(backward=1.0, transfer=2.0, max_forward=1.0)
