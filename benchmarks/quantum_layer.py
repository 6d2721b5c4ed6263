"""Claim: a circuit inside a language model costs milliseconds a batch on Aer, not seconds a sample.

Forward and backward (inputs and weights) of a quantum layer, two circuit layers, by simulator, interleaved in one
process with one thread.

    OMP_NUM_THREADS=1 python benchmarks/quantum_layer.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import interleaved, summary, write

import quantum

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = [(4, 128), (4, 512), (8, 64)]  # qubits, rows
SIMULATORS = ("aer", "torch", "default.qubit")


def step(layer: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        inputs = x.clone().requires_grad_()
        (layer(inputs) * upstream).sum().backward()

    return run


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    cases = {}
    for n_qubits, rows in CASES:
        x, upstream = (torch.randn(rows, n_qubits, dtype=torch.float64, generator=generator) for _ in range(2))
        layers = {name: quantum.QuantumLayer(n_qubits, 2, simulator=name, seed=0) for name in SIMULATORS}
        times = interleaved({name: step(layer, x, upstream) for name, layer in layers.items()}, repetitions=20)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {f"{name}_over_aer": medians[name] / medians["aer"] for name in SIMULATORS[1:]}
        cases[f"{n_qubits} qubits, {rows} rows"] = {name: summary(values) for name, values in times.items()} | ratios
        print(f"{n_qubits} qubits, {rows} rows: aer {1e3 * medians['aer']:.1f} ms;", ratios)
    print(write("quantum_layer", "OMP_NUM_THREADS=1 python benchmarks/quantum_layer.py", {"cases": cases}))


if __name__ == "__main__":
    main()
