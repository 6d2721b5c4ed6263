"""Plans whose devices cost something for every second of the step, at work or not: rent, or power while they wait.

With U the set of devices used, r_d what a second of the step costs for each of them and w what work costs beside that,

    value = (sum of r_d over U) T + sum of w,    T the step time by GPipe's formula

`dollars`: r_d is the price of a second, w the price of calls (of a quantum processor). `energy`: r_d is the idle power
(0 where it is not known: then the energy is that of work alone), w the work's seconds times what the power at full load
is above it. Transfers cost no energy of their own.

Once U is given, r(U) = sum of r_d is a factor, and the value is a weighted sum like that of a training step, for which
`chain` has an exact search. So the sets are tried one after the other, those of least r(U) first; devices without a
rate are in all of them. A set is left out where a bound says that it can't be better:

    value >= r(U) T0(U) + W0(U),        T0 = sum over layers of the least f + b in U, W0 likewise of w
    value >= sum over layers of the least  r_d m (f + b) + w  in U,     since T >= m (f_d + b_d) for every device d used

and all sets to come where r(U) T0(all) + W0(all) is no less than the best value, for r(U) only grows.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.bounds import Weights
from hetero.planner.refusals import check_hopeless
from hetero.planner.solution import NoneBetterError, NotFoundInTimeError, Solution
from hetero.planner.symmetry import classes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hetero.planner.problem import Problem

_ROUNDING = 1e-13


class _SolveWeighted(Protocol):
    def __call__(
        self,
        problem: Problem,
        objective: Weights,
        deadline: float,
        reference: Sequence[int] | None = None,
        upper: float = np.inf,
    ) -> Solution: ...


class _Reprice(Protocol):
    def __call__(self, problem: Problem, solution: Solution, objective: Weights) -> Solution: ...


def step_weights(n_microbatches: int, rate: float) -> Weights:
    """What a GPipe step costs at a rate [1/s]."""
    bubbles = rate * (n_microbatches - 1.0)
    return Weights(forward=rate, backward=rate, transfer=2 * rate, max_forward=bubbles, max_backward=bubbles)


def solve(
    problem: Problem,
    deadline: float,
    reference: Sequence[int] | None,
    *,
    solve_weighted: _SolveWeighted,
    reprice: _Reprice,
) -> Solution:
    """The cheapest placement.

    Args:
        problem: of objective `energy` or `dollars`.
        deadline: `time.monotonic()` after which the best one so far is given.
        reference: a placement that doesn't count.
        solve_weighted: search of the placement of least weighted sum.
        reprice: a placement's price for other weights.

    Raises:
        PlacementError: there is none.
    """
    check_hopeless(problem)
    start, m = time.monotonic(), problem.n_microbatches
    best: Solution | None = None
    refusal: PlacementError | None = None
    lower, is_complete = np.inf, True
    everyone = list(range(len(problem.devices)))
    for rate, chosen in _sets(problem):
        upper = np.inf if best is None else best.value
        least = max(rate * _least_step(problem, everyone) + _least_work(problem, everyone), 0.0)
        if least >= upper * (1 - _ROUNDING):
            break
        if time.monotonic() > deadline and best is not None:
            lower, is_complete = min(lower, least), False
            break
        bound = max(
            rate * _least_step(problem, chosen) + _least_work(problem, chosen),
            _least_work(problem, chosen, with_rates=True),
        )
        if bound >= upper * (1 - _ROUNDING):
            continue
        inside = reference is not None and set(reference) <= set(chosen)
        known = [chosen.index(d) for d in reference] if reference is not None and inside else None
        try:
            found = solve_weighted(problem.only(chosen), step_weights(m, rate), deadline, known, upper)
        except NoneBetterError as error:
            lower, is_complete = min(lower, error.lower_bound), is_complete and error.lower_bound >= upper
        except NotFoundInTimeError as error:
            refusal, lower, is_complete = error, min(lower, bound), False
        except PlacementError as error:
            refusal = error
        else:
            lower, is_complete = min(lower, found.lower_bound), is_complete and found.is_optimal
            best = found if found.value < upper else best
    if best is None:
        assert refusal is not None, "the set of all devices was tried"
        raise refusal
    used = sorted({problem.devices.index(name) for name, _, _ in best.stages})
    best = reprice(problem, best, step_weights(m, float(problem.rate[used].sum())))
    lower = best.value if is_complete else min(lower, best.value)
    return dataclasses.replace(best, lower_bound=lower, is_optimal=is_complete, seconds=time.monotonic() - start)


def _sets(problem: Problem) -> Iterator[tuple[float, list[int]]]:
    """Sets of devices and their rates, of each kind of equals the first ones, in rising order of the rate."""
    groups = classes(problem).members
    free = [d for group in groups for d in group if not problem.rate[d]]
    rated = [group for group in groups if problem.rate[group[0]]]
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,) * len(rated))]
    while heap:
        rate, counts = heapq.heappop(heap)
        chosen = sorted(free + [d for group, n in zip(rated, counts, strict=True) for d in group[:n]])
        if chosen and np.isfinite(problem.forward[:, chosen]).any(axis=1).all():
            yield rate, chosen
        last = max((k for k, n in enumerate(counts) if n), default=0)
        for k in range(last, len(rated)):  # one more of the last kind or of one after it: each set comes up once
            if counts[k] < len(rated[k]):
                more = tuple(n + (j == k) for j, n in enumerate(counts))
                total = sum(n * float(problem.rate[group[0]]) for group, n in zip(rated, more, strict=True))
                heapq.heappush(heap, (total, more))


def _least_step(problem: Problem, chosen: Sequence[int]) -> float:
    """T0: no placement on these devices has a shorter step."""
    both = problem.forward[:, chosen] + problem.backward[:, chosen]
    return float(both.min(axis=1).sum())


def _least_work(problem: Problem, chosen: Sequence[int], *, with_rates: bool = False) -> float:
    """W0: what work costs at least; with the rates of the time that it takes."""
    seconds = problem.forward[:, chosen] + problem.backward[:, chosen]
    rates = problem.busy_rate[chosen] + (problem.n_microbatches * problem.rate[chosen] if with_rates else 0.0)
    runs = np.isfinite(seconds)
    cost = np.where(runs, rates * np.where(runs, seconds, 0.0) + problem.calls[:, chosen], np.inf)
    return float(cost.min(axis=1).sum())
