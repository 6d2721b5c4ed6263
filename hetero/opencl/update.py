"""Launches that end a training step: clipping and the optimizer, over pieces of the weights' regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetero.opencl.ir import Launch, Root, View, vector
from hetero.opencl.optimizers import Clipping, clear, clip, n_partial

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.opencl.program import Device
    from hetero.opencl.weights import Run, Weights


class Update:
    """Launches of clipping and the optimizer, and the pieces of the weights' regions that they use."""

    def __init__(self, runs: Sequence[Run], weights: Weights, clip_norm: float | None, device: Device) -> None:
        self.launches: list[Launch] = []
        self._runs, self._pieces = runs, [_Pieces.of(run, weights) for run in runs]
        target, clipping = device.capabilities, None
        gradients = [pieces.gradient for pieces in self._pieces]
        if clip_norm is not None and gradients:
            self.launches += [zeros for pieces in self._pieces for zeros in clear(pieces.gradient, pieces.gaps)]
            n = sum(n_partial(gradient.numel) for gradient in gradients)
            clipping = Clipping(_scratch(n, "partial norms"), _scratch(1, "clipping factor"), _scratch(1, "norm"))
            self.launches += clip(gradients, clipping, clip_norm, target)
        for k, pieces in enumerate(self._pieces):
            factor = None if clipping is None else clipping.factor
            p, gradient, states = pieces.parameter, pieces.gradient, pieces.states
            self.launches.append(weights.rule.launch(p, gradient, states, factor, prefix=str(k), target=target))

    @property
    def gradients(self) -> list[Root]:
        """Roots of the gradients, one a run."""
        return [pieces.gradient.root for pieces in self._pieces]

    def places(self, weights: Weights) -> dict[Root, Any]:
        """Buffers of the parameters and the optimizer's state."""
        regions = (weights.region, *weights.states.values())
        return {
            view.root: region.part(run.offset, view.root.nbytes)
            for run, pieces in zip(self._runs, self._pieces, strict=True)
            for region, view in zip(regions, (pieces.parameter, *pieces.states), strict=True)
        }

    def inside(self, weights: Weights) -> dict[str, tuple[int, int]]:
        """Where the gradient of each parameter lies: which of `gradients`, and offset in it [B]."""
        return {name: (k, weights.offsets[name] - run.offset) for k, run in enumerate(self._runs) for name in run.names}


@dataclass(frozen=True)
class _Pieces:
    """A run's part of each region as a vector; all gradients of the run; (first, number) of elements between them."""

    parameter: View
    gradient: View
    states: tuple[View, ...]
    gaps: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, run: Run, weights: Weights) -> _Pieces:
        def piece(kind: str, name: str) -> View:
            return vector(Root(kind, run.nbytes, name))

        states = tuple(piece("resident", name) for name in weights.states)
        return cls(piece("resident", "parameters"), piece("scratch", "gradients"), states, weights.gaps(run))


def _scratch(n: int, name: str) -> View:
    return vector(Root("scratch", 4 * n, name))
