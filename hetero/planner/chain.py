"""Exact placement of a chain: each device holds at most one interval of layers (or, if the problem says so, several).

The search of `labels` is run with growing beams. A run that dropped nothing without proof ends the matter; each run's
best value prunes the next one. Before the second run the bounds are sharpened, which small instances don't need.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.bottleneck import bottleneck
from hetero.planner.bounds import Completion, States, Weights, completion, multipliers, states
from hetero.planner.labels import Found, LabelSearch
from hetero.planner.problem import Problem, refuse_memory, refuse_short_memory
from hetero.planner.symmetry import Classes, classes

if TYPE_CHECKING:
    from collections.abc import Sequence

_BEAMS = (1_000, 10_000, 100_000, 300_000)

_MOST_DEVICES = 48  # a set of them is the bits of an integer, with room for the current one


class _NotFoundInTimeError(PlacementError):
    """No placement was found, but there may be one."""


@dataclass(frozen=True)
class Solution:
    """A placement and the proof of its quality.

    Attributes:
        stages: (device, first layer, last layer) in execution order.
        value: the objective [s].
        lower_bound: no placement of the kind searched has a smaller value [s].
        is_optimal: whether the search was complete.
        seconds: that it took.
    """

    stages: tuple[tuple[str, int, int], ...]
    value: float
    lower_bound: float
    is_optimal: bool
    seconds: float


def weights(objective: str, n_microbatches: int) -> Weights:
    """An objective as weights.

    latency is the time of one micro-batch through all stages; throughput the time from one micro-batch to the next in
    the steady state, that is the slowest core group or hand-over; train_step the GPipe step
    Σf + (m-1) max f + Σb + (m-1) max b + 2 Σc.
    """
    if objective == "latency":
        return Weights(forward=1.0, transfer=1.0)
    if objective == "throughput":
        return Weights(max_forward=1.0, links=True)
    bubbles = n_microbatches - 1.0
    return Weights(forward=1.0, backward=1.0, transfer=2.0, max_forward=bubbles, max_backward=bubbles)


def solve(problem: Problem, *, time_limit_s: float = 60.0, reference: Sequence[int] | None = None) -> Solution:
    """The best placement.

    Args:
        problem: from `problem.build`.
        time_limit_s: after it the search narrows and the result is `is_optimal=False` with an honest bound. What is
            under way is finished: a layer's labels, or one table of bounds.
        reference: a placement (device of each layer) that doesn't count: asks for the runner-up.

    Raises:
        PlacementError: there is none; the message says whether memory forbids it or the order of the layers.
    """
    if len(problem.devices) > _MOST_DEVICES:
        raise PlacementError(
            f"{len(problem.devices)} devices are too many for this solver",
            expected=f"at most {_MOST_DEVICES}",
            remedy="plan for one pipeline's devices: the others can repeat it",
        )
    start = time.monotonic()
    cases = problem.cases()
    if len(cases) == 1:
        return _solve(problem, start + time_limit_s, reference)
    objective = weights(problem.objective, problem.n_microbatches)
    found, refused = [], []
    for case in cases:
        try:
            solution = _solve(case, start + time_limit_s, reference)
        except PlacementError as error:
            refused.append(error)
        else:
            found.append(dataclasses.replace(solution, value=_price(cases, solution, objective)))
    if not found:
        raise refused[0]
    value = min(one.value for one in found)
    equal = [one for one in found if one.value <= value * (1 + 1e-12)]
    best = min(equal, key=lambda one: _price(cases, one, Weights(forward=1.0, transfer=1.0)))
    is_searched = not any(isinstance(error, _NotFoundInTimeError) for error in refused)
    lower = min(value, *(one.lower_bound for one in found)) if is_searched else 0.0
    is_optimal = is_searched and all(one.is_optimal or one.lower_bound >= value for one in found)
    seconds = time.monotonic() - start
    return dataclasses.replace(best, lower_bound=lower, is_optimal=is_optimal, seconds=seconds)


def _price(cases: Sequence[Problem], solution: Solution, weights: Weights) -> float:
    """What a placement costs, whichever case it was found in: its price in the cheapest one."""
    path = [cases[0].devices.index(device) for device, first, last in solution.stages for _ in range(first, last + 1)]
    return min(_Chain(case, np.inf)._priced(path, weights).value for case in cases)


def _solve(problem: Problem, deadline: float, reference: Sequence[int] | None) -> Solution:
    """`solve` for a problem without contention."""
    _check_hopeless(problem)
    start = time.monotonic()
    chain = _Chain(problem, deadline)
    objective = weights(problem.objective, problem.n_microbatches)
    if problem.objective == "throughput" and reference is None:
        found = chain.least_load(objective)
    else:
        found = chain.best(objective, reference=reference)
    if not found.path:
        _refuse(problem, found, chain.deadline, is_only=reference is not None and found.is_complete)
    if problem.objective == "throughput" and reference is None:
        found = chain.shortest(found, objective)
    return Solution(
        stages=stages(problem, found.path),
        value=found.value,
        lower_bound=found.lower_bound,
        is_optimal=found.is_complete,
        seconds=time.monotonic() - start,
    )


def stages(problem: Problem, path: Sequence[int]) -> tuple[tuple[str, int, int], ...]:
    """(device, first, last) of each run of equal devices in a path."""
    cuts = [0, *(i for i in range(1, len(path)) if path[i] != path[i - 1]), len(path)]
    return tuple((problem.devices[path[a]], a, b - 1) for a, b in itertools.pairwise(cuts))


class _Chain:
    """One problem with what its searches share."""

    def __init__(self, problem: Problem, deadline: float) -> None:
        self.problem, self.deadline = problem, deadline
        self.classes: Classes = classes(problem)
        self.states: States = states(problem, self.classes)

    def best(self, weights: Weights, *, reference: Sequence[int] | None = None, cap: float = np.inf) -> Found:
        """The best placement for these weights; `cap` is the largest F allowed."""
        plain = self._completion(weights)
        search = LabelSearch(self.problem, weights, self.classes, self.states, [plain])
        caps = (cap, np.inf)
        found = search.run(upper=np.inf, beam=_BEAMS[0], deadline=self.deadline, caps=caps, reference=reference)
        if found.is_complete:
            return found
        bounds, floors, paths = self._sharper(weights, plain)
        best, lower = found, max(found.lower_bound, *(bound.root for bound in bounds))
        if reference is None and cap == np.inf:
            best = min([found, *(self._priced(path, weights) for path in paths)], key=lambda found: found.value)
        search = LabelSearch(self.problem, weights, self.classes, self.states, bounds)
        for width in _BEAMS:
            found = search.run(
                upper=best.value, beam=width, deadline=self.deadline, floors=floors, caps=caps, reference=reference
            )
            lower = max(lower, found.lower_bound)
            best = found if found.value < best.value else best
            if found.is_complete or time.monotonic() > self.deadline:
                break
        lower = best.value if found.is_complete else min(lower, best.value)
        return Found(best.value, best.path, lower, found.is_complete, found.reached, found.free)

    def least_load(self, weights: Weights) -> Found:
        """The placement with the least largest forward load; `weights` is that maximum and nothing else.

        Whether any placement keeps every load within T is a much smaller search, since all loads below T are alike.
        So T is bracketed, bisected, and at last set just below the best load found, which must fail.
        """
        simple = bottleneck(self.problem, self.classes, self.states, deadline=self.deadline)
        best = self._priced(simple.path, weights)
        if best.path and best.value <= simple.floor * (1 + 1e-12):
            return Found(best.value, best.path, best.value, True, len(best.path))
        bounds = [multipliers(self.problem, weights, self.classes, self.states, deadline=self.deadline)]
        search = LabelSearch(self.problem, weights, self.classes, self.states, bounds)
        first = search.run(upper=best.value, beam=_BEAMS[0], deadline=self.deadline)
        best = first if first.path else best
        if first.is_complete:
            return Found(best.value, best.path, best.value, True, first.reached, first.free)
        low, step = max(bounds[0].root, simple.floor), 0.02
        while time.monotonic() < self.deadline:
            if not best.path:
                limit, step = low * (1 + step) or 1e-30, step * 4
            elif best.value - low > 1e-3 * best.value:
                limit = (low + best.value) / 2
            else:
                limit = best.value * (1 - 1e-13)
            found = search.within(limit, beam=_BEAMS[-1], deadline=self.deadline)
            if found.path:
                best = found
            elif not found.is_complete:
                break
            elif best.path and limit >= best.value * (1 - 1e-12):
                return Found(best.value, best.path, best.value, True, found.reached)
            elif step > 1e12:
                return found
            else:
                low = max(low, limit)
        return Found(best.value, best.path, min(low, best.value), False, best.reached)

    def shortest(self, found: Found, weights: Weights) -> Found:
        """Among the placements whose busiest core group is no busier, the one of least latency.

        Where the best one found is not the best there is, that may be a less busy one.
        """
        path = self.best(Weights(forward=1.0, transfer=1.0, links=True), cap=found.value * (1 + 1e-12)).path
        if not path:
            return found
        value = found.value if found.is_complete else self._priced(path, weights).value
        return dataclasses.replace(found, path=path, value=value, lower_bound=min(found.lower_bound, value))

    def _completion(self, weights: Weights) -> Completion:
        none = np.zeros(len(self.problem.core_groups))
        return completion(self.problem, weights, self.classes, self.states, none, none)

    def _sharper(
        self, weights: Weights, plain: Completion
    ) -> tuple[list[Completion], tuple[float, float], list[tuple[int, ...]]]:
        """Bounds with multipliers, the least F and B of any placement, and placements that have them."""
        if not (weights.max_forward or weights.max_backward):
            return [plain], (0.0, 0.0), []
        best = multipliers(self.problem, weights, self.classes, self.states, deadline=self.deadline)
        half = completion(self.problem, weights, self.classes, self.states, best.forward / 2, best.backward / 2)
        least = [
            bottleneck(self.problem, self.classes, self.states, backward=backward, deadline=self.deadline)
            for backward in (False, True)
        ]
        paths = [found.path for found in least]
        return [plain, half, best], (least[0].floor, least[1].floor), paths

    def _priced(self, path: Sequence[int], weights: Weights) -> Found:
        """A placement as the only one found, if it breaks no rule."""
        nothing = Found(np.inf, (), -np.inf, False, 0)
        if not path:
            return nothing
        only = np.full_like(self.problem.forward, np.inf)
        rows = np.arange(len(path))
        only[rows, list(path)] = self.problem.forward[rows, list(path)]
        alone = dataclasses.replace(self.problem, forward=only)
        found = LabelSearch(alone, weights, self.classes, self.states, ()).run(upper=np.inf, beam=1, deadline=np.inf)
        return found if found.path else nothing


def _check_hopeless(problem: Problem) -> None:
    """Refuse what needs no search: a layer that is left without a device, or too little memory in total."""
    for layer, times in zip(problem.layers, problem.forward, strict=True):
        if not np.isfinite(times).any():
            raise PlacementError(f"no other device can run layer {layer!r}")
    refuse_short_memory(problem)


def _refuse(problem: Problem, found: Found, deadline: float, *, is_only: bool) -> NoReturn:
    """Say why there is no placement, or none was found; the reason is looked for until the deadline."""
    if is_only:
        raise PlacementError("there is no other placement")
    if not found.is_complete:
        raise _NotFoundInTimeError("no placement was found in the time given", remedy="a larger time_limit_s")
    objective = weights(problem.objective, problem.n_microbatches)
    groups = classes(problem)
    shared = states(problem, groups)

    def attempt(of: Problem) -> Found:
        return LabelSearch(of, objective, groups, shared, ()).run(upper=np.inf, beam=100_000, deadline=deadline)

    unlimited, limited = attempt(problem.without_memory_limits()), attempt(problem)
    if not limited.is_complete or not (unlimited.path or unlimited.is_complete):
        raise _NotFoundInTimeError(
            "no placement keeps to the limits; which one forbids it was not found in the time given",
            remedy="a larger time_limit_s",
        )
    layer = problem.layers[min(limited.reached, len(problem.layers) - 1)]
    if not unlimited.path:
        layer = problem.layers[unlimited.reached]
        able = [d for d, time in zip(problem.devices, problem.forward[unlimited.reached], strict=True) if time < np.inf]
        raise PlacementError(
            f"no placement reaches layer {layer!r}: a device holds one run of consecutive layers",
            found=f"{layer!r} can run on {', '.join(able)} only, which earlier layers had to take or no link leads to",
            remedy="remove a pin, add a link, or add a device",
        )
    free = {problem.devices[d]: bytes_free for d, bytes_free in limited.free.items()}
    runs = np.isfinite(problem.forward[limited.reached])
    needed = int(problem.nbytes[limited.reached][runs].min())
    refuse_memory(layer, needed, free, after=f" after the {limited.reached} layers before it")
