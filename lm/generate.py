"""Text from a model, with a cache of keys and values."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lm.errors import SettingError


class Layered(Protocol):
    """A model or a placed model."""

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Units in order; each offers `new_cache(batch_size, dtype)` and `decode(x, cache, position)`."""


@torch.no_grad()
def generate(
    model: Layered,
    tokens: Tensor,
    n: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seq_len: int | None = None,
) -> Tensor:
    """Continue token sequences.

    The model always sees the last `seq_len` tokens, the first of them at position 0. Up to `seq_len` tokens the cache
    holds what was computed; beyond, each new token moves all positions, so the window is computed anew.

    Args:
        model: anything with `layers()`.
        tokens: (B, T) int64 with T >= 1; of a longer prompt than `seq_len` the model sees the end.
        n: number of tokens to append.
        generator: source of the draws (CPU); None: torch's default generator. Not used where temperature is 0.
        temperature: divides the logits; 0: the most likely token (the first of equals).
        top_k: draw among this many most likely tokens; None: all.
        seq_len: longest sequence of the model; None: `model.config.seq_len`.

    Returns:
        (B, T + n) int64: prompt and continuation.

    Raises:
        SettingError: empty prompt or negative n, temperature or top_k.
    """
    _check(tokens, n, temperature, top_k)
    window = _window(model, seq_len)
    units = [unit for _, unit in model.layers()]
    dtype, devices = _dtype(units), _devices(units, tokens.device)
    caches: list[Any] = []
    used = 0  # tokens in the caches
    for _ in range(n):
        if tokens.shape[1] > window or not caches:
            caches = [cast("Any", unit).new_cache(tokens.shape[0], dtype) for unit in units]
            new, used = tokens[:, -window:], 0
        else:
            new = tokens[:, used:]
        logits_BV = _decode(units, devices, caches, new, used)
        used += new.shape[1]
        tokens = torch.cat([tokens, _choose(logits_BV, generator, temperature, top_k).to(tokens.device)], dim=1)
    return tokens


def _decode(
    units: list[nn.Module], devices: list[torch.device], caches: list[Any], tokens_BT: Tensor, position: int
) -> Tensor:
    """Logits (B, V) after the last of these tokens, which start at `position`."""
    x = tokens_BT
    for unit, device, cache in zip(units, devices, caches, strict=True):
        x = cast("Any", unit).decode(x.to(device), cache, position)
    return x[:, -1]


def _dtype(units: list[nn.Module]) -> torch.dtype:
    """The model's floating-point type, that of its first parameter."""
    return next((p.dtype for unit in units for p in unit.parameters()), torch.get_default_dtype())


def _devices(units: list[nn.Module], device: torch.device) -> list[torch.device]:
    """Where each unit's parameters live; a unit without any works where its input is."""
    devices = []
    for unit in units:
        device = next((p.device for p in unit.parameters()), device)
        devices.append(device)
    return devices


def _choose(logits_BV: Tensor, generator: torch.Generator | None, temperature: float, top_k: int | None) -> Tensor:
    """One token a row, (B, 1) int64."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV.float().cpu() / temperature
    if top_k is not None and top_k < logits_BV.shape[1]:
        best_BK, index_BK = logits_BV.topk(top_k)
        drawn_B1 = torch.multinomial(best_BK.softmax(dim=-1), 1, generator=generator)
        return index_BK.gather(1, drawn_B1)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)


def _window(model: Layered, seq_len: int | None) -> int:
    if seq_len is not None:
        return seq_len
    config = getattr(model, "config", None) or model.layers()[0][1]
    found = getattr(config, "seq_len", None)
    if found is None:
        raise SettingError("the model doesn't say how long its sequences may be", remedy="give seq_len")
    return int(found)


def _check(tokens: Tensor, n: int, temperature: float, top_k: int | None) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise SettingError(
            "a prompt needs at least one token", found=f"shape {tuple(tokens.shape)}", expected="(B, T), T >= 1"
        )
    for name, value, least in (("n", n, 0), ("temperature", temperature, 0), ("top_k", top_k, 1)):
        if value is not None and not value >= least:
            raise SettingError(f"{name} is out of range", found=str(value), expected=f"at least {least}")
