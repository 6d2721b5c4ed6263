"""Text from a model, with a cache of keys and values."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lm.errors import SettingError


class Decoder(Protocol):
    """A model or a placed model."""

    def new_cache(self, batch_size: int) -> Any:
        """What `decode` remembers of the tokens before: of none yet."""

    def decode(self, tokens: Tensor, cache: Any, position: Tensor) -> tuple[Tensor, Any]:
        """Logits (B, T, V) of tokens (B, T) that start at `position` () int64, and the cache with them in it."""


@torch.no_grad()
def generate(
    model: Decoder,
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
        model: an `lm.Transformer`, or one that is placed; its stages then decode on their devices.
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
    cache, used = None, 0  # `used` tokens are in the cache
    for _ in range(n):
        if tokens.shape[1] > window or cache is None:
            cache, used = model.new_cache(tokens.shape[0]), 0
            new = tokens[:, -window:]
        else:
            new = tokens[:, used:]
        # A slice has strides of the whole, which grows: graphs compiled for strides would never be met again.
        new = new.clone(memory_format=torch.contiguous_format)
        logits_BTV, cache = model.decode(new, cache, torch.tensor(used))
        used += new.shape[1]
        tokens = torch.cat([tokens, _choose(logits_BTV[:, -1], generator, temperature, top_k).to(tokens.device)], dim=1)
    return tokens


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


def _window(model: Decoder, seq_len: int | None) -> int:
    longest: int | None = getattr(getattr(model, "config", None), "seq_len", None)
    wanted = longest if seq_len is None else seq_len
    if wanted is None:
        raise SettingError("the model doesn't say how long its sequences may be", remedy="give seq_len")
    if not 1 <= wanted <= (longest or wanted):
        raise SettingError("seq_len is out of range", found=str(wanted), expected=f"1 to {longest}, the model's own")
    return wanted


def _check(tokens: Tensor, n: int, temperature: float, top_k: int | None) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise SettingError(
            "a prompt needs at least one token", found=f"shape {tuple(tokens.shape)}", expected="(B, T), T >= 1"
        )
    for name, value, least in (("n", n, 0), ("temperature", temperature, 0), ("top_k", top_k, 1)):
        if value is not None and not value >= least:
            raise SettingError(f"{name} is out of range", found=str(value), expected=f"at least {least}")
