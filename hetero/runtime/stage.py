"""A stage: consecutive layers on one device, with the micro-batches that are in flight there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hetero.backends import CompiledStage, Context, backend
from hetero.errors import StageError

if TYPE_CHECKING:
    from hetero.device import Device

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, targets) -> scalar: the mean over the targets that are not `IGNORED`."""

Cache = tuple[Tensor, ...]
"""What a stage remembers of the tokens before, in shapes that never change."""

IGNORED = -100
"""Target that takes no part in the loss, as in torch's `cross_entropy`."""

TARGETS = "targets"
"""Key under which the last stage finds the targets in its context."""


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., V) at targets (...) that are not -100 [nat]."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


class Chain(nn.Module):
    """Units called one after the other; with a loss, its value at the context's targets.

    Attributes:
        recomputed: indices of units that keep their input only and run again in the backward pass, the last one with
            the loss. They have to give the same again: torch's random state is restored, in no other thread.
    """

    def __init__(self, units: Sequence[nn.Module], loss: Loss | None = None, recomputed: Collection[int] = ()) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.loss = loss
        self.recomputed = frozenset(recomputed)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The last unit's output, or the loss."""
        for i in range(len(self.units)):
            if i in self.recomputed and torch.is_grad_enabled():
                x = checkpoint(self._unit, i, x, context, use_reentrant=False)
            else:
                x = self._unit(i, x, context)
        return x

    def _unit(self, i: int, x: Tensor, context: Context) -> Tensor:
        y: Tensor = self.units[i](x, context)
        return y if self.loss is None or i < len(self.units) - 1 else self.loss(y, context[TARGETS])


class Decoding(nn.Module):
    """Units called for the next tokens of sequences; what they remember travels in the context and comes back.

    Attributes:
        sizes: of each unit's cache, a tuple of so many tensors.
    """

    def __init__(self, units: Sequence[nn.Module], sizes: Sequence[int]) -> None:
        super().__init__()
        self.units, self.sizes = nn.ModuleList(units), tuple(sizes)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        """The last unit's output, and the cache after these tokens.

        Args:
            x: (B, T, ...) input for tokens that start at `context["position"]` () int64.
            context: tensor k of the cache is `context[str(k)]`.
        """
        after: list[Tensor] = []
        for unit, size in zip(self.units, self.sizes, strict=True):
            cache = tuple(context[str(k)] for k in range(len(after), len(after) + size))
            x, cache = unit.decode(x, cache, context["position"])  # type: ignore[operator]  # any module that has it
            after += cache
        return x, *after


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
        recomputed: Collection[str] = (),
    ) -> None:
        """A stage whose modules are moved to where the device's tensors live; nothing is compiled yet.

        Args:
            names: of the layers, for messages.
            units: the layers' modules.
            device: where they run.
            index: of the stage in its pipeline.
            loss: of the last stage in training: its output is the mean loss at `context["targets"]`.
            input_grad: whether `backward` has to return the gradient of the input.
            recomputed: names of layers that run again in their backward pass instead of keeping what they saved.
        """
        self.names, self.device, self.index = tuple(names), device, index
        self._backend = backend(device.api)
        self._where = torch.device(self._backend.torch_device(device.name))
        for unit in units:
            unit.to(self._where)
        again = [i for i, name in enumerate(names) if name in recomputed]
        self._chain = Chain(units, recomputed=again)
        self._chain_with_loss = self._chain if loss is None else Chain(units, loss, again)
        self._decoding: Decoding | None = None
        self._compiled: dict[nn.Module, CompiledStage] = {}
        self._input_grad = input_grad
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, slot: int, x: Tensor, context: Context) -> Tensor:
        """The stage's output (the last one's: the mean loss, a scalar), without history; the slot keeps the graph.

        Args:
            slot: number of the micro-batch.
            x: (B, ...) input; its gradient is not recorded in it.
            context: tensors with B as first dimension; a last stage finds its targets there.
        """
        x, context = self.here(x, context)
        if self._input_grad and x.is_floating_point():
            x.requires_grad_()
        with torch.enable_grad():
            y: Tensor = self._run(self._chain_with_loss, x, context)
        self._slots[slot] = (x, y)
        return y.detach()

    def infer(self, x: Tensor, context: Context) -> Tensor:
        """As `forward`, with nothing kept."""
        with torch.no_grad():
            y: Tensor = self._run(self._chain_with_loss, *self.here(x, context))
        return y

    def new_cache(self, batch_size: int) -> Cache:
        """What `decode` remembers of the tokens before, of none yet: what the units' `new_cache` give, in a row.

        Raises:
            StageError: a unit can't decode.
        """
        for name, unit in zip(self.names, self._chain.units, strict=True):
            if not hasattr(unit, "decode"):
                raise StageError(f"layer {name!r} can't decode", expected="methods new_cache and decode")
        caches = [unit.new_cache(batch_size) for unit in self._chain.units]  # type: ignore[operator]
        if self._decoding is None:
            self._decoding = Decoding(list(self._chain.units), [len(cache) for cache in caches])
        return tuple(tensor for cache in caches for tensor in cache)

    def decode(self, x: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """The layers' output for the next tokens of sequences, on the device, in the caller's thread.

        Args:
            x: (B, T, ...) input.
            cache: of `new_cache` or of the call before.
            position: () int64, number of tokens before these.
        """
        assert self._decoding is not None, "new_cache comes first"
        context = {"position": position, **{str(k): tensor for k, tensor in enumerate(cache)}}
        with torch.no_grad():
            y, *after = self._run(self._decoding, *self.here(x, context))
        return y, tuple(after)

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
        _, context = self.here(x, context)
        y: Tensor = self._run(self._chain, x.to(self._where), context)
        return y

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

    def memory_bytes(self) -> tuple[int, int]:
        """What a slot keeps on the device, and what all calls share there [B]; 0 where no backend plans memory."""
        known = [compiled.memory_bytes() for compiled in self._compiled.values() if hasattr(compiled, "memory_bytes")]
        return max((call for call, _ in known), default=0), max((scratch for _, scratch in known), default=0)

    def launches(self) -> dict[str, int]:
        """Launches on the device so far, by op."""
        return self._backend.launches(self.device.name)

    def here(self, x: Tensor, context: Context) -> tuple[Tensor, Context]:
        """An input without history, and its context, where the device's tensors live.

        Between devices of the host that is the same memory, and nothing is copied.
        """
        return x.detach().to(self._where), {key: value.to(self._where) for key, value in context.items()}

    def _run(self, chain: nn.Module, x: Tensor, context: Context) -> Any:
        compiled = self._compiled.get(chain)
        if compiled is None:
            compiled = self._backend.compile(chain, (x, context), self.device.name)
            self._compiled[chain] = compiled
        return compiled(x, context)
