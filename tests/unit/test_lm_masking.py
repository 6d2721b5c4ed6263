"""Masked language modelling: which tokens are chosen, what becomes of them, and training on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

import lm
from lm.data import MASKING, row_counters

if TYPE_CHECKING:
    from pathlib import Path

MASK = 50


def _rows(n: int, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(row_counters(7, step, n, MASKING).view("int64"))


def _tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(0, MASK, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize(("length", "chosen"), [(1, 1), (2, 1), (9, 1), (10, 2), (100, 15), (128, 19)])
def test_each_row_has_its_share_of_targets(length: int, chosen: int) -> None:
    tokens = _tokens(6, length)
    inputs, targets = lm.mask_tokens(tokens, _rows(6), mask_token=MASK)
    assert (targets != -100).sum(1).tolist() == [chosen] * 6
    assert torch.equal(targets[targets != -100], tokens[targets != -100])
    assert torch.equal(inputs[targets == -100], tokens[targets == -100])


def test_tokens_are_masked_replaced_or_left_in_the_shares_of_the_paper() -> None:
    """Binomial and chi-square tests at 5 standard deviations; 15 200 chosen tokens."""
    tokens = _tokens(800, 128)
    inputs, targets = lm.mask_tokens(tokens, _rows(800), mask_token=MASK)
    chosen = targets != -100
    n = int(chosen.sum())
    masked = (inputs == MASK) & chosen
    replaced = (inputs != MASK) & (inputs != tokens)
    left = chosen & (inputs == tokens)
    for count, p in ((masked, 0.8), (replaced, 0.1 * (1 - 1 / MASK)), (left, 0.1 * (1 + 1 / MASK))):
        assert abs(int(count.sum()) / n - p) < 5 * math.sqrt(p * (1 - p) / n)
    counts = torch.bincount(inputs[replaced], minlength=MASK)
    expected = int(replaced.sum()) / MASK
    assert len(counts) == MASK
    assert float(((counts - expected) ** 2 / expected).sum()) < MASK - 1 + 5 * math.sqrt(2 * (MASK - 1))
    by_place = chosen.double().mean(0)
    assert float((by_place - 19 / 128).abs().max()) < 5 * math.sqrt(0.15 * 0.85 / 800)


def test_masks_depend_on_the_rows_counter_alone() -> None:
    tokens, rows = _tokens(8, 40), _rows(8)
    whole = lm.mask_tokens(tokens, rows, mask_token=MASK)
    part = lm.mask_tokens(tokens[2:5], rows[2:5], mask_token=MASK)
    assert all(torch.equal(a[2:5], b) for a, b in zip(whole, part, strict=True))
    other = lm.mask_tokens(tokens, _rows(8, step=1), mask_token=MASK)
    assert not torch.equal(whole[1] == -100, other[1] == -100)


def test_padding_is_never_chosen_and_hidden_from_attention() -> None:
    targets = _tokens(3, 20)
    targets[1, 6:], targets[2] = -100, -100
    batch = lm.mask_batch(lm.Batch(_tokens(3, 20), targets, {}), seed=0, step=0, mask_token=MASK)
    assert (batch.targets != -100).sum(1).tolist() == [3, 1, 0]
    assert not (batch.targets[targets == -100] != -100).any()
    assert torch.equal(batch.context["mask"], targets != -100)


def test_a_batch_without_padding_has_no_mask() -> None:
    source = lm.Batch(_tokens(3, 20), _tokens(3, 20), {"dropout": torch.arange(3)})
    batch = lm.mask_batch(source, seed=0, step=0, mask_token=MASK)
    assert batch.context.keys() == {"dropout"}
    again = lm.mask_batch(source, seed=0, step=0, mask_token=MASK)
    assert torch.equal(batch.inputs, again.inputs)
    assert not torch.equal(batch.inputs, lm.mask_batch(source, seed=1, step=0, mask_token=MASK).inputs)


def test_an_encoder_learns_to_fill_gaps(tmp_path: Path) -> None:
    """A text that repeats: what is masked follows from its neighbours. Uniform over 5 tokens is 1.61 nat."""
    (tmp_path / "text.txt").write_text("abcd" * 600)
    corpus = lm.load_corpus(path=tmp_path / "text.txt", cache_dir=tmp_path)
    size = lm.ModelConfig(1, 16, 2, corpus.tokenizer.vocab_size + 1, 10, family="bert", dropout=0.05)
    model = lm.Transformer(size, generator=torch.Generator().manual_seed(0))
    before = lm.evaluate(model, corpus, "val", 4)
    assert before == lm.evaluate(model, corpus, "val", 4)
    assert before > 1.0
    seen: list[lm.Step] = []
    config = lm.TrainConfig(steps=150, batch_size=16, learning_rate=0.01, warmup_steps=10, eval_every=150)
    lm.train(model, corpus, config, seed=0, on_event=seen.append)
    assert seen[-1].val_loss == lm.evaluate(model, corpus, "val", 16)
    assert lm.evaluate(model, corpus, "val", 4) < 0.35 * before
