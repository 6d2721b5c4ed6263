"""Claim: on one core, each hand-written OpenCL kernel takes no longer than torch's function.

    OMP_NUM_THREADS=1 python benchmarks/opencl_kernels.py [gemm] [rows] [attention]

Processor time of both, best and median of alternating runs. A kernel is launched many times for one wait: what it costs
inside a long queue. Ratios below 1 mean that we are faster. Of a product that packs an operand first, "without packing"
is the time when the panels are there already.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import write

from hetero.opencl import kernels as K  # noqa: N812
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.program import list_devices, open_device

if TYPE_CHECKING:
    from collections.abc import Callable

A = torch.ops.aten
# rows, width, heads, sequence length, vocabulary
SIZES = ((256, 64, 4, 64, 100), (768, 128, 4, 64, 96), (2048, 384, 6, 256, 96))
_RUNS = 15
_RUN_S = 5e-3  # of a run: some thousand times the clock's resolution


class Bench:
    """Views of tensors, and a comparison of launches with a torch function."""

    def __init__(self) -> None:
        self.device = open_device("opencl:0.1" if any(d.subindex for d in list_devices()) else "opencl:0")
        self.figures: dict[str, dict[str, float]] = {}

    def view(self, tensor: torch.Tensor) -> View:
        """The tensor as a view of a constant."""
        root = Root("constant", tensor.untyped_storage().nbytes(), tensor=_storage(tensor))
        return View(root, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def scratch(self, nbytes: int, name: str) -> View:
        """Temporary memory."""
        return self.view(torch.zeros(nbytes // 4))

    def compare(self, name: str, launches: list[Launch], reference: Callable[[], object]) -> None:
        """Print the times of both and their ratio."""
        rough = self._time(self.device.prepare(launches).enqueue, 3)
        copies = max(1, round(_RUN_S / rough))
        prepared = self.device.prepare(launches * copies)
        torch_calls = max(1, round(_RUN_S / self._time(reference, 3)))
        own, other = [], []
        for _ in range(_RUNS):
            own.append(self._time(prepared.enqueue, 1) / copies)
            other.append(self._time(reference, torch_calls))
        self.device._buffers.clear()
        best, median = min(own) / min(other), statistics.median(own) / statistics.median(other)
        self.figures[name] = {"own_s": min(own), "torch_s": min(other), "own_over_torch": best, "of_medians": median}
        times = f"{min(own) * 1e6:9.1f} us   torch {min(other) * 1e6:9.1f} us"
        print(f"{name:46s} {times}   ratio {best:.2f}   of medians {median:.2f}", flush=True)

    def _time(self, function: Callable[[], object], n: int) -> float:
        """Processor seconds of one call, the mean of n."""
        start = time.process_time()
        for _ in range(n):
            function()
        self.device.finish()
        return (time.process_time() - start) / n


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))


def gemm(bench: Bench) -> None:
    """Products of a transformer: forward, gradient of the input, gradient of the weight."""

    def one(M: int, N: int, K_: int, kind: str) -> None:
        a = torch.randn(K_, M).t() if kind == "dW" else torch.randn(M, K_)
        b = torch.randn(N, K_).t() if kind == "linear" else torch.randn(K_, N)
        out, bias = torch.empty(M, N), torch.randn(N)
        with_bias = kind == "linear"
        options = {"bias": bench.view(bias) if with_bias else None, "scratch": bench.scratch}
        local = bench.device.capabilities.local_memory_bytes
        views = (bench.view(a), bench.view(b), bench.view(out))
        launches = K.gemm(*views, local_memory_bytes=local, **options)  # type: ignore[arg-type]
        reference = (lambda: torch.addmm(bias, a, b)) if with_bias else (lambda: a @ b)
        bench.compare(f"gemm {kind} {M}x{N}x{K_}", launches, reference)
        if len(launches) > 1:
            bench.compare(f"gemm {kind} {M}x{N}x{K_} without packing", launches[1:], reference)

    one(1024, 1024, 1024, "dX")
    for rows, width, *_, vocab in SIZES:
        for n, k in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (vocab, width)):
            one(rows, n, k, "linear")
            one(rows, k, n, "dX")
            one(n, k, rows, "dW")


def rows(bench: Bench) -> None:
    """Everything that works row by row."""
    for R, C, _, _, V in SIZES:
        _rows(bench, R, C, V)


def _rows(bench: Bench, R: int, C: int, V: int) -> None:
    v = bench.view
    size = f"{R}x{C}"
    x, out, grad, dx = (torch.randn(R, C) for _ in range(4))
    w, b, dw, db = (torch.randn(C) for _ in range(4))
    mean, rstd = torch.empty(R, 1), torch.empty(R, 1)
    launches = K.layer_norm(*map(v, (x, w, b, out, mean, rstd)), width=C, eps=1e-5)
    bench.compare(f"layer_norm {size}", launches, lambda: A.native_layer_norm(x, (C,), w, b, 1e-5))
    views = map(v, (grad, x, mean, rstd, w, dx, dw, db))
    launches = K.layer_norm_backward(*views, width=C, scratch=bench.scratch)
    reference = lambda: A.native_layer_norm_backward(grad, x, (C,), mean, rstd, w, b, [True] * 3)  # noqa: E731
    bench.compare(f"layer_norm_backward {size}", launches, reference)
    wide, total = torch.randn(R, 3 * C), torch.empty(3 * C)
    launches = K.column_sum(v(wide), v(total), scratch=bench.scratch)
    bench.compare(f"column_sum {R}x{3 * C}", launches, lambda: wide.sum(0))
    token = torch.randint(0, V, (R,))
    table, dtable = torch.randn(V, C), torch.empty(V, C)
    bench.compare(f"embedding {size}", K.embedding(v(table), v(token), v(out)), lambda: A.embedding(table, token))
    launches = K.embedding_backward(v(grad), v(token), v(dtable))
    reference = lambda: A.embedding_dense_backward(grad, token, V, -1, False)  # noqa: E731
    bench.compare(f"embedding_backward {size}", launches, reference)
    _loss(bench, R, V, token)


def _loss(bench: Bench, R: int, V: int, token: torch.Tensor) -> None:
    v, size = bench.view, f"{R}x{V}"
    x, y, g, dx = (torch.randn(R, V) for _ in range(4))
    loss, weight, one = torch.empty(()), torch.ones(()), torch.ones(())
    bench.compare(f"softmax {size}", K.softmax(v(x), v(y), dim=-1), lambda: A._softmax(x, 1, False))
    bench.compare(f"log_softmax {size}", K.log_softmax(v(x), v(y), dim=-1), lambda: A._log_softmax(x, 1, False))
    launches = K.log_softmax_backward(v(g), v(y), v(dx), dim=-1)
    reference = lambda: A._log_softmax_backward_data(g, y, 1, torch.float32)  # noqa: E731
    bench.compare(f"log_softmax_backward {size}", launches, reference)
    launches = K.nll_loss(*map(v, (y, token, loss, weight)), ignore_index=-100, reduction="mean")
    bench.compare(f"nll_loss {size}", launches, lambda: A.nll_loss_forward(y, token, None, 1, -100))
    launches = K.nll_loss_backward(*map(v, (one, token, weight, dx)), ignore_index=-100, reduction="mean")
    reference = lambda: A.nll_loss_backward(one, y, token, None, 1, -100, weight)  # noqa: E731
    bench.compare(f"nll_loss_backward {size}", launches, reference)


def attention(bench: Bench) -> None:
    """Causal attention, forward and backward."""
    for R, C, H, T, _ in SIZES:
        _attention(bench, R // T, H, T, C // H)


def _attention(bench: Bench, B: int, H: int, T: int, E: int) -> None:
    v, C = bench.view, H * E
    q, k, val = (t.view(B, T, H, E).transpose(1, 2) for t in torch.randn(B, T, 3 * C).split(C, -1))
    dq, dk, dv = (t.view(B, T, H, E).transpose(1, 2) for t in torch.empty(B, T, 3 * C).split(C, -1))
    grad, out = (torch.randn(B, T, H, E).transpose(1, 2) for _ in range(2))
    lse, local = torch.empty(B, H, T), bench.device.capabilities.local_memory_bytes
    options = {"scale": E**-0.5, "is_causal": True, "local_memory_bytes": local}
    name = f"{B}x{H}x{T}x{E}"
    forward = A._scaled_dot_product_flash_attention_for_cpu
    launches = K.attention(*map(v, (q, k, val, out, lse)), **options)  # type: ignore[arg-type]
    bench.compare(f"attention {name}", launches, lambda: forward(q, k, val, 0.0, True))
    saved = forward(q, k, val, 0.0, True)
    launches = K.attention_backward(*map(v, (grad, q, k, val, *saved, dq, dk, dv)), **options)  # type: ignore[arg-type]
    backward = A._scaled_dot_product_flash_attention_for_cpu_backward
    bench.compare(f"attention_backward {name}", launches, lambda: backward(grad, q, k, val, *saved, 0.0, True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench = Bench()
    for part in sys.argv[1:] or ["gemm", "rows", "attention"]:
        {"gemm": gemm, "rows": rows, "attention": attention}[part](bench)
    command = " ".join(["OMP_NUM_THREADS=1 python benchmarks/opencl_kernels.py", *sys.argv[1:]])
    print(write("opencl_kernels", command, {"device": bench.device.name, "kernels": bench.figures}))
