"""Which device runs which layers: problem, exact solver, independent prices, baselines and words.

Start with `plan` below. `problem.py` checks and arranges the inputs, `chain.py` solves, `pricing.py` prices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from typing import TYPE_CHECKING

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.baselines import baselines
from hetero.planner.binding import binding_constraint
from hetero.planner.chain import solve
from hetero.planner.explain import draw, explain
from hetero.planner.plans import CHAIN, NOT_PRICED, SEVERAL_RUNS, Alternative, Plan, PlanStage, PlanTransfer
from hetero.planner.pricing import Evaluation, evaluate
from hetero.planner.problem import Problem, build, colocated
from hetero.planner.solution import NoneBetterError, Solution
from hetero.planner.symmetry import classes
from hetero.schedule import GPIPE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs
    from hetero.topology import Topology

_ALTERNATIVES_S = 10.0
_INCOMPLETE = " (search not complete)"
_MARGIN = 1e-9  # far above rounding

__all__ = [
    "Alternative",
    "Evaluation",
    "Plan",
    "PlanStage",
    "PlanTransfer",
    "draw",
    "evaluate",
    "explain",
    "given_plan",
    "plan",
]


def plan(
    costs: Costs,
    topology: Topology,
    *,
    objective: str = "train_step",
    schedule: str = "gpipe",
    n_microbatches: int | None = None,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    colocate: Sequence[Sequence[str]] = (),
    recompute: str = "never",
    contiguous: bool = True,
    time_limit_s: float = 60.0,
) -> Plan:
    """The best placement of a chain of layers, with its proof and what else was priced.

    Args:
        costs: of the layers for one micro-batch, from `hetero.profile` or by hand.
        topology: devices and links; of this machine `hetero.discover(names)`, where the cpu has cores of its own.
        objective: `latency` (one micro-batch forwards through all stages), `throughput` (from one micro-batch to the
            next, forwards, in the steady state; hand-overs that share a medium add up), `train_step` (forward and
            backward of a whole step), `energy` [J] or `dollars` [USD] of a GPipe step: see `hetero.planner.rated`.
        schedule: `gpipe`, or `1f1b` for `train_step`: less memory, since a stage holds only as many micro-batches as
            there are stages from it on; priced by simulation, for stages no more than micro-batches.
        n_microbatches: None or `costs.n_microbatches`, for which the times were measured.
        max_memory: name of a device or memory pool -> bytes that the plan may fill there.
        pins: name of a layer -> name of the device that has to run it.
        colocate: groups of names of layers that have to be on one device, for example with tied weights. If contiguous,
            everything between them is there as well.
        recompute: `never`, or `allowed`: a layer may drop what it saved for its backward pass and run again then, on
            devices whose runtime can do that, where memory would forbid a better plan.
        contiguous: whether a device holds one run of consecutive layers at most. If not, its stages' loads add up, and
            the value is the formula's of a device that takes each micro-batch through all its stages in one go.
        time_limit_s: for the search; after it the best plan so far is given, with `proof` `bounded`. The alternatives
            and the binding constraint may each take half as long again, but no more than about ten seconds; an
            alternative for which no time is left is not priced.

    Returns:
        A plan whose value is the formula's in `hetero.planner.chain.weights`, priced by `evaluate`.

    Raises:
        PlacementError: the request makes no sense or no plan keeps to the limits; the message says which and why.
    """
    start = time.monotonic()
    problem = build(
        costs,
        topology,
        objective=objective,
        schedule=schedule,
        n_microbatches=n_microbatches,
        max_memory=max_memory,
        pins=pins,
        colocate=colocate,
        recompute=recompute,
        contiguous=contiguous,
    )
    solution = solve(problem, time_limit_s=time_limit_s)
    seconds = time.monotonic() - start
    again = [problem.layers[i] for i in solution.recomputed]
    evaluation = evaluate(
        solution.stages, costs, topology, objective, max_memory=max_memory, recomputed=again, schedule=schedule
    )
    assert abs(evaluation.value - solution.value) <= 1e-9 * max(solution.value, 1e-9), "solver and evaluator disagree"
    together = colocated(costs, colocate, contiguous=contiguous)
    budget_s = min(time_limit_s / 2, _ALTERNATIVES_S)
    others = _alternatives(problem, solution, budget_s)
    return _assemble(
        evaluation,
        costs,
        topology,
        objective,
        schedule,
        lower_bound=evaluation.value if solution.is_optimal else min(solution.lower_bound, evaluation.value),
        proof="optimal" if solution.is_optimal else "bounded",
        solver=_solver(problem),
        seconds=seconds,
        binding=binding_constraint(problem, solution, evaluation, costs, topology, time_limit_s=budget_s),
        alternatives=(
            *baselines(
                costs, topology, objective, max_memory=max_memory, pins=pins, together=together, schedule=schedule
            ),
            *others,
        ),
    )


def _solver(problem: Problem) -> str:
    if problem.schedule != GPIPE:
        return "chain, simulated in the order of a bound"
    return CHAIN if problem.contiguous else SEVERAL_RUNS


def given_plan(
    stages: Sequence[tuple[str, int, int]],
    costs: Costs,
    topology: Topology,
    *,
    objective: str = "train_step",
    schedule: str = "gpipe",
    max_memory: Mapping[str, int] | None = None,
    recomputed: Sequence[str] = (),
) -> Plan:
    """A placement of one's own (or an `Alternative`'s stages) as a plan, priced but not searched for.

    Args:
        stages: (device, first layer, last layer) in execution order.
        costs: as for `plan`.
        topology: as for `plan`.
        objective: as for `plan`.
        schedule: as for `plan`.
        max_memory: as for `plan`.
        recomputed: names of the layers that are run again in their backward pass.

    Raises:
        PlacementError: the placement is impossible.
    """
    evaluation = evaluate(
        stages, costs, topology, objective, max_memory=max_memory, recomputed=recomputed, schedule=schedule
    )
    return _assemble(
        evaluation,
        costs,
        topology,
        objective,
        schedule,
        lower_bound=0.0,
        proof="heuristic",
        solver="given",
        seconds=0.0,
        binding=f"not searched for; busiest: {', '.join(evaluation.busiest)}",
        alternatives=(),
    )


def _alternatives(problem: Problem, solution: Solution, budget_s: float) -> list[Alternative]:
    """The runner-up, and the best plan without each device that was used; what the time allows."""
    path = solution.path(problem)
    deadline = time.monotonic() + budget_s
    kinds = classes(problem)
    one_of_each: dict[int, str] = {}
    for device, _, _ in solution.stages:
        one_of_each.setdefault(int(kinds.of[problem.devices.index(device)]), device)
    used = list(one_of_each.values())
    share = budget_s / (len(used) + 2)
    tries: list[tuple[str, Problem, list[int] | None]] = [("runner-up", problem, path)]
    tries += [(f"best without {device}", problem.without(device), None) for device in used]
    if problem.contiguous and problem.schedule == GPIPE:
        tries.append(("several runs a device", dataclasses.replace(problem, contiguous=False), None))
    found = []
    for name, changed, reference in tries:
        if (limit := min(share, deadline - time.monotonic())) <= 0:
            found.append(Alternative(name, (), None, NOT_PRICED))
            continue
        try:
            upper = solution.value * (1 + _MARGIN) if changed.contiguous != problem.contiguous else np.inf
            other = solve(changed, time_limit_s=limit, reference=reference, upper=upper)
        except NoneBetterError:  # not found in the time given: the plan itself is one of those searched
            found.append(Alternative(name + _INCOMPLETE, solution.stages, solution.value))
        except PlacementError as error:
            found.append(Alternative(name, (), None, error.message))
        else:
            note = "" if other.is_optimal else _INCOMPLETE
            if not changed.contiguous and other.value > solution.value:  # the plan itself is one of those searched
                other = solution
            again = tuple(problem.layers[i] for i in other.recomputed)
            found.append(Alternative(name + note, other.stages, other.value, recomputed=again))
    return found


def _assemble(
    evaluation: Evaluation,
    costs: Costs,
    topology: Topology,
    objective: str,
    schedule: str,
    *,
    lower_bound: float,
    proof: str,
    solver: str,
    seconds: float,
    binding: str,
    alternatives: tuple[Alternative, ...],
) -> Plan:
    value = evaluation.value
    inputs = {"costs": costs.to_json(), "topology": topology.to_json(), "objective": objective, "schedule": schedule}
    return Plan(
        stages=evaluation.stages,
        n_microbatches=costs.n_microbatches,
        objective=objective,
        schedule=schedule,
        value=value,
        lower_bound=lower_bound,
        gap=(value - lower_bound) / value if value else 0.0,
        proof=proof,
        solver=solver,
        seconds=seconds,
        binding_constraint=binding,
        interval_s=evaluation.interval_s,
        transfers=evaluation.transfers,
        alternatives=alternatives,
        inputs_hash=hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
    )
