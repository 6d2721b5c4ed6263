"""Which device runs which layers: problem, exact solver, independent prices, baselines and words.

Start with `plan` below. `problem.py` checks and arranges the inputs, `chain.py` solves, `evaluate.py` prices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from typing import TYPE_CHECKING

from hetero.errors import PlacementError
from hetero.planner.baselines import baselines
from hetero.planner.binding import binding_constraint
from hetero.planner.chain import Solution, solve
from hetero.planner.evaluate import Evaluation, evaluate
from hetero.planner.explain import draw, explain
from hetero.planner.plan import CHAIN, NOT_PRICED, Alternative, Plan, PlanStage, PlanTransfer
from hetero.planner.problem import Problem, build
from hetero.planner.symmetry import classes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.cost import Costs
    from hetero.topology import Topology

_ALTERNATIVES_S = 10.0

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
    n_microbatches: int | None = None,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    contiguous: bool = True,
    time_limit_s: float = 60.0,
) -> Plan:
    """The best placement of a chain of layers, with its proof and what else was priced.

    Args:
        costs: of the layers for one micro-batch, from `hetero.profile` or by hand.
        topology: devices and links; of this machine `hetero.discover(names)`, where the cpu has cores of its own.
        objective: `latency` (one micro-batch forwards through all stages), `throughput` (from one micro-batch to the
            next, forwards, in the steady state) or `train_step` (forward and backward of a whole step under GPipe).
        n_microbatches: None or `costs.n_microbatches`, for which the times were measured.
        max_memory: name of a device or memory pool -> bytes that the plan may fill there.
        pins: name of a layer -> name of the device that has to run it.
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
        n_microbatches=n_microbatches,
        max_memory=max_memory,
        pins=pins,
        contiguous=contiguous,
    )
    solution = solve(problem, time_limit_s=time_limit_s)
    seconds = time.monotonic() - start
    evaluation = evaluate(solution.stages, costs, topology, objective, max_memory=max_memory)
    assert abs(evaluation.value - solution.value) <= 1e-9 * max(solution.value, 1e-9), "solver and evaluator disagree"
    budget_s = min(time_limit_s / 2, _ALTERNATIVES_S)
    others = _alternatives(problem, solution, budget_s)
    return _assemble(
        evaluation,
        costs,
        topology,
        objective,
        lower_bound=evaluation.value if solution.is_optimal else min(solution.lower_bound, evaluation.value),
        proof="optimal" if solution.is_optimal else "bounded",
        solver=CHAIN if contiguous else "chain, several runs a device",
        seconds=seconds,
        binding=binding_constraint(problem, solution, evaluation, costs, topology, time_limit_s=budget_s),
        alternatives=(*baselines(costs, topology, objective, max_memory=max_memory, pins=pins), *others),
    )


def given_plan(
    stages: Sequence[tuple[str, int, int]],
    costs: Costs,
    topology: Topology,
    *,
    objective: str = "train_step",
    max_memory: Mapping[str, int] | None = None,
) -> Plan:
    """A placement of one's own (or an `Alternative`'s stages) as a plan, priced but not searched for.

    Args:
        stages: (device, first layer, last layer) in execution order.
        costs: as for `plan`.
        topology: as for `plan`.
        objective: as for `plan`.
        max_memory: as for `plan`.

    Raises:
        PlacementError: the placement is impossible.
    """
    evaluation = evaluate(stages, costs, topology, objective, max_memory=max_memory)
    return _assemble(
        evaluation,
        costs,
        topology,
        objective,
        lower_bound=0.0,
        proof="heuristic",
        solver="given",
        seconds=0.0,
        binding=f"not searched for; busiest: {', '.join(evaluation.busiest)}",
        alternatives=(),
    )


def _alternatives(problem: Problem, solution: Solution, budget_s: float) -> list[Alternative]:
    """The runner-up, and the best plan without each device that was used; what the time allows."""
    path = [problem.devices.index(device) for device, first, last in solution.stages for _ in range(first, last + 1)]
    deadline = time.monotonic() + budget_s
    kinds = classes(problem)
    one_of_each: dict[int, str] = {}
    for device, _, _ in solution.stages:
        one_of_each.setdefault(int(kinds.of[problem.devices.index(device)]), device)
    used = list(one_of_each.values())
    share = budget_s / (len(used) + 2)
    tries: list[tuple[str, Problem, list[int] | None]] = [("runner-up", problem, path)]
    tries += [(f"best without {device}", problem.without(device), None) for device in used]
    if problem.contiguous:
        tries.append(("several runs a device", dataclasses.replace(problem, contiguous=False), None))
    found = []
    for name, changed, reference in tries:
        if (limit := min(share, deadline - time.monotonic())) <= 0:
            found.append(Alternative(name, (), None, NOT_PRICED))
            continue
        try:
            other = solve(changed, time_limit_s=limit, reference=reference)
        except PlacementError as error:
            found.append(Alternative(name, (), None, error.message))
        else:
            note = "" if other.is_optimal else " (search not complete)"
            if not changed.contiguous and other.value > solution.value:  # the plan itself is one of those searched
                other = solution
            found.append(Alternative(name + note, other.stages, other.value))
    return found


def _assemble(
    evaluation: Evaluation,
    costs: Costs,
    topology: Topology,
    objective: str,
    *,
    lower_bound: float,
    proof: str,
    solver: str,
    seconds: float,
    binding: str,
    alternatives: tuple[Alternative, ...],
) -> Plan:
    value = evaluation.value
    inputs = {"costs": costs.to_json(), "topology": topology.to_json(), "objective": objective}
    return Plan(
        stages=evaluation.stages,
        n_microbatches=costs.n_microbatches,
        objective=objective,
        schedule="gpipe",
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
