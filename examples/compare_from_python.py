"""An experiment from Python: the same keys as in YAML, the same folder, the same figures.

    python examples/compare_from_python.py

Trains a small transformer and its hybrid with a 3-qubit circuit on the CPU and Aer; about a minute.
"""

from __future__ import annotations

import experiments


def main() -> None:
    """Run two arms with two seeds and print what came out."""
    result = experiments.run(
        {
            "name": "from-python",
            "seeds": [0, 1],
            "arms": ["baseline", "hybrid"],
            "model": {"n_layer": 1, "d_model": 32, "n_head": 2, "seq_len": 32},
            "quantum": {"unit": "block0.mlp", "n_qubits": 3},
            "train": {"steps": 100, "batch_size": 8, "learning_rate": 1e-2, "eval_every": 50},
            "plan": {"devices": ["cpu", "aer"], "n_microbatches": 2},
        }
    )
    for arm, content in result.summary["arms"].items():
        loss, cost = content["mean"]["test_loss"], content["cost"]
        print(f"{arm:<9} test loss {loss:.4f} nat/token, {cost['wall_s']:.1f} s, {cost['circuits']} circuits")
    print(result.summary["verdict"])
    print(f"report: {result.out / 'report.html'}")


if __name__ == "__main__":
    main()
