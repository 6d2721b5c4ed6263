"""Masked language modelling: what an encoder is given, and what it has to guess.

Source: Devlin et al., "BERT: Pre-training of deep bidirectional transformers", 2019, section 3.1, task 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.data import MASKING, Batch, row_counters
from lm.draws import draw

# Of the chosen tokens 80 % are masked, 10 % replaced by another, 10 % left: shares of the 2**32 numbers of a draw.
_MASKED, _REPLACED = round(0.8 * (1 << 32)), round(0.9 * (1 << 32))
# Streams of a row's numbers; dropouts, which may share its counter, have those from 0 up.
_CHOICE, _FATE, _TOKEN = -1, -2, -3


def mask_tokens(
    tokens_BT: Tensor, rows_B: Tensor, *, mask_token: int, p: float = 0.15, is_real_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of masked language modelling, as a pure function of the arguments.

    In each row a share p of the tokens is chosen, and one at least, as in BERT's own `create_pretraining_data.py`. In
    the inputs 80 % of the chosen are the mask, 10 % any token of the vocabulary, 10 % themselves.

    Args:
        tokens_BT: (B, T) int64.
        rows_B: (B,) int64, one counter a row.
        mask_token: number of the mask; the vocabulary's tokens are those below it.
        p: share of tokens to guess.
        is_real_BT: (B, T) bool, False for padding, which is never chosen; None: there is none.

    Returns:
        Inputs, and targets that are -100 where nothing is to be guessed, both (B, T) int64.
    """
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if is_real_BT is None else is_real_BT
    shape = (tokens_BT.shape[1],)
    order_BT = draw(rows_B, _CHOICE, shape).masked_fill(~real_BT, 1 << 32)
    rank_BT = order_BT.argsort(dim=1, stable=True).argsort(dim=1)
    n_chosen_B1 = (real_BT.sum(1, keepdim=True) * p).round().clamp(min=1)
    is_chosen = (rank_BT < n_chosen_B1) & real_BT

    fate_BT = draw(rows_B, _FATE, shape)
    other_BT = (draw(rows_B, _TOKEN, shape) * mask_token) >> 32  # uniform below mask_token, to mask_token / 2**32
    inputs_BT = torch.where(is_chosen & (fate_BT < _REPLACED), other_BT, tokens_BT)
    inputs_BT = inputs_BT.masked_fill(is_chosen & (fate_BT < _MASKED), mask_token)
    return inputs_BT, tokens_BT.masked_fill(~is_chosen, -100)


def mask_batch(batch: Batch, *, seed: int, step: int, mask_token: int, p: float = 0.15) -> Batch:
    """A batch for a decoder as one for an encoder, which guesses tokens of the inputs themselves.

    Args:
        batch: of `Corpus.batch` or `Corpus.windows`; inputs without target are padding.
        seed: of the run.
        step: number of the training step.
        mask_token: see `mask_tokens`.
        p: see `mask_tokens`.

    Returns:
        The batch with masked inputs, their targets, and `context["mask"]` where there is padding.
    """
    real_BT = batch.targets != -100
    rows_B = torch.from_numpy(row_counters(seed, step, len(real_BT), MASKING).view("int64"))
    inputs_BT, targets_BT = mask_tokens(batch.inputs, rows_B, mask_token=mask_token, p=p, is_real_BT=real_BT)
    padding = {} if bool(real_BT.all()) else {"mask": real_BT}
    return Batch(inputs_BT, targets_BT, {**batch.context, **padding})
