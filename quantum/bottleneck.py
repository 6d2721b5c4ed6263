"""What puts a circuit into a residual unit, and the classical twin that has to be beaten."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantum.errors import QuantumError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Bottleneck(nn.Module):
    """Projects `(..., d_model)` down to `width` angles within (-pi, pi), applies a core, projects up again.

    Args:
        d_model: width D of the model.
        width: width of the core (qubits).
        core: any module `(..., width) -> (..., width)`.
        generator: of the initial weights of both projections (as torch's `nn.Linear`: uniform within 1/sqrt(fan in)).

    If the core declares where it can run (`device_apis`) and what it costs (`layer_cost`), so does the bottleneck.

    Raises:
        QuantumError: the core is a circuit of another width.
    """

    def __init__(self, d_model: int, width: int, core: nn.Module, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        expected = getattr(core, "n_qubits", width)
        if expected != width:
            raise QuantumError("the core does not fit the bottleneck", found=f"width={width}", expected=f"{expected}")
        self.d_model, self.width = d_model, width
        self.down = _linear(d_model, width, generator)
        self.core = core
        self.up = _linear(width, d_model, generator)

    @property
    def device_apis(self) -> frozenset[str]:
        """Where the core can run; no such attribute where the core has none: then it runs anywhere."""
        return self.core.device_apis  # type: ignore[return-value]

    @property
    def layer_cost(self) -> Callable[[str, tuple[int, ...]], dict[str, Any]]:
        """The core's `layer_cost(api, shape)` plus both projections; no such attribute where the core has none."""
        core_cost: Any = self.core.layer_cost

        def cost(api: str, shape: tuple[int, ...]) -> dict[str, Any]:
            rows = math.prod(shape[:-1])
            inner: dict[str, Any] = core_cost(api, (rows, self.width))
            moved = 4.0 * (2 * self.d_model * self.width + 2 * rows * (self.d_model + self.width))
            projections = 4.0 * rows * self.d_model * self.width
            return inner | {"flops": inner["flops"] + projections, "bytes": inner["bytes"] + moved}

        return cost

    def forward(self, x: torch.Tensor, context: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """`(..., D)` to `(..., D)`; the context of a residual unit is not needed here."""
        return self.up(self.core(math.pi * torch.tanh(self.down(x))))  # type: ignore[no-any-return]

    def flops(self, shape: tuple[int, ...]) -> float:
        """Of a forward pass of `(..., D)`, both projections, and the core's where it tells them."""
        rows = math.prod(shape[:-1])
        core: Any = self.core
        inner: float = core.flops((rows, self.width)) if hasattr(core, "flops") else 0.0
        return 4.0 * rows * self.d_model * self.width + inner


class TanhMLP(nn.Module):
    """The circuit's classical twin: a tanh network of matched size, its output within [-1, 1] as <Z_i> is.

        y = tanh(V tanh(W x) + b + s * x)

    Like the circuit it can pass all n inputs on: the diagonal skip s starts at 1, the network beside it corrects. A
    circuit of n qubits and L layers has 3 n L parameters; h hidden units, b and s have 2 n (h + 1). So for even L the
    twin has exactly as many, for odd L it has n more.

    Args:
        n_qubits: width n of input and output.
        n_circuit_layers: L of the circuit to be matched.
        generator: of the initial weights: W, V and b as torch's `nn.Linear` has them.
    """

    def __init__(self, n_qubits: int, n_circuit_layers: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if n_qubits < 1 or n_circuit_layers < 1:
            raise QuantumError(
                "the twin needs a circuit with qubits and layers",
                found=f"n_qubits={n_qubits}, n_circuit_layers={n_circuit_layers}",
                expected="integers of at least 1",
            )
        self.n_qubits = n_qubits
        hidden = (3 * n_circuit_layers + 1) // 2 - 1
        self.hidden = _linear(n_qubits, hidden, generator, bias=False)
        self.out = _linear(hidden, n_qubits, generator)
        self.skip = nn.Parameter(torch.ones(n_qubits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., n)` to `(..., n)`."""
        return torch.tanh(self.out(torch.tanh(self.hidden(x))) + self.skip * x)

    def flops(self, shape: tuple[int, ...]) -> float:
        """Of a forward pass of `(..., n)`: both matrix products."""
        return 4.0 * math.prod(shape[:-1]) * self.n_qubits * self.hidden.out_features


def _linear(fan_in: int, fan_out: int, generator: torch.Generator | None, *, bias: bool = True) -> nn.Linear:
    """A linear layer whose weights come from `generator`: uniform within 1/sqrt(fan in), as in `nn.Linear`."""
    layer = nn.Linear(fan_in, fan_out, bias=bias, device="meta").to_empty(device="cpu")  # draws nothing itself
    bound = 1.0 / math.sqrt(fan_in)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
