"""Plans for other programs: accelerate's device map, split points of torch's pipelining, JSON with a schema.

Layer names are the paths of the layers' modules in the model, as they are in `model.layers()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hetero import cache
from hetero.errors import PlacementError

if TYPE_CHECKING:
    from pathlib import Path

    from hetero.device import Device
    from hetero.planner.plans import Plan
    from hetero.topology import Topology

FORMATS = ("accelerate", "pipelining", "json", "schema")


def device_map(plan: Plan, topology: Topology) -> dict[str, int | str]:
    """The placement for `accelerate.dispatch_model`.

    Note: accelerate keeps what is on `cpu` in host memory, but where a GPU is in the map as well, it computes there.

    Args:
        plan: of a model whose parameters all belong to its layers.
        topology: that it was made for.

    Returns:
        Path of each layer's module -> `cpu`, or the number of the CUDA device: that in its name (`cuda:1`), or for
        devices with names of another form, its place among the topology's CUDA devices.

    Raises:
        PlacementError: a device runs on something that accelerate can't address.
    """
    numbered = [device.name for device in topology.devices if device.api == "cuda"]
    places = {stage.device: _place(topology.device(stage.device), numbered) for stage in plan.stages}
    return {layer: places[stage.device] for stage in plan.stages for layer in stage.layers}


def _place(device: Device, numbered: list[str]) -> int | str:
    if device.api == "cpu":
        return "cpu"
    if device.api != "cuda":
        raise PlacementError(
            f"accelerate can't address {device.name!r}",
            found=f"a device of {device.api}",
            expected="devices of cpu and cuda",
            remedy="plan for those alone (plan.devices), or run the plan with hetero.place",
        )
    stem, _, number = device.name.partition(":")
    return int(number) if stem == "cuda" and number.isdecimal() else numbered.index(device.name)


def split_points(plan: Plan) -> dict[str, str]:
    """Where `torch.distributed.pipelining.pipeline` has to cut the model: its `split_spec` by name.

    Returns:
        Path of the first layer's module of each stage but the first -> `BEGINNING`, the name of a `SplitPoint`. Stage k
        is rank k's.
    """
    return {stage.layers[0]: "BEGINNING" for stage in plan.stages[1:]}


def plan_schema() -> dict[str, Any]:
    """The JSON schema of `Plan.to_json()`."""
    from pydantic import TypeAdapter

    from hetero.planner.plans import Plan

    schema = TypeAdapter(Plan).json_schema()
    for record in (schema, *schema["$defs"].values()):
        record["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write(kind: str, path: Path, plan: Plan, topology: Topology) -> None:
    """Write a plan to a file, whole or not at all; its folder is made.

    Args:
        kind: one of `FORMATS`.
        path: of the file.
        plan: to be written.
        topology: that it was made for.

    Raises:
        PlacementError: there is no such format, or the plan can't be put in it.
        OSError: the file can't be written.
    """
    made = {
        "accelerate": lambda: device_map(plan, topology),
        "pipelining": lambda: split_points(plan),
        "json": plan.to_json,
        "schema": plan_schema,
    }
    if kind not in made:
        raise PlacementError(f"there is no export format {kind!r}", expected=" or ".join(FORMATS))
    value = made[kind]()
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.write_json(path, value)
