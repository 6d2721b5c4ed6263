"""A plan: which device runs which layers, what that should cost, and how sure the planner is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetero.planner.sensitivity import Sensitivity


@dataclass(frozen=True)
class PlanStage:
    """Consecutive layers on one device; times are predicted, for one micro-batch.

    Attributes:
        device: name of the device.
        first: index of the first layer.
        last: index of the last layer, inclusive.
        layers: names of the layers.
        forward_s: [s].
        backward_s: [s].
        error: half width of the relative interval of the times.
        memory_bytes: parameters, gradients, optimizer state and activations in flight [B].
        cores: host cores that the device was priced for, and computes on when the plan is placed; none: it has none.
        saved_bytes: of `memory_bytes`, what is kept of each micro-batch in flight for its backward pass [B].
        recomputed: names of the layers that drop what they saved and are run again in their backward pass.
    """

    device: str
    first: int
    last: int
    layers: tuple[str, ...]
    forward_s: float
    backward_s: float
    error: float
    memory_bytes: int
    cores: tuple[int, ...] = ()
    saved_bytes: int = 0
    recomputed: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanTransfer:
    """Hand-over of one micro-batch's activation from a stage to the next one (and of its gradient back)."""

    source: str
    target: str
    bytes: int
    seconds: float


CHAIN = "chain"
"""Solver of plans in which a device holds one run of layers."""

SEVERAL_RUNS = "chain, several runs a device"
"""Solver of plans in which it may hold several."""

FROM_COSTS = "the errors of the layers' times"
"""Basis of an interval that no history of predictions has widened or narrowed."""

NOT_PRICED = "not priced: out of time"
"""Reason of an `Alternative` for which no time was left."""


_UNITS = {"energy": "J", "dollars": "USD"}


def unit(objective: str) -> str:
    """The unit of an objective's value, bound and interval: `s`, `J` or `USD`."""
    return _UNITS.get(objective, "s")


@dataclass(frozen=True)
class Alternative:
    """Another way to place the layers, for comparison.

    Attributes:
        name: for example `cpu alone`.
        stages: (device, first, last) of each stage; empty where there is none.
        value: predicted objective; None: not possible, or not priced.
        reason: why there is no value; empty otherwise.
        recomputed: names of the layers that are run again in their backward pass.
    """

    name: str
    stages: tuple[tuple[str, int, int], ...]
    value: float | None
    reason: str = ""
    recomputed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A placement of a chain of layers with its predicted cost and the proof of its quality.

    Attributes:
        stages: in execution order.
        n_microbatches: micro-batches of a step.
        objective: `latency`, `throughput`, `train_step`, `energy` or `dollars`.
        schedule: `gpipe`: all forward passes, then all backward passes; `1f1b`: after a warm-up in turn.
        value: the objective by its formula, in `unit(objective)`: train_step is the time of forward and backward of a
            whole step, energy and dollars are those of such a step. Under 1f1b the simulated step.
        lower_bound: no placement of the kind searched has a smaller value by that formula. It is no bound on the
            simulated or real schedule: where stages share a device or a core, that can be faster than the formula.
        gap: (value - lower_bound) / value.
        proof: `optimal` (under the formula), `bounded` or `heuristic`.
        solver: what found the plan.
        seconds: time of the search [s].
        binding_constraint: the stage or limit that a faster plan would have to relieve, in words.
        interval_s: (low, high): where the measured value is expected, from the error of the costs; in the value's unit.
        transfers: one for each pair of consecutive stages.
        alternatives: what else was priced.
        inputs_hash: SHA-256 of costs, topology and objective.
        interval_basis: what the interval rests on, in words.
    """

    stages: tuple[PlanStage, ...]
    n_microbatches: int
    objective: str
    schedule: str
    value: float
    lower_bound: float
    gap: float
    proof: str
    solver: str
    seconds: float
    binding_constraint: str
    interval_s: tuple[float, float]
    transfers: tuple[PlanTransfer, ...]
    alternatives: tuple[Alternative, ...]
    inputs_hash: str
    interval_basis: str = FROM_COSTS

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names of the layers that are run again in their backward pass."""
        return tuple(name for stage in self.stages for name in stage.recomputed)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        return cls(
            **{
                **data,
                "stages": tuple(
                    PlanStage(
                        **{
                            **stage,
                            "layers": tuple(stage["layers"]),
                            "cores": tuple(stage["cores"]),
                            "recomputed": tuple(stage.get("recomputed", ())),
                        }
                    )
                    for stage in data["stages"]
                ),
                "interval_s": (data["interval_s"][0], data["interval_s"][1]),
                "transfers": tuple(PlanTransfer(**transfer) for transfer in data["transfers"]),
                "alternatives": tuple(
                    Alternative(
                        **{
                            **other,
                            "stages": tuple((d, i, j) for d, i, j in other["stages"]),
                            "recomputed": tuple(other.get("recomputed", ())),
                        }
                    )
                    for other in data["alternatives"]
                ),
            }
        )

    def explain(self, sensitivity: Sensitivity | None = None) -> str:
        """The plan in words: value, bound, gap, proof, binding constraint and what the alternatives would cost.

        Args:
            sensitivity: of `hetero.sensitivity`: adds what one more GiB, GB/s or device would bring, and what each
                layer would cost elsewhere.
        """
        from hetero.planner.explain import explain

        return explain(self, sensitivity)
