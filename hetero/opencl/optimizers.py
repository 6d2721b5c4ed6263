"""Optimizers that run as kernels: what torch's Adam, AdamW and SGD do, over vectors of parameters.

A rule reads the hyperparameters of torch's own param groups at every step, so learning-rate schedulers and edits work.
The numbers that change from step to step reach the kernels as arguments (`Scalar`), not as memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hetero.opencl.errors import CompileError
from hetero.opencl.ir import Argument, Launch, Root, Scalar, View, vector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hetero.opencl.steps import Target

_SOURCE = "optimizer.cl"
_CHUNK = 16384  # CHUNK of optimizer.cl
_GPU_ITEMS = 256  # work-items of a group on GPU-type devices
_GROUPS_PER_UNIT = 4


@dataclass(frozen=True)
class Clipping:
    """Memory of gradient clipping: partial sums, the factor, the norm; each float32."""

    partial: View
    factor: View
    norm: View


def clip(gradients: list[View], clipping: Clipping, largest: float, target: Target) -> list[Launch]:
    """The factor that bounds the norm of all gradients together; as torch.nn.utils.clip_grad_norm_.

    Args:
        gradients: contiguous vectors.
        clipping: where to.
        largest: norm to stay below.
        target: the device.
    """
    launches, at, local = [], 0, _local_size(target)
    for gradient in gradients:
        n_chunks = n_partial(gradient.numel)
        place = View(clipping.partial.root, clipping.partial.offset + at, (n_chunks,), (1,), torch.float32)
        arguments: tuple[Argument, ...] = (gradient, place, gradient.numel)
        grid, defines = (n_chunks * local,), {"LOCAL": local}
        launches.append(Launch("clip_grad_norm", "square_sum", _SOURCE, arguments, grid, (local,), (place,), defines))
        at += n_chunks
    arguments = (clipping.partial, clipping.factor, clipping.norm, at, float(largest))
    written = (clipping.factor, clipping.norm)
    launches.append(Launch("clip_grad_norm", "clip_factor", _SOURCE, arguments, (1,), (1,), written))
    return launches


def clear(gradient: View, gaps: tuple[tuple[int, int], ...]) -> list[Launch]:
    """Zeros between the gradients of a vector, which the norm would count otherwise.

    Args:
        gradient: contiguous vector.
        gaps: first and number of the elements of each gap.
    """
    if not gaps:
        return []
    table = torch.tensor(gaps, dtype=torch.int64)
    root = Root("constant", table.nbytes, "gaps", tensor=table)
    places = View(root, 0, (len(gaps), 2), (2, 1), torch.int64)
    grid = (len(gaps),)
    return [Launch("clip_grad_norm", "zero_gaps", _SOURCE, (gradient, places), grid, (1,), (gradient,))]


def accumulate(target: Root, source: Root, target_device: Target) -> Launch:
    """Target = keep * target + source, for the scalar `keep`: 0 where nothing has been summed yet.

    Args:
        target: of float32 numbers.
        source: as long.
        target_device: the device.
    """
    views, n = [vector(target), vector(source)], source.nbytes // 4
    global_size, local_size, per_item = _divided(n, target_device)
    arguments: tuple[Argument, ...] = (*views, n, per_item, Scalar("keep"))
    defines = {"LOCAL": local_size[0]}
    return Launch("accumulate", "accumulate", _SOURCE, arguments, global_size, local_size, (views[0],), defines)


def n_partial(n: int) -> int:
    """How many partial sums the norm of n elements has."""
    return -(-n // _CHUNK)


def signature(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """What of an optimizer is compiled in; everything else is read at every step."""
    flags = ("amsgrad", "nesterov")
    return tuple(
        (len(g["params"]), id(g["params"]), bool(g.get("momentum")), *(bool(g.get(flag)) for flag in flags))
        for g in optimizer.param_groups
    )


class Rule(Protocol):
    """One optimizer.

    Attributes:
        states: names of its vectors in torch's `optimizer.state`.
        counts_steps: whether torch keeps the number of steps there too.
    """

    states: tuple[str, ...]
    counts_steps: bool

    def scalars(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """The numbers of the step-th step, counted from 1."""

    def launch(
        self, p: View, gradient: View, states: tuple[View, ...], factor: View | None, *, prefix: str, target: Target
    ) -> Launch:
        """The update of one vector; its numbers are the scalars whose names follow the prefix."""


class Adam:
    """torch.optim.Adam and AdamW."""

    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def scalars(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """See `Rule`. The bias corrections of algorithm 2 are in `step_size` and `root`."""
        lr, (beta1, beta2), weight_decay = float(group["lr"]), group["betas"], float(group["weight_decay"])
        is_decoupled = bool(group.get("decoupled_weight_decay", False))
        return {
            "sign": -1.0 if group["maximize"] else 1.0,
            "l2": 0.0 if is_decoupled else weight_decay,
            "decay": 1.0 - lr * weight_decay if is_decoupled else 1.0,
            "take1": 1.0 - float(beta1),
            "keep2": float(beta2),
            "take2": 1.0 - float(beta2),
            "step_size": lr / (1.0 - float(beta1) ** step),
            "root": (1.0 - float(beta2) ** step) ** -0.5,
            "epsilon": float(group["eps"]),
        }

    def launch(
        self, p: View, gradient: View, states: tuple[View, ...], factor: View | None, *, prefix: str, target: Target
    ) -> Launch:
        """See `Rule`."""
        names = ("sign", "l2", "decay", "take1", "keep2", "take2", "step_size", "root", "epsilon")
        return _update("adam", p, gradient, states, factor, (), names, prefix, target)


class SGD:
    """torch.optim.SGD.

    Args:
        has_momentum: whether any group has momentum.
        is_nesterov: whether it looks ahead.
    """

    counts_steps = False

    def __init__(self, *, has_momentum: bool, is_nesterov: bool) -> None:
        self.states: tuple[str, ...] = ("momentum_buffer",) if has_momentum else ()
        self._flags = (int(has_momentum), int(is_nesterov))

    def scalars(self, group: Mapping[str, Any], step: int) -> dict[str, float]:
        """See `Rule`. The momentum starts as the first gradient, undamped."""
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        return {
            "sign": -1.0 if group["maximize"] else 1.0,
            "l2": float(group["weight_decay"]),
            "lr": float(group["lr"]),
            "momentum": momentum,
            "keep": 0.0 if step == 1 else momentum,
            "take": 1.0 if step == 1 else 1.0 - dampening,
        }

    def launch(
        self, p: View, gradient: View, states: tuple[View, ...], factor: View | None, *, prefix: str, target: Target
    ) -> Launch:
        """See `Rule`."""
        names = ("sign", "l2", "lr", "momentum", "keep", "take")
        return _update("sgd", p, gradient, states or (gradient,), factor, self._flags, names, prefix, target)


def _update(
    kernel: str,
    p: View,
    gradient: View,
    states: tuple[View, ...],
    factor: View | None,
    flags: tuple[int, ...],
    names: tuple[str, ...],
    prefix: str,
    target: Target,
) -> Launch:
    n = p.numel
    global_size, local_size, per_item = _divided(n, target)
    tensors = (p, gradient, *states, factor or gradient)
    numbers = (Scalar(f"{prefix}.{name}") for name in names)
    arguments: tuple[Argument, ...] = (*tensors, n, per_item, int(factor is not None), *flags, *numbers)
    written = (p, *(state for state in states if state is not gradient))
    return Launch(kernel, kernel, _SOURCE, arguments, global_size, local_size, written, {"LOCAL": local_size[0]})


def _local_size(target: Target) -> int:
    """Work-items of a group: a power of two, 1 on CPU-type devices."""
    return min(_GPU_ITEMS, 1 << (target.max_work_group_size.bit_length() - 1)) if target.kind == "gpu" else 1


def _divided(n: int, target: Target) -> tuple[tuple[int], tuple[int], int]:
    """(global size, local size, elements of a work-item) for n elements: on a GPU a work-item an element."""
    local = _local_size(target)
    per_item = 1 if target.kind == "gpu" else -(-n // (target.compute_units * _GROUPS_PER_UNIT))
    return (-(-n // (per_item * local)) * local,), (local,), per_item


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """The rule of a torch optimizer.

    Raises:
        CompileError: one without kernels, or an option that they lack.
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        raise CompileError(
            "no kernels for this optimizer",
            found=f"{kind.__module__}.{kind.__qualname__}",
            expected="torch.optim.AdamW, Adam or SGD",
            remedy='train with torch.compile(module, backend="opencl") and the optimizer of your choice on the host',
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise CompileError("no kernels for amsgrad", found="amsgrad=True", expected="amsgrad=False")
    if kind is not torch.optim.SGD:
        return Adam()
    nesterov = {bool(group["nesterov"]) for group in optimizer.param_groups}
    momentum = {float(group["momentum"]) != 0.0 for group in optimizer.param_groups}
    if len(nesterov) > 1 or len(momentum) > 1:
        raise CompileError("the groups of SGD have to agree on momentum and nesterov", found="some with, some without")
    return SGD(has_momentum=momentum.pop(), is_nesterov=nesterov.pop())
