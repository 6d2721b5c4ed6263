"""Properties of tokenizers, batches and windows."""

from __future__ import annotations

import json

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lm
from lm.tokenizer import UNKNOWN

any_text = st.text(max_size=200)
quick = settings(deadline=None, max_examples=25)


@quick
@given(text=any_text)
def test_characters_come_back(text: str) -> None:
    tokenizer = lm.CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text)
    assert tokens.dtype == np.uint16
    assert not len(tokens) or tokens.max() < tokenizer.vocab_size


@quick
@given(text=any_text)
def test_bytes_come_back(text: str) -> None:
    tokens = lm.ByteTokenizer().encode(text)
    assert lm.ByteTokenizer().decode(tokens) == text
    assert tokens.tolist() == list(text.encode())


@quick
@given(train=any_text, other=any_text)
def test_what_the_vocabulary_lacks_becomes_the_unknown_character(train: str, other: str) -> None:
    tokenizer = lm.CharTokenizer.from_text(train)
    expected = "".join(c if c in train else UNKNOWN for c in other)
    assert tokenizer.decode(tokenizer.encode(other)) == expected


@quick
@given(train=any_text)
def test_a_tokenizer_survives_json(train: str) -> None:
    for tokenizer in (lm.CharTokenizer.from_text(train), lm.ByteTokenizer()):
        assert lm.tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


def _corpus(n: int) -> lm.Corpus:
    tokens = np.arange(n, dtype=np.uint16)
    return lm.Corpus(tokens, tokens, tokens, lm.ByteTokenizer(), "counting", "", {}, {})


@quick
@given(
    n=st.integers(2, 500),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    step=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
)
def test_rows_are_pieces_of_the_text_and_don_t_depend_on_the_batch_size(
    n: int, seq_len: int, batch_size: int, step: int, seed: int
) -> None:
    seq_len = min(seq_len, n - 1)
    batch = _corpus(n).batch("train", step, batch_size, seq_len, seed, dropout=True)
    assert torch.equal(batch.targets, batch.inputs + 1)  # the text counts
    assert torch.equal(batch.inputs, batch.inputs[:, :1] + torch.arange(seq_len))
    assert batch.inputs.min() >= 0
    assert batch.targets.max() < n
    larger = _corpus(n).batch("train", step, batch_size + 3, seq_len, seed, dropout=True)
    assert torch.equal(larger.inputs[:batch_size], batch.inputs)
    assert torch.equal(larger.context["dropout"][:batch_size], batch.context["dropout"])


@quick
@given(n=st.integers(2, 500), seq_len=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_windows_cover_a_split_once(n: int, seq_len: int, batch_size: int) -> None:
    targets = torch.cat([b.targets.flatten() for b in _corpus(n).windows("val", seq_len, batch_size)])
    assert targets[targets != -100].tolist() == list(range(1, n))
