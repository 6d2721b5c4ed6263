"""Exact placement of a chain: each device holds at most one interval of layers (or, if the problem says so, several).

The search of `labels` is run with growing beams. A run that dropped nothing without proof ends the matter; each run's
best value prunes the next one. Before the second run the bounds are sharpened, which small instances don't need.
`rated` makes many such searches, one for each set of devices; `one_f_one_b` uses one as a bound.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import PlacementError
from hetero.planner import one_f_one_b, rated
from hetero.planner.bottleneck import bottleneck
from hetero.planner.bounds import Completion, States, Weights, completion, multipliers, states
from hetero.planner.labels import Found, LabelSearch
from hetero.planner.refusals import check_hopeless, refuse
from hetero.planner.solution import NoneBetterError, NotFoundInTimeError, Solution, stages, store_what_fits
from hetero.planner.symmetry import Classes, classes
from hetero.schedule import GPIPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.problem import Problem

_BEAMS = (1_000, 10_000, 100_000, 300_000)

_MANY_PAIRS = 500  # of a layer and a device: more are for `class_chain`, where only the classes of devices matter
_MOST_DEVICES = 48  # a set of them is the bits of an integer, with room for the current one


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
    return rated.step_weights(n_microbatches, 1.0)


def solve(
    problem: Problem,
    *,
    time_limit_s: float = 60.0,
    reference: Sequence[int] | None = None,
    upper: float = np.inf,
) -> Solution:
    """The best placement.

    Args:
        problem: from `problem.build`.
        time_limit_s: after it the search narrows and the result is `is_optimal=False` with an honest bound. What is
            under way is finished: a layer's labels, or one table of bounds.
        reference: a placement (device of each layer) that doesn't count: asks for the runner-up.
        upper: a value above that of a placement which is known, to search less.

    Raises:
        PlacementError: there is none; the message says whether memory forbids it or the order of the layers.
    """
    if len(problem.devices) * len(problem.layers) > _MANY_PAIRS:
        from hetero.planner import class_chain  # loads compiled code, which small problems don't need

        if class_chain.applies(problem):
            return class_chain.solve(problem, time_limit_s=time_limit_s, reference=reference)
    if len(problem.devices) > _MOST_DEVICES:
        raise PlacementError(
            f"{len(problem.devices)} devices are too many for this solver",
            expected=f"at most {_MOST_DEVICES}",
            remedy="plan for one pipeline's devices: the others can repeat it",
        )
    deadline = time.monotonic() + time_limit_s
    if problem.schedule != GPIPE:
        return one_f_one_b.solve(problem, deadline, reference)
    if problem.objective in ("energy", "dollars"):
        return rated.solve(problem, deadline, reference, solve_weighted=solve_weighted, reprice=reprice)
    return solve_weighted(problem, weights(problem.objective, problem.n_microbatches), deadline, reference, upper)


def solve_weighted(
    problem: Problem,
    objective: Weights,
    deadline: float,
    reference: Sequence[int] | None = None,
    upper: float = np.inf,
) -> Solution:
    """The placement of least weighted sum, if one is below `upper`.

    Raises:
        PlacementError: as `solve`; a `NoneBetterError` where `upper` is finite and nothing was found below it.
    """
    start = time.monotonic()
    cases = problem.cases()
    if len(cases) == 1:
        return _solve(problem, objective, deadline, reference, upper)
    found, refused = [], []
    for case in cases:
        try:
            solution = _solve(case, objective, deadline, reference, upper)
        except PlacementError as error:
            refused.append(error)
        else:
            found.append(reprice(problem, solution, objective))
    if not found:
        raise refused[0]
    value = min(one.value for one in found)
    equal = [one for one in found if one.value <= value * (1 + 1e-12)]
    best = min(equal, key=lambda one: reprice(problem, one, Weights(forward=1.0, transfer=1.0)).value)
    is_searched = not any(isinstance(error, NotFoundInTimeError) for error in refused)
    lower = min(value, *(one.lower_bound for one in found)) if is_searched else 0.0
    is_optimal = is_searched and all(one.is_optimal or one.lower_bound >= value for one in found)
    seconds = time.monotonic() - start
    return dataclasses.replace(best, lower_bound=lower, is_optimal=is_optimal, seconds=seconds)


def reprice(problem: Problem, solution: Solution, objective: Weights) -> Solution:
    """A placement at its least price for these weights, whichever layers were recomputed and however it was found."""
    path = solution.path(problem)
    priced = [_Chain(case, np.inf).priced(path, objective) for case in problem.cases()]
    best = min(priced, key=lambda one: one.value)
    return dataclasses.replace(solution, value=best.value, recomputed=tuple(np.flatnonzero(best.recomputed).tolist()))


def _solve(
    problem: Problem, objective: Weights, deadline: float, reference: Sequence[int] | None, upper: float
) -> Solution:
    """`solve_weighted` for a problem without contention."""
    check_hopeless(problem)
    start = time.monotonic()
    chain = _Chain(problem, deadline)
    is_bottleneck = objective.links and reference is None
    found = chain.least_load(objective) if is_bottleneck else chain.best(objective, reference=reference, upper=upper)
    if not found.path:
        if upper < np.inf:
            raise NoneBetterError("no placement is better", lower_bound=found.lower_bound)
        refuse(problem, found, chain.deadline, is_only=reference is not None and found.is_complete)
    if is_bottleneck:
        found = chain.shortest(found, objective)
    recomputed = found.recomputed
    if not (objective.backward or objective.max_backward or problem.busy_rate.any()):
        recomputed = store_what_fits(problem, found.path, recomputed)
    return Solution(
        stages=stages(problem, found.path),
        value=found.value,
        lower_bound=found.lower_bound,
        is_optimal=found.is_complete,
        seconds=time.monotonic() - start,
        recomputed=tuple(np.flatnonzero(recomputed).tolist()),
    )


class _Chain:
    """One problem with what its searches share."""

    def __init__(self, problem: Problem, deadline: float) -> None:
        self.problem, self.deadline = problem, deadline
        self.classes: Classes = classes(problem)
        self.states: States = states(problem, self.classes)

    def best(
        self,
        weights: Weights,
        *,
        reference: Sequence[int] | None = None,
        cap: float = np.inf,
        upper: float = np.inf,
    ) -> Found:
        """The best placement for these weights that is below `upper`; `cap` is the largest F allowed."""
        plain = self._completion(weights)
        search = LabelSearch(self.problem, weights, self.classes, self.states, [plain])
        caps = (cap, np.inf)
        found = search.run(upper=upper, beam=_BEAMS[0], deadline=self.deadline, caps=caps, reference=reference)
        if found.is_complete:
            return found
        bounds, floors, paths = self._sharper(weights, plain)
        best, lower = found, max(found.lower_bound, *(bound.root for bound in bounds))
        if reference is None and cap == np.inf:
            best = min([found, *(self.priced(path, weights) for path in paths)], key=lambda found: found.value)
        search = LabelSearch(self.problem, weights, self.classes, self.states, bounds)
        for width in _BEAMS:
            found = search.run(
                upper=min(upper, best.value),
                beam=width,
                deadline=self.deadline,
                floors=floors,
                caps=caps,
                reference=reference,
            )
            lower = max(lower, found.lower_bound)
            best = found if found.value < best.value else best
            if found.is_complete or time.monotonic() > self.deadline:
                break
        lower = min(upper, best.value) if found.is_complete else min(lower, best.value)
        return dataclasses.replace(
            best, lower_bound=lower, is_complete=found.is_complete, reached=found.reached, free=found.free
        )

    def least_load(self, weights: Weights) -> Found:
        """The placement with the least largest forward load; `weights` is that maximum and nothing else.

        Whether any placement keeps every load within T is a much smaller search, since all loads below T are alike.
        So T is bracketed, bisected, and at last set just below the best load found, which must fail.
        """
        simple = bottleneck(self.problem, self.classes, self.states, deadline=self.deadline)
        best = self.priced(simple.path, weights)
        if best.path and best.value <= simple.floor * (1 + 1e-12):
            return dataclasses.replace(best, lower_bound=best.value, is_complete=True)
        bounds = [multipliers(self.problem, weights, self.classes, self.states, deadline=self.deadline)]
        search = LabelSearch(self.problem, weights, self.classes, self.states, bounds)
        first = search.run(upper=best.value, beam=_BEAMS[0], deadline=self.deadline)
        best = first if first.path else best
        if first.is_complete:
            return dataclasses.replace(
                best, lower_bound=best.value, is_complete=True, reached=first.reached, free=first.free
            )
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
                return dataclasses.replace(best, lower_bound=best.value, is_complete=True)
            elif step > 1e12:
                return found
            else:
                low = max(low, limit)
        return dataclasses.replace(best, lower_bound=min(low, best.value), is_complete=False)

    def shortest(self, found: Found, weights: Weights) -> Found:
        """Among the placements whose busiest core group is no busier, the one of least latency.

        Where the best one found is not the best there is, that may be a less busy one.
        """
        short = self.best(Weights(forward=1.0, transfer=1.0, links=True), cap=found.value * (1 + 1e-12))
        if not short.path:
            return found
        value = found.value if found.is_complete else self.priced(short.path, weights).value
        lower = min(found.lower_bound, value)
        return dataclasses.replace(found, path=short.path, recomputed=short.recomputed, value=value, lower_bound=lower)

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

    def priced(self, path: Sequence[int], weights: Weights) -> Found:
        """A placement as the only one found, if it breaks no rule."""
        nothing = Found(np.inf, (), -np.inf, False, 0)
        if not path:
            return nothing
        only = np.full_like(self.problem.forward, np.inf)
        rows = np.arange(len(path))
        only[rows, list(path)] = self.problem.forward[rows, list(path)]
        alone = dataclasses.replace(self.problem, forward=only)
        beam = _BEAMS[-1] if alone.can_recompute else 1
        found = LabelSearch(alone, weights, self.classes, self.states, ()).run(upper=np.inf, beam=beam, deadline=np.inf)
        return found if found.path else nothing
