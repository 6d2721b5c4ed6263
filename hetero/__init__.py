"""Devices, costs, plans and execution: any sequence of modules, placed on what is there.

Example:
    topology = hetero.discover(["cpu", "opencl:0.1"])
    costs = hetero.profile(model.layers(), batch, topology, n_microbatches=8, loss=loss)
    plan = hetero.plan(costs, topology, objective="train_step")
    with hetero.place(model, plan, loss=loss) as placed:
        mean = placed.step(batch)
"""

from hetero import opencl
from hetero.cost import Costs, LayerCost, LayerTime, StageOverhead
from hetero.device import Absence, Device
from hetero.discovery import discover, measure
from hetero.errors import DeviceError, HeteroError, PlacementError, StageError
from hetero.planner import draw, evaluate, given_plan, plan
from hetero.planner.plan import Alternative, Plan, PlanStage, PlanTransfer

# The functions take the names of their modules on purpose: `hetero.profile(...)`, `hetero.place(...)`.
from hetero.profile import profile
from hetero.runtime import Placed, place, place_stages
from hetero.topology import Link, Topology

__all__ = [
    "Absence",
    "Alternative",
    "Costs",
    "Device",
    "DeviceError",
    "HeteroError",
    "LayerCost",
    "LayerTime",
    "Link",
    "Placed",
    "PlacementError",
    "Plan",
    "PlanStage",
    "PlanTransfer",
    "StageError",
    "StageOverhead",
    "Topology",
    "discover",
    "draw",
    "evaluate",
    "given_plan",
    "measure",
    "opencl",
    "place",
    "place_stages",
    "plan",
    "profile",
]
