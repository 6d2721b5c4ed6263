"""Run launches over torch tensors, and the tolerances of the kernels with their derivation."""

from __future__ import annotations

import dataclasses
import os
from functools import cache

import pytest
import torch

from hetero.opencl.errors import NoOpenCLError
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.program import Device, open_device

DEVICE = os.environ.get("HETEROQ_TEST_DEVICE", "opencl:0")
"""The device that kernels are tested on: another one by an environment variable."""

EPS = torch.finfo(torch.float32).eps

# A sum of n products in float32 is off by at most n eps/2 times the sum of the absolute products (Higham, "Accuracy and
# stability of numerical algorithms", 2nd ed., section 3.1). All tolerances are such sums; the constants in front count
# roundings outside the sum (scaling, exp at 2 ulp, the inputs of a later stage). They are bounds, not fits.
WIDE = 4.0


def dot_tolerance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bound of the error of a @ b, elementwise: K eps (|a| @ |b|), and one rounding for the epilogue."""
    return (a.shape[-1] + 2) * EPS * (a.abs().double() @ b.abs().double()) + 1e-30


def sum_tolerance(n: int, absolute_sum: torch.Tensor | float) -> torch.Tensor | float:
    """Bound of the error of a sum of n numbers with this sum of absolute values."""
    return (n + 1) * EPS * absolute_sum + 1e-30


def row_tolerance(width: int, scale: torch.Tensor | float) -> torch.Tensor | float:
    """Error of a row-wise operation (norm, softmax) whose terms are at most `scale`: roundings of a tree over lanes."""
    return WIDE * EPS * (width**0.5 + 4) * scale + 1e-30


@cache
def _device(name: str, changes: tuple[tuple[str, object], ...]) -> Device:
    """A device, or one beside it that passes for another, with wider vectors or a GPU: right anywhere, if slow."""
    device = open_device(name)
    capabilities = dataclasses.replace(device.capabilities, **dict(changes))  # type: ignore[arg-type]
    if capabilities == device.capabilities:
        return device
    return Device(dataclasses.replace(device.description, capabilities=capabilities), device._handle)


class Bench:
    """Views of torch tensors, and launches run on one device, perhaps with other capabilities than its own."""

    def __init__(self, name: str = "opencl:0", **capabilities: object) -> None:
        try:
            self.device = _device(name.replace("opencl:0", DEVICE), tuple(capabilities.items()))
        except NoOpenCLError as error:
            pytest.skip(f"no OpenCL here: {error.remedy}")
        self._roots: dict[int, Root] = {}
        self._keep: list[torch.Tensor] = []

    def view(self, tensor: torch.Tensor) -> View:
        storage = tensor.untyped_storage()
        root = self._roots.get(storage.data_ptr())
        if root is None:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))
            root = self._roots[storage.data_ptr()] = Root("constant", storage.nbytes(), tensor=whole)
        return View(root, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def scratch(self, nbytes: int, name: str) -> View:
        """Scratch is full of NaN, so that a kernel that reads what it didn't write is found out."""
        return self.view(torch.full((nbytes // 4,), float("nan")))

    def run(self, launches: list[Launch]) -> None:
        with self.device.lock:
            prepared = self.device.prepare(launches)
            prepared.enqueue()
            self.device.finish()


def layout(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in another place.

    `plain`; `transposed` (last two dimensions swapped in memory); `offset` (begins one float after a 64-byte boundary);
    `gaps` (every second element of the last dimension); `slice` (rows of a wider array); and, for inputs, `expanded`
    (the first row alone, with a stride of 0 for all others: other values).
    """
    if kind == "expanded" and tensor.dim() >= 2:
        return tensor[..., :1, :].clone().expand(tensor.shape)
    if kind == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "offset":
        return torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.reshape(-1)])[1:].view(tensor.shape)
    if kind == "gaps" and tensor.dim() >= 1:
        return torch.stack([tensor, torch.full_like(tensor, 7)], -1).flatten(-2)[..., ::2]
    if kind == "slice" and tensor.dim() >= 1:
        return torch.cat([torch.full_like(tensor, 7), tensor, torch.full_like(tensor, 7)], -1)[
            ..., tensor.shape[-1] : 2 * tensor.shape[-1]
        ]
    return tensor.clone()


OUTPUT_LAYOUTS = ("plain", "transposed", "offset", "gaps", "slice")
LAYOUTS = (*OUTPUT_LAYOUTS, "expanded")


def empty(*shape: int, kind: str = "plain") -> torch.Tensor:
    """An output full of NaN in a layout."""
    return layout(torch.full(shape, float("nan")), kind)


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    """Same NaN and infinities; everything else within the tolerance."""
    finite = expected.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~finite].nan_to_num(nan=0.0), expected[~finite].to(actual.dtype).nan_to_num(nan=0.0))
    error = (actual.double() - expected.double())[finite].abs()
    bound = torch.as_tensor(tolerance, dtype=torch.float64).expand(expected.shape)[finite]
    assert bool((error <= bound).all()), f"error {float((error / bound).max()):.2f} times the tolerance"
