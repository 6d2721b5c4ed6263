"""Torch's own sample inputs of an operation through torch.compile(backend="opencl"), against torch in float64.

Many samples are one compiled function, so that an operation costs one or two compilations instead of dozens. A result
must have been launched on the device unless it is an input or a view of one; without `fallback` nothing else can run
an operation, and the counters show that launches were made.

Tolerance. Exact arithmetic on inputs that are off by half an ulp is the best that can be asked (the mixed
forward-backward error of Higham, "Accuracy and stability of numerical algorithms", 2nd ed., section 1.5). How far such
inputs move a result is measured: torch in float64 at inputs multiplied by 1 +- eps. An element may be off by BUDGET
times (what that moves it + eps times the largest element), where BUDGET counts roundings inside the operation:
functions within 6 ulp, nested, and a sum's tree. Where float32 has NaN or an infinity so must we; results that aren't
floating-point are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from hetero.opencl.program import open_device
from tests.kernel_harness import EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DEVICE = "opencl:0"
BUDGET = 16.0
SAMPLES_A_GRAPH = 16
SAMPLES_AN_OPERATION = 48  # of more, every second or third...; a norm has 200
_NONCONTIGUOUS = 4  # of the first samples there is a non-contiguous twin as well
_PERTURBATIONS = 3


@dataclass(frozen=True)
class Case:
    """One sample: the tensors of a call, and how the call is put together from them."""

    operation: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]
    leaves: tuple[Any, ...]  # with a _Place for each tensor
    spec: pytree.TreeSpec

    def call(self, tensors: Sequence[torch.Tensor], *, wide: bool = False) -> Any:
        """The operation on these tensors; `wide`: where the call names float32 it means float64."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, _Place):
                leaves.append(tensors[leaf.index])
            else:
                leaves.append(torch.float64 if wide and leaf is torch.float32 else leaf)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.operation(*args, **kwargs)


@dataclass(frozen=True)
class _Place:
    index: int


def cases(op: Any, limit: int | None = None) -> list[Case]:
    """The samples of an OpInfo in float32 (int64 if it has none), the first ones also with other strides."""
    dtype = torch.float32 if torch.float32 in op.dtypes else torch.int64
    found: list[Case] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)  # OpInfo draws from the global generator
        is_differentiable = op.supports_autograd and dtype == torch.float32
        samples = list(op.sample_inputs("cpu", dtype, requires_grad=is_differentiable))
        step = -(-len(samples) // SAMPLES_AN_OPERATION)
        for i, sample in enumerate(samples[: limit or len(samples) : 1 if limit else step]):
            found.append(_case(op, sample))
            if i < _NONCONTIGUOUS:
                found.append(_case(op, sample.noncontiguous()))
    return found


def _case(op: Any, sample: Any) -> Case:
    leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
    tensors: list[torch.Tensor] = []
    places: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            places.append(_Place(len(tensors)))
            tensors.append(leaf.detach().requires_grad_(leaf.requires_grad))
        else:
            places.append(leaf)
    return Case(op.op, tuple(tensors), tuple(places), spec)


def check_operation(op: Any, limit: int | None = None) -> None:
    """Compare all samples, forward and gradient, and count launches.

    Raises:
        AssertionError: a result or a gradient is off, or was not launched.
    """
    found = cases(op, limit)
    assert found, f"no samples of {op.name}"
    for start in range(0, len(found), SAMPLES_A_GRAPH):
        torch._dynamo.reset()
        _check_graph(found[start : start + SAMPLES_A_GRAPH])
    torch._dynamo.reset()


def _check_graph(group: Sequence[Case]) -> None:
    def function(tensors: list[list[torch.Tensor]]) -> list[Any]:
        return [case.call(own) for case, own in zip(group, tensors, strict=True)]

    compiled = torch.compile(function, backend="opencl", fullgraph=True, dynamic=False, options={"device": DEVICE})
    inputs = [list(case.tensors) for case in group]
    with torch.random.fork_rng():
        counts = open_device(DEVICE).counts
        before = counts.total()
        results = compiled(inputs)
        launches = counts.total() - before
    wanted = sum(_needs_launch(case, result) for case, result in zip(group, results, strict=True))
    assert launches >= wanted, f"{launches} launches for {wanted} results"
    got = [[*_tensors(result)] for result in results]
    outputs = [y for own in got for y in own if y.requires_grad]
    sources = [x for case in group for x in case.tensors if x.requires_grad]
    gradients: dict[int, torch.Tensor | None] = {}
    if outputs:
        cotangents = [_cotangent(y, None) for y in outputs]
        before = counts.total()
        taken = torch.autograd.grad(outputs, sources, cotangents, allow_unused=True)
        gradients = {id(x): g for x, g in zip(sources, taken, strict=True)}
        passed = {c.untyped_storage().data_ptr() for c in cotangents}
        is_passed = all(g is None or not g.numel() or g.untyped_storage().data_ptr() in passed for g in taken)
        assert counts.total() > before or is_passed, "the backward pass made no launch"
    for i, (case, own) in enumerate(zip(group, got, strict=True)):
        _compare(f"sample {i}: {_describe(case)}", case, own, [gradients.get(id(x)) for x in case.tensors])


def _needs_launch(case: Case, result: Any) -> bool:
    """Whether some result has elements and memory of its own."""
    given = {x.untyped_storage().data_ptr() for x in case.tensors}
    return any(y.numel() and y.untyped_storage().data_ptr() not in given for y in _tensors(result))


def _compare(name: str, case: Case, got: list[torch.Tensor], gradients: list[torch.Tensor | None]) -> None:
    narrow, narrow_gradients = _reference(case, case.tensors, wide=False)
    exact, exact_gradients = _reference(case, _wide(case.tensors), wide=True)
    generator = torch.Generator().manual_seed(1)
    moved = [
        _reference(case, [_perturbed(x, generator) for x in case.tensors], wide=True, generator=generator)
        for _ in range(_PERTURBATIONS)
    ]
    assert len(got) == len(narrow), name
    for k, (y, n, e) in enumerate(zip(got, narrow, exact, strict=True)):
        _check(f"{name}: result {k}", y, n, e, [m[0][k] for m in moved])
    for k, (y, n, e) in enumerate(zip(gradients, narrow_gradients, exact_gradients, strict=True)):
        assert (y is None) == (n is None), f"{name}: gradient {k} is {y}, not {n}"
        if y is not None:
            _check(f"{name}: gradient {k}", y, n, e, [m[1][k] for m in moved])


def _check(name: str, got: torch.Tensor, narrow: Any, exact: Any, moved: list[Any]) -> None:
    assert (got.dtype, got.shape) == (narrow.dtype, narrow.shape), f"{name}: {got.dtype} {got.shape}, not {narrow}"
    if not narrow.dtype.is_floating_point:
        assert torch.equal(got, narrow), f"{name}: {got}, not {narrow}"
        return
    finite = narrow.isfinite()
    assert torch.equal(got.isnan(), narrow.isnan()), f"{name}: NaN {got}, not {narrow}"
    assert torch.equal(got[~finite].nan_to_num(nan=0.0), narrow[~finite].nan_to_num(nan=0.0)), f"{name}: infinities"
    got, exact = got.detach()[finite].double(), exact.detach()[finite]
    if not got.numel():
        return
    shift = torch.stack([(m.detach()[finite] - exact).abs().nan_to_num(0.0, 0.0) for m in moved]).amax(0)
    bound = BUDGET * (shift + EPS * exact.abs().max()) + torch.finfo(torch.float32).tiny
    error = (got - exact).abs()
    worst = int((error / bound).argmax())
    excess = float((error / bound).max())
    assert excess <= 1, f"{name}: {excess:.2f} times the tolerance: {float(got[worst])}, not {float(exact[worst])}"


def _reference(
    case: Case, tensors: Sequence[torch.Tensor], *, wide: bool, generator: torch.Generator | None = None
) -> tuple[list[torch.Tensor], list[Any]]:
    """Results of eager torch, and the gradient of each tensor; a generator perturbs the cotangents."""
    with torch.random.fork_rng():
        results = [*_tensors(case.call(tensors, wide=wide))]
    outputs = [y for y in results if y.requires_grad]
    sources = [x for x in tensors if x.requires_grad]
    if not outputs:
        return results, [None] * len(tensors)
    cotangents = [_cotangent(y, generator).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, sources, cotangents, allow_unused=True)
    taken = {id(x): gradient for x, gradient in zip(sources, gradients, strict=True)}
    return results, [taken.get(id(x)) for x in tensors]


def _cotangent(y: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The same numbers whatever the type, perturbed if there is a generator."""
    numbers = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return numbers if generator is None else _perturbed(numbers, generator)


def _wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_to_wide(x, x.detach().double() if x.dtype == torch.float32 else x) for x in tensors]


def _perturbed(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """In float64, each element one eps larger or smaller."""
    if x.dtype != torch.float32:
        return x
    sign = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
    return _to_wide(x, x.detach().double() * (1 + EPS * sign))


def _to_wide(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value.requires_grad_(x.requires_grad) if value is not x else x


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))


def _describe(case: Case) -> str:
    shapes = ", ".join(f"{tuple(x.shape)}/{tuple(x.stride())}" for x in case.tensors)
    rest = [leaf for leaf in case.leaves if not isinstance(leaf, _Place)]
    return f"tensors {shapes}; {rest}"
