"""What would change a plan, and by how much: each answer is the exact solution of the changed problem.

The shadow price of a memory, of a link or of a device is the best value with a little more of it minus the plan's own;
that a layer is not on another device costs the best value with the layer held there minus the plan's own. Nothing is
linearised: doubling what is added need not double the difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hetero.errors import HeteroError, PlacementError
from hetero.planner import changes
from hetero.planner.chain import solve
from hetero.planner.changes import Inputs
from hetero.planner.plans import NOT_PRICED, SEVERAL_RUNS
from hetero.planner.pricing import evaluate
from hetero.planner.solution import NotFoundInTimeError
from hetero.planner.symmetry import classes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hetero.cost import Costs
    from hetero.planner.plans import Plan
    from hetero.topology import Topology

GIB = 2**30
GB = 10**9
_ROUNDING = 1e-9
"""Differences below this part of the plan's value are zero: the solvers add the same times in another order."""


@dataclass(frozen=True)
class Answer:
    """The best plan after one change.

    Attributes:
        kind: `memory`, `link`, `device` (more of it) or `layer` (held in place).
        subject: name of the memory, link or device; of a layer, `layer=device`.
        value: predicted objective of the best plan found; None: there is none, or it was not looked for.
        change: `value` minus the plan's own, below zero where it is better; 0 for differences of rounding.
        proof: `optimal`: the plan's value and this one are the best there are; `bounded`: one of them may not be.
        lower_bound: no placement of the changed problem is better; 0 where there is no value.
        stages: (device, first, last) of each stage.
        reason: why there is no value; empty otherwise.
    """

    kind: str
    subject: str
    value: float | None
    change: float | None
    proof: str
    lower_bound: float = 0.0
    stages: tuple[tuple[str, int, int], ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """The answers to all questions about one plan.

    Attributes:
        memories: one GiB more in each memory.
        links: one GB/s more, in both directions, on each link that the plan uses.
        devices: one more device of each class of equal ones.
        layers: each layer on each class of devices that the plan doesn't give it to, by the class's first device.
        seconds: that it took.
    """

    memories: tuple[Answer, ...]
    links: tuple[Answer, ...]
    devices: tuple[Answer, ...]
    layers: tuple[Answer, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sensitivity:
        """The inverse of `to_json`."""
        answers = {
            name: tuple(
                Answer(**{**one, "stages": tuple((d, i, j) for d, i, j in one["stages"])}) for one in data[name]
            )
            for name in ("memories", "links", "devices", "layers")
        }
        return cls(**answers, seconds=data["seconds"])


def sensitivity(
    costs: Costs,
    topology: Topology,
    plan: Plan,
    *,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    colocate: Sequence[Sequence[str]] = (),
    recompute: str = "never",
    time_limit_s: float = 60.0,
) -> Sensitivity:
    """What one more GiB, GB/s or device would change, and what it costs to move each layer.

    Args:
        costs: that the plan was made from.
        topology: likewise.
        plan: of `hetero.plan` for these.
        max_memory: likewise.
        pins: likewise.
        colocate: likewise.
        recompute: likewise.
        time_limit_s: for everything; each question may take an even share of what is left when it is asked. A question
            for which no time is left is not priced.

    Raises:
        PlacementError: the plan is not one of these costs and devices.
    """
    inputs = _inputs(costs, topology, plan, max_memory, pins, colocate, recompute)
    return _Asking(inputs, plan, time_limit_s).everything()


def why(
    costs: Costs,
    topology: Topology,
    plan: Plan,
    layer: str,
    device: str,
    *,
    max_memory: Mapping[str, int] | None = None,
    pins: Mapping[str, str] | None = None,
    colocate: Sequence[Sequence[str]] = (),
    recompute: str = "never",
    time_limit_s: float = 60.0,
) -> Answer:
    """Why a layer is not on a device: what the best plan with it there costs, or what forbids it.

    Args:
        costs: as for `sensitivity`.
        topology: likewise.
        plan: likewise.
        layer: its name.
        device: likewise.
        max_memory: as for `sensitivity`.
        pins: likewise.
        colocate: likewise.
        recompute: likewise.
        time_limit_s: for the search.

    Raises:
        PlacementError: there is no such layer or device, or the plan is not one of these costs and devices.
    """
    names = [one.name for one in costs.layers]
    if layer not in names:
        raise PlacementError(f"layer {layer!r} does not exist", found=", ".join(names))
    topology.device(device)
    inputs = _inputs(costs, topology, plan, max_memory, pins, colocate, recompute)
    return _Asking(inputs, plan, time_limit_s).held(layer, device, time_limit_s)


def _inputs(
    costs: Costs,
    topology: Topology,
    plan: Plan,
    max_memory: Mapping[str, int] | None,
    pins: Mapping[str, str] | None,
    colocate: Sequence[Sequence[str]],
    recompute: str,
) -> Inputs:
    return Inputs(
        costs,
        topology,
        plan.objective,
        plan.schedule,
        max_memory or {},
        pins or {},
        colocate,
        recompute,
        contiguous=plan.solver != SEVERAL_RUNS,
    )


class _Asking:
    """The questions about one plan, and the clock."""

    def __init__(self, inputs: Inputs, plan: Plan, time_limit_s: float) -> None:
        self.start = time.monotonic()
        self.deadline = self.start + time_limit_s
        self.inputs, self.plan = inputs, plan
        self.stages = tuple((stage.device, stage.first, stage.last) for stage in plan.stages)
        self._is_memory_free: bool | None = None
        priced = self._price(inputs)
        if abs(priced - plan.value) > _ROUNDING * priced:
            raise PlacementError(
                "the plan was made from other costs, devices or limits",
                found=f"its value is {plan.value}; with these it would be {priced}",
            )

    def _price(self, inputs: Inputs) -> float:
        """The value of the plan's own placement with other inputs."""
        return evaluate(
            self.stages,
            inputs.costs,
            inputs.topology,
            inputs.objective,
            max_memory=inputs.max_memory,
            recomputed=self.plan.recomputed,
            schedule=inputs.schedule,
        ).value

    def everything(self) -> Sensitivity:
        inputs, problem = self.inputs, self.inputs.problem()
        groups = [tuple(problem.devices[d] for d in group) for group in classes(problem).members]
        kinds = {name: group for group in groups for name in group}
        on = {layer: stage.device for stage in self.plan.stages for layer in stage.layers}
        questions: list[tuple[str, Callable[[float], Answer]]] = []
        for place in changes.memories(inputs.topology, inputs.max_memory):
            questions.append(("memory", partial(self._more_memory, place)))
        for name, (source, target) in self._links().items():
            change = partial(changes.with_bandwidth, inputs, source, target, GB)
            questions.append(("link", partial(self._relaxed, "link", name, change)))
        for group in groups:
            change = partial(changes.with_twin, inputs, group[0], group)
            questions.append(("device", partial(self._relaxed, "device", group[0], change)))
        for layer in problem.layers:
            elsewhere = [group[0] for group in groups if group != kinds[on[layer]]]
            questions += [("layer", partial(self.held, layer, device)) for device in elsewhere]
        found: dict[str, list[Answer]] = {"memory": [], "link": [], "device": [], "layer": []}
        for k, (kind, ask) in enumerate(questions):
            found[kind].append(ask((self.deadline - time.monotonic()) / (len(questions) - k)))
        memories, links, devices, layers = map(tuple, found.values())
        return Sensitivity(memories, links, devices, layers, time.monotonic() - self.start)

    def _links(self) -> dict[str, tuple[str, str]]:
        """The links that the plan uses: name -> two devices that it joins."""
        used: dict[str, tuple[str, str]] = {}
        for hop in self.plan.transfers:
            if hop.source != hop.target and (name := changes.link_between(self.inputs, hop.source, hop.target)):
                used.setdefault(name, (hop.source, hop.target))
        return used

    def _more_memory(self, place: str, limit: float) -> Answer:
        if self._needs_no_memory(limit / 2):
            proof = self._proof(is_proven=True)
            return Answer("memory", place, self.plan.value, 0.0, proof, self.plan.lower_bound, self.stages)
        return self._relaxed("memory", place, partial(changes.with_memory, self.inputs, place, GIB), limit / 2)

    def _needs_no_memory(self, limit: float) -> bool:
        """Whether boundless memory makes nothing faster, so that no memory needs a search of its own."""
        if self._is_memory_free is None and limit > 0:
            self._is_memory_free = False
            with contextlib.suppress(PlacementError):  # none was found in the time given
                boundless = solve(self.inputs.problem().without_memory_limits(), time_limit_s=limit)
                self._is_memory_free = self._change(boundless.lower_bound) >= 0
        return bool(self._is_memory_free)

    def held(self, layer: str, device: str, limit: float) -> Answer:
        """The answer for a layer held on a device."""
        subject, inputs = f"{layer}={device}", self.inputs
        if any(stage.device == device and layer in stage.layers for stage in self.plan.stages):
            same = (self.plan.value, 0.0, self._proof(is_proven=True))
            return Answer("layer", subject, *same, self.plan.lower_bound, self.stages)
        if forbidden := _forbidden(inputs, layer, device):
            return Answer("layer", subject, None, None, "optimal", reason=forbidden)
        return self._answer("layer", subject, changes.with_pin(inputs, layer, device), limit)

    def _relaxed(self, kind: str, subject: str, change: Callable[[], Inputs], limit: float) -> Answer:
        """The answer to a change that leaves the plan possible: it can't be worse than the plan itself is then."""
        changed = change()
        found = self._answer(kind, subject, changed, limit)
        value = self._price(changed)
        if found.reason == NOT_PRICED or (found.value is not None and found.value <= value):
            return found
        return dataclasses.replace(found, value=value, change=self._change(value), stages=self.stages)

    def _answer(self, kind: str, subject: str, changed: Inputs, limit: float) -> Answer:
        if limit <= 0:
            return Answer(kind, subject, None, None, "bounded", reason=NOT_PRICED)
        try:
            solution = changed.solve(limit)
        except HeteroError as error:
            is_proven = not isinstance(error, NotFoundInTimeError)
            reason = _words(error) if is_proven else NOT_PRICED
            return Answer(kind, subject, None, None, "optimal" if is_proven else "bounded", reason=reason)
        proof = self._proof(is_proven=solution.is_optimal)
        bound = min(solution.lower_bound, solution.value)
        return Answer(kind, subject, solution.value, self._change(solution.value), proof, bound, solution.stages)

    def _change(self, value: float) -> float:
        change = value - self.plan.value
        return 0.0 if abs(change) <= _ROUNDING * self.plan.value else change

    def _proof(self, *, is_proven: bool) -> str:
        return "optimal" if is_proven and self.plan.proof == "optimal" else "bounded"


def _forbidden(inputs: Inputs, layer: str, device: str) -> str:
    """What forbids a layer on a device whatever the rest of the plan; empty: nothing."""
    if inputs.pins.get(layer, device) != device:
        return f"the layer is pinned to {inputs.pins[layer]}"
    cost = next(one for one in inputs.costs.layers if one.name == layer)
    api = inputs.topology.device(device).api
    if cost.apis is not None and api not in cost.apis:
        return f"{device} can't run it: it needs {' or '.join(cost.apis)}"
    if device not in cost.times:
        return f"{device} can't run it: the costs have no time of it there"
    try:
        changes.with_pin(inputs, layer, device).problem()
    except HeteroError as error:
        return _words(error)
    return ""


def _words(error: HeteroError) -> str:
    """An error in one line, without its remedy."""
    parts = (error.message, error.expected and f"needed: {error.expected}", error.found and f"found: {error.found}")
    return " ".join("; ".join(part for part in parts if part).split())
