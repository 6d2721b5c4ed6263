"""Whole models by the kernels of GPU-type devices, on a device that passes for a GPU: gradients against float64.

With shared memory and with copies, as a discrete GPU needs them. Nothing falls back, every hot operation is launched
from the file that is for GPUs.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import lm
from hetero.opencl import compile_module, fallbacks
from hetero.opencl.errors import NoOpenCLError
from hetero.opencl.program import Device, PreparedLaunches, list_devices, open_variant
from tests.numerics.test_compile_units import FACTOR, FLOOR, distance, gradients

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hetero.opencl.ir import Launch

LIMITS = {"kind": "gpu", "max_work_group_size": 256, "local_memory_bytes": 32 << 10}


@pytest.fixture(params=["shared", "discrete"])
def gpu(request: pytest.FixtureRequest) -> Device:
    try:
        return open_variant("opencl:0", f"gpu-{request.param}", shares_host_memory=request.param == "shared", **LIMITS)
    except NoOpenCLError as error:
        pytest.skip(f"no OpenCL here: {error.remedy}")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """(file or `generated`, kernel) of everything that is prepared."""
    seen: set[tuple[str, str]] = set()
    original = PreparedLaunches.__init__

    def record(self: PreparedLaunches, device: Device, launches: Sequence[Launch]) -> None:
        seen.update(("generated" if one.is_generated else one.source, one.kernel) for one in launches)
        original(self, device, launches)

    monkeypatch.setattr(PreparedLaunches, "__init__", record)
    return seen


def check(device: Device, module: nn.Module, inputs: list[Tensor], context: dict[str, Tensor] | None = None) -> None:
    extra = [context] if context else []
    seed = torch.randn(module(*inputs, *extra).shape, generator=torch.Generator().manual_seed(7))
    double = copy.deepcopy(module).double()
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    exact = gradients(double, lambda *x: double(*x, *extra), wide, seed)
    eager = gradients(module, lambda *x: module(*x, *extra), inputs, seed)
    compiled = compile_module(module, device.name)
    ours = gradients(module, lambda *x: compiled(*x, *extra), inputs, seed)
    for a, b in zip(distance(ours, exact), distance(eager, exact), strict=True):
        assert a <= FACTOR * b + FLOOR
    assert fallbacks(compiled) == []


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = lm.ModelConfig(family="gpt", n_layer=2, d_model=32, n_head=2, vocab_size=13, seq_len=40)
        self.model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens: Tensor, context: dict[str, Tensor]) -> Tensor:
        return lm.loss(self.model(tokens, context), context["targets"])


def test_a_gpt_with_its_loss_has_the_gradients_of_float64(gpu: Device, launched: set[tuple[str, str]]) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(0, 13, (3, 37), generator=generator) for _ in range(2))
    targets[0, :5] = -100
    before, moved = gpu.counts.copy(), gpu.bytes_moved.copy()
    check(gpu, Loss(), [tokens], {"targets": targets})
    counts = gpu.counts - before
    for op in ("addmm", "mm", "native_layer_norm", "native_layer_norm_backward", "embedding", "nll_loss_forward"):
        assert counts[op] > 0, op
    files = {file for file, _ in launched}
    assert files <= {"generated"} | {file for file in files if file.startswith("gpu_")}
    assert files >= {f"gpu_{name}.cl" for name in ("gemm", "attention", "layer_norm", "softmax", "embedding")}
    assert {"attention", "attention_queries", "attention_keys"} <= {kernel for _, kernel in launched}
    has_moved = (gpu.bytes_moved - moved).total() > 0
    assert has_moved == (not gpu.capabilities.shares_host_memory)


class Plain(nn.Module):
    """Activations, broadcasts, layouts and reductions: what generated kernels and the odd corners do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 19), nn.Linear(19, 5, bias=False)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 11)[:, None])

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        y = nn.functional.silu(self.up(x)) * self.scale
        y = torch.cat([y[..., ::2], torch.tanh(y[..., 1::2])], -1).transpose(0, 1)
        z = self.down(y.transpose(0, 1)) + x.mean(-1, keepdim=True).relu()
        return (z - z.amax(1, keepdim=True)).softmax(1) @ z.transpose(-1, -2)


@pytest.mark.parametrize("batch", [1, 6])
def test_plain_networks_have_the_gradients_of_float64(gpu: Device, batch: int) -> None:
    torch.manual_seed(2)
    check(gpu, Plain(), [torch.randn(batch, 11, 7, requires_grad=True)])


def test_inputs_may_lie_anyhow_and_be_empty(gpu: Device) -> None:
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: (torch.tanh(x) + x.sum(), x * 2 + 1), backend="opencl", options={"device": gpu.name}
    )
    wide = torch.randn(9, 14)
    for x in (wide.t(), wide[:, ::3], wide[:1].expand(5, 14), wide.flatten()[1:], wide[:0], wide[0, 0]):
        for ours, theirs in zip(function(x), (torch.tanh(x) + x.sum(), x * 2 + 1), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _half(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    rounded = (torch.tanh(x) * 2 + y).to(torch.float32) * 3
    chosen = torch.where(x > 0, nn.functional.gelu(x), x.new_full((), 0.1))
    return rounded, chosen, (x + 1).float().exp(), x.to(torch.int32), (x @ y.t()) * 0.5, x.transpose(0, 1).contiguous()


def test_half_precision_is_stored_as_such_and_computed_in_float32(gpu: Device) -> None:
    names = [d.name for d in list_devices(subdevices=False) if d.capabilities.fp16]
    if not names:
        pytest.skip("no device with fp16: pip install 'heteroq[intel-opencl]'")
    device = open_variant(names[0], "gpu-half", shares_host_memory=gpu.capabilities.shares_host_memory, kind="gpu")
    torch._dynamo.reset()
    function = torch.compile(_half, backend="opencl", options={"device": device.name})
    x, y = (torch.randn(7, 9, generator=torch.Generator().manual_seed(s)).half() for s in range(2))
    x[0, :3] = torch.tensor([float("nan"), float("inf"), 6e4])
    before = device.counts.copy()
    for ours, theirs in zip(function(x, y), _half(x, y), strict=True):
        assert ours.dtype == theirs.dtype
        exact = torch.float32 if theirs.dtype.is_floating_point else theirs.dtype
        # both round to half after every operation; functions differ by an ulp of float32, which may tip one rounding
        eps = torch.finfo(torch.float16).eps
        torch.testing.assert_close(ours.to(exact), theirs.to(exact), rtol=2 * eps, atol=2 * eps, equal_nan=True)
    assert (device.counts - before)["mm"] == 1


def test_half_precision_without_the_extension_is_an_error_that_names_it(gpu: Device) -> None:
    if gpu.capabilities.fp16:
        pytest.skip("this device has it")
    torch._dynamo.reset()
    function = torch.compile(lambda x: x * 2, backend="opencl", options={"device": gpu.name})
    with pytest.raises(Exception, match=r"float16"):
        function(torch.ones(3).half())


def test_variants_are_devices_of_their_own(gpu: Device) -> None:
    assert gpu.capabilities.kind == "gpu"
    assert open_variant("opencl:0", gpu.name, shares_host_memory=gpu.capabilities.shares_host_memory, **LIMITS) is gpu
