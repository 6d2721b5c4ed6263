"""What a training used beside time: circuits as a QPU would have to run them, and launches on devices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experiments import arms
from experiments.cost import Spent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    import hetero

Launches = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Counters:
    """Counters that only rise, read at one moment.

    Attributes:
        circuits: what a quantum processor would have had to run.
        launches: device -> operation -> number.
    """

    circuits: int = 0
    launches: Launches = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """Everything that a training used; two parts of an interrupted one add up.

    Attributes:
        spent: time, energy, memory.
        counted: what the counters rose by.
    """

    spent: Spent = field(default_factory=Spent)
    counted: Counters = field(default_factory=Counters)

    @classmethod
    def since(cls, start: Counters, now: Counters, spent: Spent) -> Usage:
        """What was used between two readings."""
        launches = {
            device: {op: n - start.launches.get(device, {}).get(op, 0) for op, n in ops.items()}
            for device, ops in now.launches.items()
        }
        risen = {device: {op: n for op, n in ops.items() if n} for device, ops in launches.items()}
        return cls(spent, Counters(now.circuits - start.circuits, risen))

    def __add__(self, other: Usage) -> Usage:
        a, b = self.counted, other.counted
        launches = add_launches(a.launches, b.launches)
        return Usage(self.spent + other.spent, Counters(a.circuits + b.circuits, launches))

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Usage:
        """The inverse of `to_json`."""
        return cls(Spent(**data["spent"]), Counters(**data["counted"]))


def add_launches(a: Mapping[str, Mapping[str, int]], b: Mapping[str, Mapping[str, int]]) -> Launches:
    """Sums by device and operation."""
    out: Launches = {device: dict(ops) for device, ops in a.items()}
    for device, ops in b.items():
        for op, n in ops.items():
            out.setdefault(device, {})[op] = out.get(device, {}).get(op, 0) + n
    return out


def counters(placed: hetero.Placed, model: nn.Module) -> Counters:
    """The counters of a placed model now."""
    layer = arms.circuit_layer(model)
    circuits = 0 if layer is None else layer.executed.circuits
    return Counters(circuits, {device: dict(ops) for device, ops in placed.launches().items()})
