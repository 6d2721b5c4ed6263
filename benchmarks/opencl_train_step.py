"""Claim: on the same cores, OpenCL trains transformers faster than torch's own CPU code, in less memory.

All sides of a row run by turns in this process with the same number of threads; a row is the ratio of their medians.

    python benchmarks/opencl_train_step.py [--device opencl:0] [--threads 1 2] [--rows NAME ...]

`block`: forward and backward of one GPT block through torch.compile, with weights that a fused AdamW changes between
the timed steps. `step`: loss, backward, clipping and AdamW by TrainStep, over eager torch with fused AdamW and over
inductor with the same. `launch-bound`: sizes at which hardly anything is computed. `replay`: what one launch costs.
`peak`: bytes of all live tensors at the worst moment of a step: ours are the plan's sum.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import interleaved, summary, write
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lm
from hetero.opencl import TrainStep
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.program import open_device

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 96
BLOCK = (1, 384, 6, 256, 8)  # layers, width, heads, sequence length, rows
STEPS = {"6x384": ((6, 384, 6, 256, 8), 6), "4x128": ((4, 128, 4, 64, 12), 25)}
SMALL = {"64 wide, T=16, B=1": (1, 64, 4, 16, 1), "128 wide, T=64, B=1": (1, 128, 4, 64, 1)}


def make(n_layer: int, d_model: int, n_head: int, seq_len: int, rows: int) -> tuple[lm.Transformer, Any, Any]:
    """A model, tokens and targets."""
    generator = torch.Generator().manual_seed(0)
    config = lm.ModelConfig(n_layer=n_layer, d_model=d_model, n_head=n_head, vocab_size=VOCABULARY, seq_len=seq_len)
    tokens = torch.randint(VOCABULARY, (rows, seq_len + 1), generator=generator)
    return lm.Transformer(config, generator=generator), tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def fused_adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)


def block(device: str) -> dict[str, Any]:
    """Forward and backward of a block; the optimizer runs between the timed steps."""
    model, _, _ = make(*BLOCK)
    units = torch.nn.ModuleList([unit for _, unit in model.layers()[1:-1]])
    _, width, _, seq_len, rows = BLOCK
    x = torch.randn(rows, seq_len, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def forward(y: torch.Tensor) -> torch.Tensor:
        for unit in units:
            y = unit(y, None)
        return y

    compiled = torch.compile(forward, backend="opencl", options={"device": device})
    optimizer = fused_adamw(units)

    def step(run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        return lambda: run(x).backward(gradient)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    sides = {"eager": step(forward), "opencl": step(compiled)}
    return ratios(interleaved(sides, repetitions=15, between=update), over=["eager"])


def whole_step(size: tuple[int, ...], repetitions: int, device: str) -> dict[str, Any]:
    """A whole step by TrainStep, eager and inductor."""
    model, tokens, targets = make(*size)
    models = {name: copy.deepcopy(model) for name in ("eager", "inductor", "opencl")}
    ours = torch.optim.AdamW(models["opencl"].parameters(), lr=1e-3)
    step = TrainStep(models["opencl"], lm.loss, ours, device=device, clip_norm=1.0)

    def torchs(module: torch.nn.Module, run: Callable[..., torch.Tensor]) -> Callable[[], None]:
        optimizer = fused_adamw(module)

        def one() -> None:
            optimizer.zero_grad(set_to_none=True)
            lm.loss(run(tokens), targets).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

        return one

    sides = {
        "eager": torchs(models["eager"], models["eager"]),
        "inductor": torchs(models["inductor"], torch.compile(models["inductor"])),
        "opencl": lambda: step(tokens, targets),
    }
    return ratios(interleaved(sides, repetitions=repetitions), over=["eager", "inductor"])


def launch_bound(size: tuple[int, ...], device: str) -> dict[str, Any]:
    """Forward and backward through torch.compile, and of TrainStep (with its optimizer) over the same eager time."""
    model, tokens, targets = make(*size)
    compiled = torch.compile(model, backend="opencl", options={"device": device})
    trained = copy.deepcopy(model)
    train_step = TrainStep(trained, lm.loss, torch.optim.AdamW(trained.parameters()), device=device)

    def step(run: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def one() -> None:
            model.zero_grad(set_to_none=True)
            lm.loss(run(tokens), targets).backward()

        return one

    sides = {"eager": step(model), "opencl": step(compiled), "train_step": lambda: train_step(tokens, targets)}
    times = interleaved(sides, repetitions=200)
    found = ratios(times, over=["eager"])
    medians = {side: statistics.median(values) for side, values in times.items()}
    return {**found, "train_step_over_eager": medians["train_step"] / medians["eager"]}


def one_token(device: str) -> dict[str, Any]:
    """Decoding one token with a cache, batch 1, 4 layers of 128."""
    model, tokens, _ = make(4, 128, 4, 64, 1)
    units = [unit for _, unit in model.layers()]
    caches = [unit.new_cache(1) for unit in units]
    token, position = tokens[:, :1], torch.tensor(5)

    def decode(x: torch.Tensor, old: list[Any], at: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        new = []
        for unit, cache in zip(units, old, strict=True):
            x, cache = unit.decode(x, cache, at)
            new.append(cache)
        return x, new

    compiled = torch.compile(decode, backend="opencl", options={"device": device})

    def run(function: Callable[..., Any]) -> Callable[[], None]:
        def one() -> None:
            with torch.no_grad():
                function(token, caches, position)

        return one

    return ratios(interleaved({"eager": run(decode), "opencl": run(compiled)}, repetitions=200), over=["eager"])


def replay(device: str) -> dict[str, Any]:
    """Seconds a launch of prepared launches that do nothing, enqueued and waited for."""
    opened = open_device(device)
    root = Root("constant", 4, tensor=torch.zeros(1))
    source = "KERNEL nothing(TENSOR_OUT(x)) { if (x_offset < 0) x_buffer[0] = 0.0f; }"
    view = View(root, 0, (1,), (1,), torch.float32)
    n = 64
    launch = Launch("nothing", "nothing", source, (view,), (1,), (1,), (view,), is_generated=True)
    prepared = opened.prepare([launch] * n)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        with opened.lock:
            prepared.enqueue()
            opened.finish()
        times.append((time.perf_counter() - start) / n)
    return {"launches": n, "seconds_a_launch": summary(times)}


class _Meter(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are alive, and the largest such sum."""

    def __init__(self, present: list[torch.Tensor]) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._count(present)

    def _count(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(pytree.tree_leaves(result))
        return result


def peak(size: tuple[int, ...], device: str) -> dict[str, Any]:
    """Bytes: weights, gradients, optimizer state, activations and everything temporary."""
    model, tokens, targets = make(*size)
    optimizer, trained = fused_adamw(model), copy.deepcopy(model)
    step = TrainStep(trained, lm.loss, torch.optim.AdamW(trained.parameters()), device=device, clip_norm=1.0)
    step(tokens, targets)
    memory = step.memory()
    assert memory is not None
    for _ in range(2):  # the first one makes the optimizer's state
        optimizer.zero_grad(set_to_none=True)
        held = [*model.parameters(), *pytree.tree_leaves([dict(s) for s in optimizer.state.values()])]
        with _Meter(held) as meter:
            loss = lm.loss(model(tokens), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        del loss
    return {"eager": meter.peak, "opencl": memory.memory_bytes, "opencl_over_eager": memory.memory_bytes / meter.peak}


def ratios(times: dict[str, list[float]], *, over: list[str]) -> dict[str, Any]:
    """Medians of all sides and the OpenCL side's ratio to others."""
    ours = statistics.median(times["opencl"])
    found = {f"opencl_over_{side}": ours / statistics.median(times[side]) for side in over}
    return {**found, **{side: summary(values) for side, values in times.items()}}


def rows(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name and measurement of each row."""
    found: dict[str, Callable[[], dict[str, Any]]] = {"block": lambda: block(device)}
    for name, (size, n) in STEPS.items():
        found[f"step {name}"] = lambda size=size, n=n: whole_step(size, n, device)  # type: ignore[misc]
        found[f"peak {name}"] = lambda size=size: peak(size, device)  # type: ignore[misc]
    for name, size in SMALL.items():
        found[f"launch-bound {name}"] = lambda size=size: launch_bound(size, device)  # type: ignore[misc]
    found["launch-bound one token"] = lambda: one_token(device)
    found["replay"] = lambda: replay(device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="opencl:0")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", default=None, help="prefixes of the rows wanted")
    arguments = parser.parse_args()
    cases: dict[str, Any] = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        device = f"{arguments.device}.0" if threads == 1 else arguments.device
        for name, measure in rows(device).items():
            if arguments.rows is None or name.startswith(tuple(arguments.rows)):
                torch._dynamo.reset()
                found = cases[f"{name}, threads={threads}"] = measure()
                shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
                print(f"{name}, threads={threads}: {shown or found}", flush=True)
    description = open_device(arguments.device).description
    figures = {"device": f"{description.description}, {description.driver}", "cases": cases}
    topic = "opencl_train_step" + ("_intel" if "Intel(R) OpenCL" in description.driver else "")
    print(write(topic, " ".join(["python", *sys.argv]), figures))


if __name__ == "__main__":
    main()
