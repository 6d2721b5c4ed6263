"""A stage: consecutive layers on one device, with the micro-batches that are in flight there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hetero.backends import CompiledStage, Context, backend

if TYPE_CHECKING:
    from hetero.device import Device

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, targets) -> scalar: the mean over the targets that are not `IGNORED`."""

IGNORED = -100
"""Target that takes no part in the loss, as in torch's `cross_entropy`."""

TARGETS = "targets"
"""Key under which the last stage finds the targets in its context."""


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., V) at targets (...) that are not -100 [nat]."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


class Chain(nn.Module):
    """Units called one after the other; with a loss, its value at the context's targets."""

    def __init__(self, units: Sequence[nn.Module], loss: Loss | None = None) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.loss = loss

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The last unit's output, or the loss."""
        for unit in self.units:
            x = unit(x, context)
        return x if self.loss is None else self.loss(x, context[TARGETS])


class Stage:
    """Layers on a device. Not thread-safe: all calls come from the device's worker.

    A slot is a micro-batch in flight: `forward` fills it with the graph that autograd recorded, `backward` empties it.
    Gradients of parameters add up in `p.grad` in the order of the backward calls.
    """

    def __init__(
        self,
        names: Sequence[str],
        units: Sequence[nn.Module],
        device: Device,
        *,
        index: int = 0,
        loss: Loss | None = None,
        input_grad: bool = True,
    ) -> None:
        """A stage whose modules are moved to where the device's tensors live; nothing is compiled yet.

        Args:
            names: of the layers, for messages.
            units: the layers' modules.
            device: where they run.
            index: of the stage in its pipeline.
            loss: of the last stage in training: its output is the mean loss at `context["targets"]`.
            input_grad: whether `backward` has to return the gradient of the input.
        """
        self.names, self.device, self.index = tuple(names), device, index
        self._backend = backend(device.api)
        self._where = torch.device(self._backend.torch_device(device.name))
        if self._where.type != "cpu":
            for unit in units:
                unit.to(self._where)
        self._chain = Chain(units)
        self._chain_with_loss = self._chain if loss is None else Chain(units, loss)
        self._compiled: dict[Chain, CompiledStage] = {}
        self._input_grad = input_grad
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, slot: int, x: Tensor, context: Context) -> Tensor:
        """The stage's output (the last one's: the mean loss, a scalar), without history; the slot keeps the graph.

        Args:
            slot: number of the micro-batch.
            x: (B, ...) input; its gradient is not recorded in it.
            context: tensors with B as first dimension; a last stage finds its targets there.
        """
        x, context = self._here(x, context)
        if self._input_grad and x.is_floating_point():
            x.requires_grad_()
        with torch.enable_grad():
            y = self._run(self._chain_with_loss, x, context)
        self._slots[slot] = (x, y)
        return y.detach()

    def infer(self, x: Tensor, context: Context) -> Tensor:
        """As `forward`, with nothing kept."""
        with torch.no_grad():
            return self._run(self._chain_with_loss, *self._here(x, context))

    def backward(self, slot: int, grad: Tensor | None) -> Tensor | None:
        """Add the parameters' gradients and give the input's.

        Args:
            slot: number of the micro-batch.
            grad: of the output; None: nothing depends on it.

        Returns:
            Gradient of the input; None where it isn't wanted or nothing depends on the input.
        """
        x, y = self._slots.pop(slot)
        if grad is None or not y.requires_grad:
            return None
        torch.autograd.backward(y, grad.to(y))
        return x.grad

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        """The layers' output within the caller's autograd graph, without the loss, in the caller's thread."""
        _, context = self._here(x, context)
        return self._run(self._chain, x.to(self._where), context)

    def is_trainable(self) -> bool:
        """Whether any of its parameters wants a gradient now."""
        return any(parameter.requires_grad for parameter in self._chain.parameters())

    def zero_grad(self) -> None:
        """Forget the parameters' gradients."""
        self._chain.zero_grad()

    def clear(self) -> None:
        """Empty all slots."""
        self._slots.clear()

    def sync(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self._where.type == "cuda":
            torch.cuda.synchronize(self._where)

    def launches(self) -> dict[str, int]:
        """Launches on the device so far, by op."""
        return self._backend.launches(self.device.name)

    def _here(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        x = x.detach().to(self._where)  # between devices of the host the same memory: `to` then copies nothing
        if self._where.type != "cpu":
            context = {key: value.to(self._where) for key, value in context.items()}
        return x, context

    def _run(self, chain: Chain, x: Tensor, context: Context) -> Tensor:
        compiled = self._compiled.get(chain)
        if compiled is None:
            compiled = self._backend.compile(chain, (x, context), self.device.name)
            self._compiled[chain] = compiled
        return compiled(x, context)
