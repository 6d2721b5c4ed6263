"""The weights of a training step: parameters, buffers, gradients and optimizer state on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero.opencl.errors import CompileError, OutOfDeviceMemory
from hetero.opencl.ir import Root
from hetero.opencl.memory import largest_buffers
from hetero.opencl.optimizers import rule_of, signature
from hetero.opencl.resident import Layout, Region, require_dense

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from hetero.opencl.program import Device


@dataclass(frozen=True)
class Run:
    """Parameters of one group of the optimizer that lie side by side.

    Attributes:
        group: index of the group.
        names: of the parameters, in their order.
        offset: where they begin in the regions [B].
        nbytes: what they take, with the gaps between them [B].
    """

    group: int
    names: tuple[str, ...]
    offset: int
    nbytes: int


class Weights:
    """Regions of the device's memory and their counterparts on the host.

    Trained parameters come first, group by group, at the same offsets in all regions; so a kernel updates many at once.

    Attributes:
        rule: the optimizer's.
        is_shared: whether the module's tensors lie in the regions themselves.
        tensors: parameters and buffers of the module by name; none once released.
        trained: names of the parameters that the optimizer trains.
        offsets: where each lies [B].
        region: parameters and buffers.
        states: the optimizer's vectors by name.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, device: Device, *, is_copied: bool
    ) -> None:
        self.rule = rule_of(optimizer)
        self.is_shared = device.capabilities.shares_host_memory and not is_copied
        self._optimizer = optimizer
        parameters = dict(module.named_parameters())
        _require_no_hooks(parameters, optimizer)
        self._groups = _groups(parameters, optimizer)
        trained = [name for names in self._groups for name in names]
        self.trained = tuple(trained)
        frozen = [name for name in parameters if name not in set(trained)]
        self.tensors: dict[str, torch.Tensor] = {name: parameters[name] for name in (*trained, *frozen)}
        self.tensors |= dict(module.named_buffers())
        layout, trainable_bytes = Layout(device), 0
        for i, (name, tensor) in enumerate(self.tensors.items()):
            require_dense(name, tensor)
            layout.add(name, tensor.numel() * tensor.itemsize)
            trainable_bytes = layout.nbytes if i < len(trained) else trainable_bytes
        self.offsets, self._layout = layout.offsets, layout
        self._require_fit(device, layout.nbytes + len(self.rule.states) * trainable_bytes)
        self.region = Region(device, layout.nbytes, is_shared=self.is_shared)
        self.states = {kind: Region(device, trainable_bytes, is_shared=self.is_shared) for kind in self.rule.states}
        self._n_steps = dict.fromkeys(trained, 0)
        self._signature = signature(optimizer)
        self._homes: dict[str, int] = {}
        self._layouts = {name: (t.dtype, t.shape, t.stride()) for name, t in self.tensors.items()}
        self.load_states()
        self.upload()

    @property
    def state_bytes(self) -> int:
        """Of the optimizer [B]."""
        return sum(region.nbytes for region in self.states.values())

    # --- host and device ----------------------------------------------------------------------------------------------

    def upload(self) -> None:
        """Take the values that the module has."""
        for name, tensor in self.tensors.items():
            self._take(name, tensor)

    def adopt(self) -> None:
        """Where the memory is shared, take tensors that have been moved since (`.data = ...`).

        Raises:
            CompileError: a tensor has another type or shape now, or the optimizer another structure.
        """
        if signature(self._optimizer) != self._signature:
            raise CompileError(
                "the optimizer has been changed",
                found="other parameters, momentum, nesterov or amsgrad than when the training step was made",
                remedy="make a new TrainStep",
            )
        if self.is_shared:
            for name, tensor in self.tensors.items():
                if tensor.data_ptr() != self._homes[name]:
                    self._take(name, tensor)

    def require_own(self, name: str, tensor: torch.Tensor) -> None:
        """Raise CompileError if the module has another tensor under a name than it had."""
        if tensor is not self.tensors.get(name):
            raise CompileError(f"{name} of the module has been replaced", remedy="make a new TrainStep")

    def write_back(self) -> None:
        """Bring values and optimizer state to the host."""
        for name, tensor in self.tensors.items() if not self.is_shared else ():
            tensor.data.copy_(self.region.read(self.offsets[name], tensor))
        for name, n_steps in self._n_steps.items():
            if n_steps and self.states:
                state = self._optimizer.state[self.tensors[name]]
                if self.rule.counts_steps:
                    state["step"] = torch.tensor(float(n_steps))
                for kind, region in self.states.items():
                    state[kind] = region.read(self.offsets[name], self.tensors[name]).clone()

    def load_states(self) -> None:
        """Take the state that the optimizer has."""
        for name in self._n_steps:
            self._n_steps[name] = self._load_state(name)

    def release(self) -> None:
        """Write back, give the module's tensors memory of their own, and let go of the device's."""
        self.write_back()
        for tensor in self.tensors.values() if self.is_shared else ():
            tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
        self.tensors, self.states, self._n_steps = {}, {}, {}
        del self.region

    def _require_fit(self, device: Device, needed_bytes: int) -> None:
        limits = device.capabilities
        if needed_bytes > limits.memory_bytes:
            roots = [Root("resident", tensor.nbytes, name) for name, tensor in self.tensors.items()]
            raise OutOfDeviceMemory(
                f"weights and state need {needed_bytes} bytes on {device.name}, which has {limits.memory_bytes}",
                found=largest_buffers(roots),
                remedy="a smaller model, an optimizer with less state, or another device",
            )

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        offset, (dtype, shape, strides) = self.offsets[name], self._layouts[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise CompileError(
                f"{name} of the module has been changed",
                found=f"shape {tuple(tensor.shape)}, {tensor.dtype}",
                expected=f"shape {tuple(shape)}, {dtype}",
                remedy="make a new TrainStep",
            )
        value = tensor.detach()
        if value.stride() != strides:
            value = torch.empty_strided(shape, strides, dtype=dtype).copy_(value)
        self.region.write(offset, value)
        if self.is_shared:
            tensor.data = self.region.read(offset, value)
            self._homes[name] = tensor.data_ptr()

    def _load_state(self, name: str) -> int:
        """Take the optimizer's state of a parameter; returns how many steps it has taken."""
        parameter = self.tensors[name]
        state = self._optimizer.state.get(parameter, {})
        present = {kind: state[kind] for kind in self.states if state.get(kind) is not None}
        for kind, region in self.states.items():
            value = torch.empty_strided(parameter.shape, parameter.stride())
            region.write(self.offsets[name], value.copy_(present[kind]) if kind in present else value.zero_())
        return int(state["step"]) if "step" in state else int(bool(present))

    # --- runs ---------------------------------------------------------------------------------------------------------

    def runs(self, wanted: Container[str], *, largest: int) -> Iterator[Run]:
        """The wanted parameters in runs that lie side by side, have taken equally many steps and end at a size [B]."""
        for index, group in enumerate(self._groups):
            names: list[str] = []
            for name in group:
                is_other = name not in wanted or (names and self._n_steps[name] != self._n_steps[names[0]])
                is_other = is_other or bool(names and self._layout.piece(name) != self._layout.piece(names[0]))
                if names and (is_other or self.offsets[name] - self.offsets[names[0]] >= largest):
                    yield self._run(index, names)
                    names = []
                if name in wanted:
                    names.append(name)
            if names:
                yield self._run(index, names)

    def gaps(self, run: Run) -> tuple[tuple[int, int], ...]:
        """(first, number) of the elements of a run, counted from its start, that belong to no parameter."""
        ends = [self.offsets[name] - run.offset + self.tensors[name].nbytes for name in run.names]
        starts = [self.offsets[name] - run.offset for name in run.names[1:]]
        return tuple((e // 4, (s - e) // 4) for e, s in zip(ends, starts, strict=False) if s > e)

    def is_even(self, run: Run) -> bool:
        """Whether all parameters of a run have taken equally many steps."""
        return len({self._n_steps[name] for name in run.names}) == 1

    def scalars(self, run: Run) -> dict[str, float]:
        """Numbers of the next step of a run, from the optimizer's hyperparameters as they are now."""
        return self.rule.scalars(self._optimizer.param_groups[run.group], self._n_steps[run.names[0]] + 1)

    def advance(self, run: Run) -> None:
        """Count a step."""
        for name in run.names:
            self._n_steps[name] += 1

    def _run(self, group: int, names: list[str]) -> Run:
        first, last = self.offsets[names[0]], self.tensors[names[-1]]
        return Run(group, tuple(names), first, self.offsets[names[-1]] - first + last.numel() * last.itemsize)


def _groups(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of the trained parameters of each group of the optimizer.

    Raises:
        CompileError: the optimizer and the module don't have the same trained parameters, or not of float32.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups: list[list[str]] = []
    for group in optimizer.param_groups:
        unknown = [str(tuple(p.shape)) for p in group["params"] if id(p) not in names]
        if unknown:
            raise CompileError(
                "the optimizer has parameters that the module lacks",
                found=f"of shapes {', '.join(unknown)}",
                remedy="make the optimizer over module.parameters()",
            )
        groups.append([names[id(p)] for p in group["params"] if p.requires_grad])
    trained = {name for group in groups for name in group}
    missing = [name for name, p in parameters.items() if p.requires_grad and name not in trained]
    if missing:
        raise CompileError(
            "the optimizer lacks parameters of the module",
            found=", ".join(missing),
            remedy="give them to the optimizer, or freeze them with requires_grad_(False)",
        )
    wrong = [name for name in sorted(trained) if parameters[name].dtype != torch.float32]
    if wrong:
        raise CompileError("trained parameters have to be float32", found=", ".join(wrong))
    return groups


def _require_no_hooks(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raise CompileError if there are hooks on gradients or steps: nothing here would call them."""
    hooked = [
        name for name, p in parameters.items() if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    ]
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        hooked.append("the optimizer's step")
    if hooked:
        raise CompileError(
            "hooks are not called in a training step of one graph", found=", ".join(hooked), remedy="remove them"
        )
