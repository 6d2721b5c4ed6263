"""A graph of operators to be placed on classes of devices, checked: what every graph solver reads.

Model of cost and file format: Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators",
NeurIPS 2020, section 3. A device is charged for the outputs that cross its boundary, each once, whichever way they go
and however many nodes read them; the host's processors, which own the memory in which all outputs meet, pay nothing.
"""

from __future__ import annotations

import graphlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hetero.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ACCELERATOR, CPU = "acc", "cpu"
_MOST_DEVICES = 1_000_000  # of a class: each gets a name


@dataclass(frozen=True)
class DeviceClass:
    """Devices that are alike.

    Attributes:
        name: `acc` and `cpu` in the file format.
        count: how many there are.
        memory_bytes: of each [B]; `inf`: boundless.
    """

    name: str
    count: int
    memory_bytes: float = math.inf


@dataclass(frozen=True)
class Workload:
    """N operators, E edges between them, and C classes of devices.

    Attributes:
        ids: the operators' names, as their file has them.
        times: (N, C) time of an operator on a device of a class, in the file's unit; infinite: it can't run there.
        transfers: (N, C) time for which moving an operator's output across the boundary occupies a device of a class.
        nbytes: (N,) memory that an operator fills [B].
        edges: (E, 2) source and target index; acyclic, no two alike, none from an operator to itself.
        is_backward: (N,) operators of the backward pass: contiguity is not asked of them.
        colours: (N,) operators of one colour belong on one device.
        classes: of devices.
    """

    ids: tuple[Any, ...]
    times: Floats
    transfers: Floats
    nbytes: Floats
    edges: Ints
    is_backward: NDArray[np.bool_]
    colours: Ints
    classes: tuple[DeviceClass, ...]

    def __post_init__(self) -> None:
        n, n_classes = len(self.ids), len(self.classes)
        _check_names(self.ids)
        for name, shape in (("times", (n, n_classes)), ("transfers", (n, n_classes)), ("nbytes", (n,))):
            values = getattr(self, name)
            if values.shape != shape:
                raise PlacementError(f"{name} of the workload have shape {values.shape}", expected=str(shape))
            wrong = np.isnan(values) | (values < 0) | (np.isinf(values) if name != "times" else False)
            if wrong.any():
                at = tuple(int(i) for i in np.argwhere(wrong)[0])
                raise PlacementError(
                    f"operator {self.ids[at[0]]!r}: {name} is {values[at]}", expected="a finite number, not negative"
                )
        if unrunnable := np.flatnonzero(
            ~np.isfinite(self.times[:, [c.count > 0 for c in self.classes]]).any(axis=1)
        ).tolist():
            raise PlacementError(
                f"operator {self.ids[unrunnable[0]]!r} can run on no device",
                found=", ".join(f"{c.count} {c.name}" for c in self.classes),
                remedy="add a device of a class that supports it",
            )
        _check_acyclic(self.ids, self.edges)

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of all devices, `class:index`, class by class."""
        return tuple(f"{c.name}:{k}" for c in self.classes for k in range(c.count))

    @property
    def class_of(self) -> tuple[int, ...]:
        """Index of each device's class."""
        return tuple(c for c, kind in enumerate(self.classes) for _ in range(kind.count))

    @classmethod
    def from_file(cls, path: str | Path) -> Workload:
        """A workload in the JSON format of msr-fiddle/dnn-partitioning.

        Raises:
            PlacementError: the file is missing or wrong; the message names file and operator.
        """
        from pathlib import Path

        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlacementError(f"can't read the workload {path}", found=error.strerror or str(error)) from None
        except ValueError as error:
            raise PlacementError(f"{path}: not JSON", found=str(error)) from None
        try:
            return cls.from_json(data)
        except PlacementError as error:
            raise PlacementError(
                f"{path}: {error.message}", found=error.found, expected=error.expected, remedy=error.remedy
            ) from None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Workload:
        """As `from_file`, from its parsed content.

        Raises:
            PlacementError: a field is missing or wrong.
        """
        n_accelerators, n_cpus = (_count(data, key) for key in ("maxFPGAs", "maxCPUs"))
        memory = _figure(data, "maxSizePerFPGA", "the workload")
        nodes, edges = (_objects(data, key) for key in ("nodes", "edges"))
        ids = tuple(_id(node, "id", f"node {k}") for k, node in enumerate(nodes))
        _check_names(ids)
        names = [f"node {name!r}" for name in ids]
        index = {name: k for k, name in enumerate(ids)}
        times = np.array(
            [[_time(node, name), _figure(node, "cpuLatency", name)] for node, name in zip(nodes, names, strict=True)]
        )
        pairs, costs = _edges(edges, index)
        transfers = np.zeros((len(ids), 2))
        transfers[list(costs), 0] = list(costs.values())
        fresh = Counter(str(node["colorClass"]) for node in nodes if node.get("colorClass") is not None)
        colours = {name: k for k, name in enumerate(fresh)}
        return cls(
            ids=ids,
            times=times.reshape(-1, 2),
            transfers=transfers,
            nbytes=np.array(
                [_figure(node, "size", name, default=0.0) for node, name in zip(nodes, names, strict=True)]
            ),
            edges=pairs,
            is_backward=np.array(
                [_flag(node, "isBackwardNode", name, default=False) for node, name in zip(nodes, names, strict=True)],
                bool,
            ),
            colours=np.array(
                [
                    colours[str(node["colorClass"])] if node.get("colorClass") is not None else len(colours) + k
                    for k, node in enumerate(nodes)
                ],
                np.int64,
            ),
            classes=(DeviceClass(ACCELERATOR, n_accelerators, memory), DeviceClass(CPU, n_cpus)),
        )


def _check_names(ids: Sequence[Any]) -> None:
    if not ids:
        raise PlacementError("the workload has no operators")
    if twice := [name for name, n in Counter(map(str, ids)).items() if n > 1]:
        raise PlacementError(f"two operators have the id {twice[0]}", expected="ids that differ, as text too")


def _check_acyclic(ids: Sequence[Any], edges: Ints) -> None:
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for source, target in edges.tolist():
        sorter.add(target, source)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(str(ids[k]) for k in reversed(error.args[1]))
        raise PlacementError("the graph has a cycle", found=cycle, expected="a directed acyclic graph") from None


def _edges(edges: Sequence[Mapping[str, Any]], index: Mapping[Any, int]) -> tuple[Ints, dict[int, float]]:
    """Pairs of indices without repetitions, and the transfer time of each source's output."""
    pairs: dict[tuple[int, int], None] = {}
    costs: dict[int, float] = {}
    for k, edge in enumerate(edges):
        ends = []
        for key in ("sourceId", "destId"):
            name = _id(edge, key, f"edge {k}")
            if name not in index:
                raise PlacementError(f"edge {k}: {key} {name!r} is no node's id")
            ends.append(index[name])
        source, target = ends
        cost = _figure(edge, "cost", f"edge {k}")
        if not math.isclose(costs.setdefault(source, cost), cost, rel_tol=1e-6):
            raise PlacementError(
                f"edge {k}: node {edge['sourceId']!r} has edges of cost {costs[source]} and {cost}",
                expected="one cost for all edges out of a node: that of moving its output",
            )
        pairs[source, target] = None
    return np.array(list(pairs), np.int64).reshape(-1, 2), costs


def _objects(data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = _field(data, key, "the workload")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise PlacementError(f"the workload: {key} is no list of objects")
    return found


def _field(data: Mapping[str, Any], key: str, where: str) -> Any:
    if not isinstance(data, dict) or key not in data:
        raise PlacementError(f"{where} has no {key}", expected="the format of msr-fiddle/dnn-partitioning")
    return data[key]


def _id(data: Mapping[str, Any], key: str, where: str) -> int | str:
    name = _field(data, key, where)
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise PlacementError(f"{where}: {key} is {name!r}", expected="a whole number or a string")
    return name


def _figure(data: Mapping[str, Any], key: str, where: str, *, default: float | None = None) -> float:
    value = data.get(key, default) if default is not None else _field(data, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise PlacementError(f"{where}: {key} is {value!r}", expected="a finite number, not negative")
    return float(value)


def _count(data: Mapping[str, Any], key: str) -> int:
    value = _figure(data, key, "the workload")
    if value != int(value):
        raise PlacementError(f"the workload: {key} is {value}", expected="a whole number")
    if value > _MOST_DEVICES:
        raise PlacementError(f"the workload: {key} is {value:.0f}", expected=f"at most {_MOST_DEVICES}")
    return int(value)


def _flag(data: Mapping[str, Any], key: str, where: str, *, default: bool | None = None) -> bool:
    value = data.get(key) if default is not None else _field(data, key, where)
    value = default if value is None else value
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise PlacementError(f"{where}: {key} is {value!r}", expected="true, false, 1 or 0")
    return bool(value)


def _time(node: Mapping[str, Any], where: str) -> float:
    """On an accelerator; infinite where it isn't supported."""
    return _figure(node, "fpgaLatency", where) if _flag(node, "supportedOnFpga", where) else math.inf
