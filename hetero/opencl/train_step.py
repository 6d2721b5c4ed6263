"""A training step as one graph: forward, loss, backward, clipping and optimizer on the device that holds the weights.

    step = hetero.opencl.TrainStep(model, loss, optimizer, device="opencl:0", clip_norm=1.0)
    for tokens, targets in batches:
        value = step(tokens, targets)

Weights, gradients and the optimizer's state stay on the device; a step moves the batch in and the loss out. Nothing is
saved between a forward and a backward pass, since there is one graph: activations lie in the arena and share memory
as soon as their last reader has run.
"""

from __future__ import annotations

import functools
import types
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from hetero.opencl.backend import fail_on_recompile_limit, never_eager
from hetero.opencl.capture import capture
from hetero.opencl.errors import CompileError
from hetero.opencl.program import open_device
from hetero.opencl.step_program import Arena, StepProgram
from hetero.opencl.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.fx import GraphModule


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step [B]: what was planned and allocated before its first launch.

    Attributes:
        weight_bytes: parameters and buffers.
        state_bytes: state of the optimizer.
        arena_bytes: activations and everything temporary; with one micro-batch gradients as well.
        kept_bytes: gradients and packed weights, kept from one micro-batch to the next.
    """

    weight_bytes: int
    state_bytes: int
    arena_bytes: int
    kept_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All together."""
        return self.weight_bytes + self.state_bytes + self.arena_bytes + self.kept_bytes


class TrainStep:
    """Trains a module; called step(*inputs, target), it returns loss(module(*inputs), target), () float32.

    While the step exists it owns the weights. On a device that shares the host's memory the module's parameters lie in
    the device's memory: the module always shows the newest ones, and changes of them count. Elsewhere they are copied
    to the module by `write_back`, `close` and every `state_dict()`, from it by `upload` and every `load_state_dict()`.
    Parameters get no `.grad`, and hooks are refused. TorchDynamo's guards decide which program a call runs: other
    shapes, other settings of the module or a parameter frozen since compile once more.

    Args:
        module: its parameters are float32, on the host.
        loss: (output of the module, target) -> one number.
        optimizer: torch.optim.AdamW, Adam or SGD over the module's parameters; its state goes on from where it is, its
            hyperparameters are read at every step.
        device: name of an OpenCL device.
        n_microbatches: equal parts that each batch is divided into, along the first dimension of all its tensors; the
            step trains the mean of their losses. Activations need the memory of one part only.
        clip_norm: the gradients' largest norm, None for no clipping; see torch.nn.utils.clip_grad_norm_.
        generator: of the host, where dropout's seeds come from; None is torch's default one.
        memory: "copy": as on a device with memory of its own, wherever it is.

    Raises:
        CompileError: a module, optimizer or option that is not for it.
        DeviceError: no such device.
        UnsupportedOperationError: at the first call, an operation without kernel.
        OutOfDeviceMemory: it does not fit.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Callable[[Any, torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        device: str = "opencl:0",
        n_microbatches: int = 1,
        clip_norm: float | None = None,
        generator: torch.Generator | None = None,
        memory: str | None = None,
    ) -> None:
        if memory not in (None, "copy"):
            raise CompileError("unknown memory mode", found=repr(memory), expected='None or "copy"')
        if clip_norm is not None and not clip_norm > 0:
            raise CompileError("clip_norm has to be positive", found=repr(clip_norm), expected="a norm, or None")
        if not isinstance(n_microbatches, int) or n_microbatches < 1:
            raise CompileError("bad n_microbatches", found=repr(n_microbatches), expected="a whole number, at least 1")
        self.module, self.optimizer, self._n_microbatches = module, optimizer, n_microbatches
        self._loss, self._clip_norm, self._generator = loss, clip_norm, generator
        self._device = open_device(device)
        self._weights = Weights(module, optimizer, self._device, is_copied=memory == "copy")
        self._arena = Arena(self._device, is_shared=self._weights.is_shared)
        self._programs: list[StepProgram] = []
        self._is_closed, self._microbatch = False, -1
        self._result = torch.empty(())
        code = _step.__code__.replace(co_name="opencl_train_step")  # no other step counts against its recompile limit
        backend = functools.partial(_compile_step, self)
        self._compiled = torch.compile(
            types.FunctionType(code, globals()), backend=backend, fullgraph=True, dynamic=False
        )
        self._hooks = [
            optimizer.register_state_dict_pre_hook(lambda _: self.write_back()),
            optimizer.register_load_state_dict_post_hook(lambda _: self._load_states()),
            module.register_state_dict_pre_hook(lambda *_: self.write_back()),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_post_hook(lambda *_: self.upload()),  # type: ignore[no-untyped-call]
        ]

    def __call__(self, *batch: Any) -> torch.Tensor:
        """One step; returns the loss before the update, () float32.

        Raises:
            CompileError: see `TrainStep`; or a batch that can't be divided into equal micro-batches.
        """
        self._require_open()
        with self._held():
            self._weights.adopt()
        for i in range(self._n_microbatches):
            self._microbatch, self._result = i, torch.empty(0)
            self._call(_microbatch(batch, i, self._n_microbatches))
            if self._result.numel() == 0:
                raise CompileError(
                    "the training step ran on the host", found="torch.compile is switched off", remedy="switch it on"
                )
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # so that schedulers know of the step
        return self._result

    def _call(self, batch: tuple[Any, ...]) -> None:
        """Let TorchDynamo find the program, by its guards, or make one; the program runs."""
        try:
            self._compiled(self.module, self._loss, batch)
        except torch._dynamo.exc.Unsupported as error:
            raise CompileError("the training step is no single graph", found=str(error).strip()) from None
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise CompileError(
                "too many different steps",
                found=str(error).strip().splitlines()[0],
                remedy="batches of fewer shapes, or a larger torch._dynamo.config.recompile_limit",
            ) from None

    def memory(self) -> StepMemory | None:
        """Memory of the largest step so far; None before the first."""
        if not self._programs:
            return None
        kept = sum(program.kept_bytes for program in self._programs)
        arena = max(program.arena_bytes for program in self._programs)
        return StepMemory(self._weights.region.nbytes, self._weights.state_bytes, arena, kept)

    def write_back(self) -> None:
        """Make the module's parameters and the optimizer's state those of the device.

        `state_dict()` of module and optimizer do it by themselves.
        """
        self._require_open()
        with self._held():
            self._weights.write_back()

    def upload(self) -> None:
        """Bring the module's values to the device, after changes in place on a device with memory of its own.

        `load_state_dict()` of module and optimizer do it by themselves.
        """
        self._require_open()
        with self._held():
            self._weights.upload()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the module's state, as it is on the device."""
        self._require_open()
        with torch.inference_mode(mode=False), torch.no_grad():
            return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load the module's state and bring it to the device."""
        self._require_open()
        self.module.load_state_dict(state)

    def close(self) -> None:
        """Write back and give the weights memory of their own; the step can't be used any more."""
        if self._is_closed:
            return
        with self._held():
            self._weights.release()
        for hook in self._hooks:
            hook.remove()
        self._is_closed, self._programs = True, []
        del self._compiled, self._arena

    def __enter__(self) -> TrainStep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load_states(self) -> None:
        with self._held():
            self._weights.load_states()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The device for this thread alone, and plain tensors whatever mode the caller is in."""
        with self._device.lock, torch.inference_mode(mode=False), torch.no_grad():
            yield

    def _require_open(self) -> None:
        if self._is_closed:
            raise CompileError("the training step is closed", remedy="make a new one")


def _step(module: torch.nn.Module, loss: Callable[..., torch.Tensor], batch: tuple[Any, ...]) -> torch.Tensor:
    return loss(module(*batch[:-1]), batch[-1])


@never_eager
def _compile_step(step: TrainStep, gm: GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
    """Backend of torch.compile: what runs is the whole step, and its result is left where the step looks for it."""
    fail_on_recompile_limit()
    joint = capture(gm, example)
    with unset_fake_temporarily():
        program = StepProgram(
            joint,
            step._device,
            step._weights,
            step._arena,
            n_microbatches=step._n_microbatches,
            clip_norm=step._clip_norm,
            generator=step._generator,
        )
    step._programs.append(program)

    def run(*inputs: Any) -> tuple[torch.Tensor]:
        step._result = program.run(inputs, step._microbatch)
        return (step._result,)

    return run


def _microbatch(batch: tuple[Any, ...], i: int, n: int) -> tuple[Any, ...]:
    """The i-th of n equal parts of a batch."""
    if n == 1:
        return batch

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            if leaf is None or isinstance(leaf, (bool, int, float, str)):
                return leaf
            raise CompileError("micro-batches are made of tensors", found=f"a {type(leaf).__name__} in the batch")
        rows = leaf.shape[0] if leaf.dim() else 0
        if rows == 0 or rows % n:
            raise CompileError(
                "the batch can't be divided into equal micro-batches",
                found=f"a tensor of shape {tuple(leaf.shape)}, n_microbatches={n}",
                expected="a first dimension that is a multiple of n_microbatches, for all tensors",
            )
        return leaf[i * (rows // n) : (i + 1) * (rows // n)]

    parts: tuple[Any, ...] = pytree.tree_map(part, batch)
    return parts
