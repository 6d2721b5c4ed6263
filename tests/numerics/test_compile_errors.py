"""What the backend refuses, and what the messages say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from hetero.errors import HeteroError
from hetero.opencl import backend, compile_module, fallbacks
from hetero.opencl.errors import CompileError, UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "opencl:0"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Inner(nn.Module):
    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return torch.logcumsumexp(x * 2, dim=1) + 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.sorter = nn.LayerNorm(6), Inner()

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        result: Tensor = self.sorter(self.norm(x))
        return result


def compile_(function: object, **options: object) -> object:
    return torch.compile(function, backend="opencl", options={"device": DEVICE, **options})  # type: ignore[call-overload]


def call(function: object, *inputs: Tensor) -> Tensor:
    assert callable(function)
    result: Tensor = function(*inputs)
    return result


def test_an_operation_without_kernel_is_an_error_that_names_it() -> None:
    with pytest.raises(UnsupportedOperationError) as caught:
        compile_module(Outer(), DEVICE)(torch.randn(2, 6))
    assert "aten.logcumsumexp" in str(caught.value)
    assert "sorter" in str(caught.value)
    assert "fallback" in str(caught.value)
    with pytest.raises(Exception, match=r"aten\.logcumsumexp"):
        call(compile_(Outer()), torch.randn(2, 6))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_error_is_ours_however_torch_compile_is_called(fullgraph: bool) -> None:
    torch._dynamo.reset()
    with pytest.raises(UnsupportedOperationError, match=r"aten\.logcumsumexp"):
        torch.compile(Outer(), backend="opencl", fullgraph=fullgraph)(torch.randn(2, 6))


def test_with_the_option_it_runs_on_the_host_and_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    module = Outer()
    compiled = compile_module(module, DEVICE, fallback="cpu")
    x = torch.randn(2, 6, requires_grad=True)
    with caplog.at_level("WARNING"):
        y = compiled(x)
    assert "logcumsumexp" in caplog.text
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    seed = torch.randn(2, 6)
    ours, theirs = (torch.autograd.grad(f(x), x, seed)[0] for f in (compiled, module))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    listed = {(f.op, f.module.rpartition(".")[2]) for f in fallbacks(compiled)}
    assert ("logcumsumexp", "sorter") in listed


@torch._dynamo.disable
def disabled(x: Tensor) -> Tensor:
    return x + 1


def break_in_the_middle(x: Tensor) -> Tensor:
    y = x * 2
    torch._dynamo.graph_break()
    return y + 1


def break_before_the_first_operation(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + 1


def break_in_a_loop(x: Tensor) -> Tensor:
    for _ in range(2):
        x = x * 2
        torch._dynamo.graph_break()
    return x


def break_in_a_context(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
        torch._dynamo.graph_break()
        return y + 1


def break_in_a_try(x: Tensor) -> Tensor:
    try:
        y = x * 2
        torch._dynamo.graph_break()
    except ValueError:
        y = x
    return y + 1


def branch_on_data_in_a_loop(x: Tensor) -> Tensor:
    for _ in range(2):
        if x.sum() > 0:
            x = x * 2
    return x


def call_what_is_disabled_in_a_loop(x: Tensor) -> Tensor:
    for _ in range(2):
        x = disabled(x)
    return x


BREAKS = [
    break_in_the_middle, break_before_the_first_operation, break_in_a_loop, break_in_a_context, break_in_a_try,
    branch_on_data_in_a_loop, call_what_is_disabled_in_a_loop,
]  # fmt: skip


@pytest.mark.parametrize("function", BREAKS)
def test_a_graph_break_is_an_error_that_names_the_place(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CompileError, match="broke the graph") as caught:
        call(compile_(function), torch.ones(3))
    assert f"in {function.__name__}" in str(caught.value)


@pytest.mark.parametrize("function", BREAKS)
def test_other_backends_may_break_graphs_as_ever(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CompileError):
        call(compile_(function), torch.ones(3))
    assert torch.equal(call(torch.compile(function, backend="eager"), torch.ones(3)), function(torch.ones(3)))


def test_a_torch_that_converts_functions_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._dynamo.convert_frame, "ConvertFrame")
    with pytest.raises(CompileError, match="graph breaks can't be made errors"):
        backend._forbid_graph_breaks()


def test_too_many_recompilations_are_an_error() -> None:
    function = torch.compile(lambda x: x * 2, backend="opencl", dynamic=False, options={"device": DEVICE})

    def run() -> None:
        for n in range(1, 30):
            function(torch.randn(n))

    with pytest.raises(Exception, match=r"(?i)recompile_limit"):
        run()


def test_dynamic_shapes_get_a_plan_for_each_geometry() -> None:
    function = torch.compile(lambda x: torch.tanh(x @ x.t()) + x.shape[0], backend="opencl", dynamic=True)
    for n in (2, 3, 5, 7, 11, 2, 3):
        x = torch.randn(n, 4, requires_grad=True)
        torch.testing.assert_close(function(x), torch.tanh(x @ x.t()) + n, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(function(x).sum(), x)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(torch.tanh(x @ x.t()).sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"devise": "opencl:0"}, {"fallback": "gpu"}, {"device": 0}, {"memory": "host"}])
def test_unknown_options_are_an_error(options: dict[str, object]) -> None:
    with pytest.raises(Exception, match="options of the opencl backend"):
        call(compile_(lambda x: x + 1, **options), torch.randn(3))


def test_an_unknown_device_is_an_error_of_the_package() -> None:
    class Plus(nn.Module):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            return x + 1

    with pytest.raises(HeteroError, match="opencl:99"):
        compile_module(Plus(), "opencl:99")(torch.randn(3))


def test_a_mode_is_an_error() -> None:
    with pytest.raises(Exception, match="no modes"):
        torch.compile(lambda x: x + 1, backend="opencl", mode="reduce-overhead")(torch.randn(3))
