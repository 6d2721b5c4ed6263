"""Corpora: splits, cache, batches, windows, floors."""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import lm
from lm.data import DATA_SETS, row_counters
from lm.store import cache_folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(rng.choice(list("abcdefgh \n"), 3000)), "utf-8")
    return path


def _load(path: Path, **settings: object) -> lm.Corpus:
    return lm.load_corpus(path=path, cache_dir=path.parent / "cache", **settings)


def test_the_default_corpus_is_the_help_text_of_the_running_python(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    corpus = lm.load_corpus(cache_dir=tmp_path)
    text = "".join(topics[key] for key in sorted(topics))
    assert corpus.source == "topics"
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert "".join(corpus.tokenizer.decode(corpus.tokens(s)) for s in ("train", "val", "test")) == text


def test_splits_are_contiguous_memory_mapped_uint16(text_file: Path) -> None:
    corpus = _load(text_file, split=(0.8, 0.15, 0.05))
    assert [len(corpus.tokens(s)) for s in ("train", "val", "test")] == [2400, 450, 150]
    for split in ("train", "val", "test"):
        tokens = corpus.tokens(split)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert not tokens.flags.writeable


def test_characters_that_training_never_saw_become_token_0_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 50 + "ab" * 4 + "é" + "b" + "abéxabxxab", "utf-8")
    corpus = _load(path, split=(100 / 120, 10 / 120, 10 / 120))
    assert corpus.n_unknown == {"train": 0, "val": 1, "test": 4}
    assert corpus.n_bytes == {"train": 100, "val": 11, "test": 11}
    assert corpus.tokenizer.decode(corpus.test) == "ab\ufffd\ufffdab\ufffd\ufffdab"


def test_the_unknown_character_in_a_text_is_token_0_too() -> None:
    tokenizer = lm.CharTokenizer.from_text("b\ufffda")
    assert tokenizer.characters == "\ufffdab"
    assert tokenizer.encode("a\ufffd?").tolist() == [1, 0, 0]


def test_bits_per_byte_counts_the_bytes_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("aéaéaéaéaéaé", "utf-8")
    corpus = _load(path, split=(1 / 3, 1 / 3, 1 / 3))
    assert corpus.bits_per_byte(math.log(2), "test") == pytest.approx(4 / 6)  # one bit for each of 4 characters


def test_loading_again_reads_the_cache_and_gives_the_same(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _load(text_file)
    monkeypatch.setattr("lm.data.make_tokenizer", None)  # building would call it
    second = _load(text_file)
    assert second.tokenizer == first.tokenizer
    assert second.n_bytes == first.n_bytes
    for split in ("train", "val", "test"):
        assert np.array_equal(first.tokens(split), second.tokens(split))


def test_text_tokenizer_and_split_have_caches_of_their_own(text_file: Path) -> None:
    a = _load(text_file)
    b = _load(text_file, tokenizer="byte")
    c = _load(text_file, split=(0.5, 0.25, 0.25))
    text_file.write_text("z" + text_file.read_text("utf-8")[1:], "utf-8")
    d = _load(text_file)
    assert len({len(a.train), len(c.train)}) == 2
    assert a.tokenizer.vocab_size == 11
    assert b.tokenizer.vocab_size == 256
    assert d.tokenizer.vocab_size == 12
    assert d.sha256 != a.sha256


def test_a_named_set_is_read_from_a_local_folder_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "to be or not to be " * 20
    monkeypatch.setitem(DATA_SETS, "tiny", ("tiny.txt", hashlib.sha256(text.encode()).hexdigest(), "https://x.invalid"))
    (tmp_path / "tiny.txt").write_text(text, "utf-8")
    corpus = lm.load_corpus(name="tiny", data_dir=tmp_path, cache_dir=tmp_path)
    assert corpus.source == "tiny"
    (tmp_path / "tiny.txt").write_text(text + " ", "utf-8")
    with pytest.raises(lm.DataError, match="is not the data set 'tiny'"):
        lm.load_corpus(name="tiny", data_dir=tmp_path, cache_dir=tmp_path)


def test_the_cache_folder_is_the_environments_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("HETEROQ_CACHE")
    assert cache_folder().name == "heteroq"


def _load_in_child(path: str, queue: object) -> None:
    corpus = _load(Path(path))
    queue.put(hashlib.sha256(corpus.train.tobytes()).hexdigest())  # type: ignore[attr-defined]


def test_two_processes_may_fill_the_cache_at_once(text_file: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_load_in_child, args=(str(text_file), queue)) for _ in range(6)]
    for child in children:
        child.start()
    digests = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join(60)
    assert digests == {hashlib.sha256(_load(text_file).train.tobytes()).hexdigest()}
    assert [p.name for p in (text_file.parent / "cache" / "tokens").iterdir() if p.name.startswith(".new")] == []


def test_batches_depend_on_split_step_and_seed_alone(text_file: Path) -> None:
    corpus = _load(text_file)
    batch = corpus.batch("train", 7, 5, 16, 3, dropout=True)
    again = _load(text_file).batch("train", 7, 5, 16, 3, dropout=True)
    assert torch.equal(batch.inputs, again.inputs)
    assert torch.equal(batch.context["dropout"], again.context["dropout"])
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.dtype == batch.targets.dtype == batch.context["dropout"].dtype == torch.int64
    assert corpus.batch("train", 7, 5, 16, 3).context == {}
    for other in (corpus.batch("train", 8, 5, 16, 3), corpus.batch("train", 7, 5, 16, 4)):
        assert not torch.equal(batch.inputs, other.inputs)


def test_offsets_are_uniform(tmp_path: Path) -> None:
    """Chi-square with 19 degrees of freedom: mean 19, sd 6.2; false alarm at 60 about 4e-6."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(40)), "utf-8")
    corpus = _load(path, split=(0.5, 0.25, 0.25))
    firsts = Counter(t for step in range(200) for t in corpus.batch("train", step, 10, 1, 0).inputs[:, 0].tolist())
    assert set(firsts) == set(range(1, 20))  # the 20th token is a target only
    expected = 2000 / 19
    assert sum((n - expected) ** 2 / expected for n in firsts.values()) < 60


def test_dropout_counters_of_rows_steps_and_seeds_all_differ(text_file: Path) -> None:
    corpus = _load(text_file)
    counters = [
        corpus.batch("train", step, 8, 4, seed, dropout=True).context["dropout"]
        for step in range(50)
        for seed in range(4)
    ]
    assert torch.cat(counters).unique().numel() == 8 * 50 * 4


def test_dropout_counters_have_nothing_to_do_with_the_rows_offsets() -> None:
    offsets, dropout = (row_counters(3, 5, 100, purpose) for purpose in (1, 2))
    assert set(offsets.tolist()).isdisjoint(dropout.tolist())


@pytest.mark.parametrize(("split", "seq_len", "batch_size"), [("val", 7, 3), ("test", 150, 1), ("val", 149, 1)])
def test_windows_make_every_token_but_the_first_a_target_once(
    text_file: Path, split: str, seq_len: int, batch_size: int
) -> None:
    corpus = _load(text_file)
    batches = list(corpus.windows(split, seq_len, batch_size))
    assert {tuple(b.inputs.shape) for b in batches} == {(batch_size, seq_len)}
    inputs = torch.cat([b.inputs.flatten() for b in batches])
    targets = torch.cat([b.targets.flatten() for b in batches])
    kept = targets != -100
    tokens = torch.from_numpy(corpus.tokens(split).astype(np.int64))
    assert torch.equal(targets[kept], tokens[1:])
    assert torch.equal(inputs[kept], tokens[:-1])
    assert inputs.numel() - len(tokens) < batch_size * seq_len


def test_a_split_shorter_than_a_row_is_an_error_that_says_both_lengths(text_file: Path) -> None:
    with pytest.raises(lm.DataError, match=r"150 tokens[\s\S]*at least 151"):
        _load(text_file).batch("val", 0, 1, 150, 0)


def test_an_unknown_split_is_an_error(text_file: Path) -> None:
    with pytest.raises(lm.DataError, match="validation"):
        _load(text_file).tokens("validation")


def _floor_by_hand(train: list[int], test: list[int], V: int) -> dict[str, float]:
    uni = Counter(train)
    p_uni = [(uni[v] + 1) / (len(train) + V) for v in range(V)]
    pairs = Counter(itertools.pairwise(train))
    n1, n2 = (sum(1 for c in pairs.values() if c == k) for k in (1, 2))
    d = n1 / (n1 + 2 * n2)
    nats = {"unigram": 0.0, "bigram": 0.0}
    for a, b in itertools.pairwise(test):
        followed = sum(c for (x, _), c in pairs.items() if x == a)
        kinds = sum(1 for x, _ in pairs if x == a)
        p = p_uni[b]
        if followed:
            p = max(pairs[a, b] - d, 0) / followed + d * kinds / followed * p_uni[b]
        nats["unigram"] -= math.log(p_uni[b]) / (len(test) - 1)
        nats["bigram"] -= math.log(p) / (len(test) - 1)
    return nats


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_floors_equal_a_direct_count(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, the dog on the log. quiz? no; the end is nigh: zyé Q", "utf-8")
    corpus = _load(path, split=(0.6, 0.2, 0.2), tokenizer=tokenizer)
    for split in ("train", "val", "test"):
        expected = _floor_by_hand(corpus.train.tolist(), corpus.tokens(split).tolist(), corpus.tokenizer.vocab_size)
        assert lm.ngram_floor(corpus, split) == pytest.approx(expected, rel=1e-12)


def test_bigram_probabilities_of_all_followers_sum_to_one(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abacabadabacaba" * 4, "utf-8")
    corpus = _load(path)
    V, total = corpus.tokenizer.vocab_size, 0.0
    for b in range(V):
        pair = lm.Corpus(**{**vars(corpus), "test": np.array([1, b], np.uint16)})
        total += math.exp(-lm.ngram_floor(pair, "test")["bigram"])
    assert total == pytest.approx(1.0, rel=1e-12)


def test_floors_of_the_default_corpus_take_less_than_two_seconds(tmp_path: Path) -> None:
    corpus = lm.load_corpus(cache_dir=tmp_path)
    start = time.process_time()
    floor = lm.ngram_floor(corpus, "test")
    assert time.process_time() - start < 2
    assert 1.5 < floor["bigram"] < floor["unigram"] < 4
