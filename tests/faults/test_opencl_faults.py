"""What an OpenCL device may do to a run: too little memory, in one piece or at all; and dying."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from hetero.opencl import compile_module, copied, memory_plans
from hetero.opencl.errors import DeviceLost, NoOpenCLError, OpenCLError, OutOfDeviceMemory
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.platforms import opencl
from hetero.opencl.program import Device, open_device

if TYPE_CHECKING:
    from collections.abc import Callable

_SOURCE = "KERNEL one(TENSOR_OUT(x)) { BASE(x)[0] += 1.0f; }"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(30, 60), nn.Linear(60, 30)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


class Deep(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(60, 60)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        result: Tensor = self.down(torch.relu(self.middle(torch.relu(self.up(x)))))
        return result


@pytest.fixture
def device() -> Device:
    """A device of its own, so that losing it harms nobody."""
    try:
        opened = open_device("opencl:0")
    except NoOpenCLError as error:
        pytest.skip(f"no OpenCL here: {error.remedy}")
    return Device(opened.description, opened._handle)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """Set limits of the device that modules are compiled for."""
    torch._dynamo.reset()
    try:
        shared = open_device("opencl:0")
    except NoOpenCLError as error:
        pytest.skip(f"no OpenCL here: {error.remedy}")

    def set_limits(**limits: int) -> Device:
        monkeypatch.setattr(shared, "capabilities", dataclasses.replace(shared.capabilities, **limits))
        return shared

    return set_limits


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, "copy"])
def test_a_graph_that_does_not_fit_is_refused_before_anything_is_launched(
    memory: str | None, limit: Callable[..., Device]
) -> None:
    device = limit(memory_bytes=10_000)
    before = device.counts.total()
    with pytest.raises(OutOfDeviceMemory, match=r"needs \d+ bytes on opencl:0, which has 10000") as info:
        compile_module(Net(), "opencl:0", memory=memory)(torch.randn(50, 30))
    assert "60" not in info.value.remedy
    assert f"{50 * 60 * 4} bytes: " in info.value.found
    assert "of up" in info.value.found
    assert device.counts.total() == before


@pytest.mark.parametrize("memory", [None, "copy"])
def test_a_buffer_that_is_too_large_for_one_piece_is_refused_by_its_name(
    memory: str | None, limit: Callable[..., Device]
) -> None:
    limit(max_allocation_bytes=10_000)
    with pytest.raises(OutOfDeviceMemory, match=r"can't hold a buffer of \d+ bytes: .* of \w+"):
        compile_module(Net(), "opencl:0", memory=memory)(torch.randn(50, 30))


@pytest.mark.parametrize("memory", [None, "copy"])
def test_an_arena_larger_than_one_piece_is_made_of_several(memory: str | None, limit: Callable[..., Device]) -> None:
    module, x = Deep(), torch.randn(50, 30)
    limit(max_allocation_bytes=16_384)  # of two activations, 12 000 bytes each, and weights
    compiled, n_plans = compile_module(module, "opencl:0", memory=memory), len(memory_plans("opencl:0"))
    for _ in range(2):
        y = compiled(x)
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        theirs = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert max(plan.arena_bytes + plan.slab_bytes for plan in memory_plans("opencl:0")[n_plans:]) > 16_384


def test_the_arena_of_copies_grows_only_after_all_have_let_go_of_the_old_one(limit: Callable[..., Device]) -> None:
    device = limit()
    small, module = compile_module(Net(), "opencl:0", memory="copy"), Net()
    large = compile_module(module, "opencl:0", memory="copy")
    arenas: list[Any] = []
    with torch.no_grad(), mock.patch.object(device, "allocate", wraps=device.allocate) as allocate:
        copied._arenas.pop(device, None)
        first = small(torch.ones(4, 30))
        arenas += copied._arenas[device]._buffers
        bound = arenas[0].reference_count  # by the driver's count, in which parts of a buffer hold the whole
        left: list[int] = []
        allocate.side_effect = lambda *_, **__: left.append(arenas[0].reference_count) or mock.DEFAULT
        torch.testing.assert_close(large(torch.ones(700, 30)), module(torch.ones(700, 30)), rtol=1e-5, atol=1e-5)
        assert torch.equal(small(torch.ones(4, 30)), first)  # bound anew
    assert bound > 2
    assert left == [1]  # `arenas` itself


def test_memory_that_others_have_taken_is_an_error_with_bytes_and_names(device: Device, monkeypatch: Any) -> None:
    cl = opencl()

    def full(*_: object, **__: object) -> object:
        raise _error("MEM_OBJECT_ALLOCATION_FAILURE", "create_buffer")

    monkeypatch.setattr(cl, "Buffer", full)
    with pytest.raises(OutOfDeviceMemory, match="can't allocate 4000 bytes") as info:
        device.allocate(4000, holds=[Root("scratch", 4000, "addmm of model.up")])
    assert str(device.capabilities.memory_bytes) in info.value.found
    assert "4000 bytes: addmm of model.up" in info.value.found


# --- a device that dies -----------------------------------------------------------------------------------------------


def _error(status: str, routine: str) -> Exception:
    """The driver's error of a status."""
    cl = opencl()
    code = getattr(cl.status_code, status)
    error: Exception = type("Injected", (cl.Error,), {"code": code, "routine": routine})(status)
    return error


class _DeadQueue:
    """A queue whose device has gone: waiting fails."""

    def __init__(self, queue: Any, status: str) -> None:
        self._queue, self._status = queue, status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def finish(self) -> None:
        raise _error(self._status, "clFinish")


@pytest.mark.parametrize("status", ["DEVICE_NOT_AVAILABLE", "OUT_OF_RESOURCES", "INVALID_COMMAND_QUEUE"])
def test_a_lost_device_is_named_and_takes_no_more_calls(device: Device, status: str) -> None:
    working = device.queue
    device.queue = _DeadQueue(working, status)
    with pytest.raises(DeviceLost, match=r"opencl:0 \(.*\) is lost") as info:
        device.finish()
    assert status in info.value.found
    assert "heteroq devices" in info.value.remedy
    device.queue = working  # even if the driver seems to work again: what was in memory is gone
    x = torch.zeros(1)
    for call in (
        device.finish,
        lambda: device.allocate(4),
        lambda: device.download(x, None),
        lambda: device.upload(None, x),
    ):
        with pytest.raises(DeviceLost, match=f"(?s)is lost.*{status}"):
            call()


def test_launches_on_a_lost_device_fail_at_once(device: Device) -> None:
    root = Root("constant", 4, tensor=torch.zeros(1))
    view = View(root, 0, (1,), (1,), torch.float32)
    prepared = device.prepare([Launch("one", "one", _SOURCE, (view,), (1,), (1,), (view,), is_generated=True)])
    prepared.enqueue()
    device.finish()
    device.queue = _DeadQueue(device.queue, "DEVICE_NOT_AVAILABLE")
    with pytest.raises(DeviceLost):
        device.finish()
    with pytest.raises(DeviceLost):
        prepared.enqueue()
    assert device.counts["one"] == 1


def test_other_failures_do_not_lose_the_device(device: Device) -> None:
    with pytest.raises(OpenCLError, match="INVALID_VALUE"):
        device.sub_buffer(device.allocate(256), 0, 1 << 20)
    device.finish()
    assert device.lost == ""


def test_a_lost_device_is_the_error_of_a_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    shared = open_device("opencl:0")
    compiled = compile_module(Net(), "opencl:0")
    with torch.no_grad():
        compiled(torch.ones(2, 30))
        monkeypatch.setattr(shared, "lost", "DEVICE_NOT_AVAILABLE (clFinish)")
        with pytest.raises(DeviceLost):
            compiled(torch.ones(2, 30))
        monkeypatch.undo()
        compiled(torch.ones(2, 30))
