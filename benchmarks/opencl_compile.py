"""Claim: torch.compile(backend="opencl") trains GPT blocks on PoCL in about the time of torch's CPU code.

Forward and backward of a model through torch.compile on one core of an OpenCL device, over torch eager with one thread,
both interleaved in this process.

    OMP_NUM_THREADS=1 python benchmarks/opencl_compile.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import interleaved, summary, write

import lm

DEVICE = "opencl:0.0"
CASES = {  # name: (layers, width, heads, sequence length, rows, repetitions)
    "2 blocks, 64 wide, T=64, B=4": (2, 64, 4, 64, 4, 60),
    "4 blocks, 128 wide, T=64, B=12": (4, 128, 4, 64, 12, 40),
    "1 block, 384 wide, T=256, B=8": (1, 384, 6, 256, 8, 12),
}


def measure(n_layer: int, d_model: int, n_head: int, seq_len: int, rows: int, repetitions: int) -> dict[str, object]:
    """Median times and their ratio for one model, loss and gradients of all parameters."""
    generator = torch.Generator().manual_seed(0)
    config = lm.ModelConfig(n_layer=n_layer, d_model=d_model, n_head=n_head, vocab_size=96, seq_len=seq_len)
    model = lm.Transformer(config, generator=generator)
    tokens = torch.randint(96, (rows, seq_len + 1), generator=generator)

    def step(run: torch.nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        lm.loss(run(tokens[:, :-1]), tokens[:, 1:]).backward()

    compiled = torch.compile(model, backend="opencl", options={"device": DEVICE})
    times = interleaved({"eager": lambda: step(model), "opencl": lambda: step(compiled)}, repetitions=repetitions)
    ratio = statistics.median(times["opencl"]) / statistics.median(times["eager"])
    return {"eager": summary(times["eager"]), "opencl": summary(times["opencl"]), "opencl_over_eager": ratio}


def main() -> None:
    torch.set_num_threads(1)
    cases = {}
    for name, case in CASES.items():
        cases[name] = measure(*case)
        print(f"{name}: opencl over eager {cases[name]['opencl_over_eager']:.2f}")
    print(write("opencl_compile", "OMP_NUM_THREADS=1 python benchmarks/opencl_compile.py", {"cases": cases}))


if __name__ == "__main__":
    main()
