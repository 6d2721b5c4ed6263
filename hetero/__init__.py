"""Devices, costs, plans and execution: any sequence of modules, placed on what is there.

Example:
    topology = hetero.discover(["cpu", "opencl:0.1"])
    costs = hetero.profile(model.layers(), batch, topology, n_microbatches=8, loss=loss)
    plan = hetero.plan(costs, topology, objective="train_step")
    with hetero.place(model, plan, loss=loss) as placed:
        mean = placed.step(batch)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetero import opencl as opencl
    from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
    from hetero.device import Absence, Device
    from hetero.device_catalogue import catalogue
    from hetero.discovery import discover, measure
    from hetero.errors import DeviceError, HeteroError, PlacementError, StageError
    from hetero.history import with_history
    from hetero.planner import draw, evaluate, given_plan, plan
    from hetero.planner.fleet import FleetPlan, FleetReplica, FleetStage, plan_fleet
    from hetero.planner.graph import plan_workload
    from hetero.planner.plans import Alternative, Plan, PlanStage, PlanTransfer
    from hetero.planner.sensitivity import Sensitivity, sensitivity, why
    from hetero.planner.workload import DeviceClass, Workload
    from hetero.planner.workload_plan import Placement
    from hetero.profiling import profile
    from hetero.runtime import Placed, place, place_stages
    from hetero.topology import Link, Topology
    from hetero.validation import Outcome, Prediction, Validation, validate

# Loaded when asked for: who plans a graph needn't wait for torch.
_HOMES = {
    "hetero.cost": ("Costs", "LayerCost", "LayerTime", "StageOverhead"),
    "hetero.device": ("Absence", "Device"),
    "hetero.device_catalogue": ("catalogue",),
    "hetero.discovery": ("discover", "measure"),
    "hetero.errors": ("DeviceError", "HeteroError", "PlacementError", "StageError"),
    "hetero.history": ("with_history",),
    "hetero.planner": ("draw", "evaluate", "given_plan", "plan"),
    "hetero.planner.fleet": ("FleetPlan", "FleetReplica", "FleetStage", "plan_fleet"),
    "hetero.planner.graph": ("plan_workload",),
    "hetero.planner.plans": ("Alternative", "Plan", "PlanStage", "PlanTransfer"),
    "hetero.planner.sensitivity": ("Sensitivity", "sensitivity", "why"),
    "hetero.planner.workload": ("DeviceClass", "Workload"),
    "hetero.planner.workload_plan": ("Placement",),
    "hetero.profiling": ("profile",),
    "hetero.runtime": ("Placed", "place", "place_stages"),
    "hetero.topology": ("Link", "Topology"),
    "hetero.validation": ("Outcome", "Prediction", "Validation", "validate"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Absence",
    "Alternative",
    "Costs",
    "Device",
    "DeviceClass",
    "DeviceError",
    "FleetPlan",
    "FleetReplica",
    "FleetStage",
    "HeteroError",
    "LayerCost",
    "LayerTime",
    "Link",
    "Outcome",
    "Placed",
    "Placement",
    "PlacementError",
    "Plan",
    "PlanStage",
    "PlanTransfer",
    "Prediction",
    "Sensitivity",
    "StageError",
    "StageOverhead",
    "Topology",
    "Validation",
    "Workload",
    "catalogue",
    "discover",
    "draw",
    "evaluate",
    "given_plan",
    "measure",
    "opencl",
    "place",
    "place_stages",
    "plan",
    "plan_fleet",
    "plan_workload",
    "profile",
    "sensitivity",
    "validate",
    "why",
    "with_history",
]


def __getattr__(name: str) -> Any:
    if name == "opencl":
        return importlib.import_module("hetero.opencl")
    if (home := _HOME.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
