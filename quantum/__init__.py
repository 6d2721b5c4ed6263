"""Quantum layers on Qiskit Aer through PennyLane: exact and sampled gradients, costs as hardware would have them.

Names are loaded when first used, so that asking whether Aer is here (`quantum.placement`) imports neither PennyLane
nor Qiskit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantum.errors import QuantumError

if TYPE_CHECKING:
    from quantum.aer import AerDevice as AerDevice
    from quantum.bottleneck import Bottleneck as Bottleneck
    from quantum.bottleneck import TanhMLP as TanhMLP
    from quantum.layer import QuantumLayer as QuantumLayer
    from quantum.layer import check_circuit as check_circuit
    from quantum.resources import count as count
    from quantum.resources import qpu_cost as qpu_cost
    from quantum.resources import totals as totals
    from quantum.state import operation_counts as operation_counts

_HOMES = {
    "AerDevice": "aer",
    "Bottleneck": "bottleneck",
    "QuantumLayer": "layer",
    "TanhMLP": "bottleneck",
    "check_circuit": "layer",
    "count": "resources",
    "operation_counts": "state",
    "qpu_cost": "resources",
    "totals": "resources",
}

__all__ = ["QuantumError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantum' has no attribute '{name}'")
    return getattr(importlib.import_module(f"quantum.{_HOMES[name]}"), name)
