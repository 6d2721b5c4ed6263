"""Random numbers that are pure functions of (row counter, stream, element), and the dropout made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Context = Mapping[str, Tensor]
"""Non-differentiable tensors beside the activations, each with the batch as first dimension."""

_M32 = 0xFFFFFFFF
# Multipliers of lowbias32 (C. Wellons, github.com/skeeto/hash-prospector, bias 0.17): 0x7FEB352D and 0x846CA68B, the
# second written modulo 2**32 as a negative number. |multiplier| < 2**31 times an operand < 2**32 stays inside int64,
# so no device ever meets a signed overflow, which C and OpenCL leave undefined.
_MUL1, _MUL2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
# Spreads the streams over the 32-bit keys: 2**32 / golden ratio (Knuth, TAOCP 3, section 6.4), likewise modulo 2**32.
_GOLDEN = 0x9E3779B9 - (1 << 32)


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """lowbias32 of x in [0, 2**32), with a second key entering between its two rounds."""
    x = x ^ (x >> 16)
    x = (x * _MUL1) & _M32
    x = x ^ (x >> 15) ^ key
    x = (x * _MUL2) & _M32
    return x ^ (x >> 16)


def draw(rows_B: Tensor, stream: Tensor | int, shape: tuple[int, ...]) -> Tensor:
    """Numbers that are uniform in [0, 2**32).

    An integer hash in plain int64 operations, so that every device computes the same bits. It depends on all 64 bits
    of a row's counter.

    Args:
        rows_B: (B,) int64, one counter a row.
        stream: () int64; streams have nothing to do with each other.
        shape: of the numbers of a row, fewer than 2**32.

    Returns:
        (B, *shape) int64.
    """
    low_B = _mix(((rows_B & _M32) + stream * _GOLDEN) & _M32)
    high_B = _mix(((rows_B >> 32) & _M32) ^ low_B)
    element = torch.arange(math.prod(shape), device=rows_B.device, dtype=torch.int64).view(1, *shape)
    ones = [1] * len(shape)
    return _mix(element ^ low_B.view(-1, *ones), high_B.view(-1, *ones))


def keep_mask(rows: Tensor, layer: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """Which elements a dropout keeps.

    Args:
        rows: (B,) int64, one counter a row.
        layer: () int64, number of the dropout in the model.
        shape: (T, D) of a row; T * D < 2**32.
        p: probability of dropping an element.

    Returns:
        (B, T, D) bool, True with probability 1 - p (to 2**-32).
    """
    return draw(rows, layer, shape) >= round(p * (1 << 32))


class Dropout(nn.Module):
    """Inverted dropout whose mask comes from `context["dropout"]`; without that key it is the identity."""

    layer: Tensor

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p = p
        # A buffer and no Python int: the layers' compiled graphs stay equal. It is no state, hence not in state_dict.
        self.register_buffer("layer", torch.tensor(layer, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Zero elements with probability p and scale the others by 1 / (1 - p)."""
        if self.p == 0.0 or context is None or "dropout" not in context:
            return x_BTD
        keep = keep_mask(context["dropout"], self.layer, (x_BTD.shape[1], x_BTD.shape[2]), self.p)
        return x_BTD * (keep.to(x_BTD.dtype) * (1.0 / (1.0 - self.p)))
