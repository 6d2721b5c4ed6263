"""What keeps a plan from being faster, and what would relieve it, in words and by pricing again."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from hetero.errors import PlacementError
from hetero.planner.chain import solve
from hetero.planner.plans import unit
from hetero.planner.pricing import Evaluation, evaluate
from hetero.planner.words import amount

if TYPE_CHECKING:
    from hetero.cost import Costs
    from hetero.planner.problem import Problem
    from hetero.planner.solution import Solution
    from hetero.topology import Topology

_FASTER = 0.9


def binding_constraint(
    problem: Problem,
    solution: Solution,
    evaluation: Evaluation,
    costs: Costs,
    topology: Topology,
    *,
    time_limit_s: float,
) -> str:
    """The limit that a faster plan would have to relieve.

    A memory limit, where the optimum without any would be faster; otherwise the busiest core, or the slowest hand-over.
    """
    return _memory(problem, solution, evaluation, time_limit_s) or _core(problem, evaluation, costs, topology)


def _memory(problem: Problem, solution: Solution, evaluation: Evaluation, time_limit_s: float) -> str:
    total = int(problem.nbytes.max(axis=1).sum())
    if total <= min([int(problem.limits.min()), *(pool.limit for pool in problem.pools)]):
        return ""
    try:
        boundless = solve(problem.without_memory_limits(), time_limit_s=time_limit_s)
    except PlacementError:  # not found in the time given: there is one, the plan itself
        return ""
    if boundless.value >= solution.value * (1 - 1e-9):
        return ""
    filled = dict.fromkeys(range(len(problem.devices)), 0)
    for stage in evaluation.stages:
        filled[problem.devices.index(stage.device)] += stage.memory_bytes
    places = [(problem.devices[d], filled[d], int(problem.limits[d])) for d in filled if filled[d]]
    places += [(f"pool {p.name}", sum(filled[d] for d in p.members), p.limit) for p in problem.pools]
    name, used, limit = max(places, key=lambda place: place[1] / max(place[2], 1))
    return (
        f"memory: {name} is the fullest, with {used} of {limit} B; with boundless memory the best plan would take "
        f"{_amount(problem, boundless.value)} instead of {_amount(problem, solution.value)}"
    )


def _amount(problem: Problem, value: float) -> str:
    return amount(value, unit(problem.objective))


def _core(problem: Problem, evaluation: Evaluation, costs: Costs, topology: Topology) -> str:
    if problem.objective == "latency":
        slowest = max(evaluation.stages, key=lambda stage: stage.forward_s)
        return f"compute: the stage on {slowest.device} takes longest" + _relief(
            [slowest.device], evaluation, costs, topology, problem
        )
    if not evaluation.busiest:
        slowest_hop = max(evaluation.transfers, key=lambda transfer: transfer.seconds)
        return f"hand-over: {slowest_hop.source} -> {slowest_hop.target} is slower than every stage"
    crew = list(evaluation.busiest)
    what = f"{crew[0]} is the busiest device" if len(crew) == 1 else f"{' and '.join(crew)} share the busiest core"
    return f"compute: {what}" + _relief(crew, evaluation, costs, topology, problem)


def _relief(crew: list[str], evaluation: Evaluation, costs: Costs, topology: Topology, problem: Problem) -> str:
    stages = [(stage.device, stage.first, stage.last) for stage in evaluation.stages]
    again = [name for stage in evaluation.stages for name in stage.recomputed]

    def price(costs: Costs, topology: Topology) -> str:
        schedule = problem.schedule
        priced = evaluate(stages, costs, topology, problem.objective, recomputed=again, schedule=schedule)
        return _amount(problem, priced.value)

    text = f"; with its layers 10 % faster this placement would take {price(_scaled(costs, crew), topology)}"
    if len(crew) > 1:
        apart = tuple(dataclasses.replace(device, cores=()) for device in topology.devices)
        text += f", with cores of their own {price(costs, dataclasses.replace(topology, devices=apart))}"
    return text + f" instead of {_amount(problem, evaluation.value)}"


def _scaled(costs: Costs, devices: list[str]) -> Costs:
    layers = []
    for layer in costs.layers:
        times = dict(layer.times)
        for name in devices:
            if name in times:
                time = times[name]
                times[name] = dataclasses.replace(
                    time, forward_s=_FASTER * time.forward_s, backward_s=_FASTER * time.backward_s
                )
        layers.append(dataclasses.replace(layer, times=times))
    return dataclasses.replace(costs, layers=tuple(layers))
