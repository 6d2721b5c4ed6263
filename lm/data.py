"""Text to training batches: corpora, memory-mapped tokens, batches that are pure functions of their arguments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lm.errors import DataError
from lm.store import cache_folder, load_or_build
from lm.tokenizer import Tokenizer, make_tokenizer, tokenizer_from_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")

DATA_SETS = {
    # name: (file, SHA-256, where it is found)
    "tinyshakespeare": (
        "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
}
"""Well-known sets, read from a local folder and checked."""


class Batch(NamedTuple):
    """What one step trains on.

    Attributes:
        inputs: (B, T) int64.
        targets: (B, T) int64; -100: ignored.
        context: tensors beside the activations, batch first; `dropout`: (B,) int64, in training with dropout only. What
            else a model takes: `lm/model.py`.
    """

    inputs: Tensor
    targets: Tensor
    context: dict[str, Tensor]


@dataclass(frozen=True)
class Corpus:
    """A tokenized text in three contiguous parts, train | val | test.

    Attributes:
        train: tokens, (n,) uint16, memory-mapped.
        val: likewise.
        test: likewise.
        tokenizer: its vocabulary comes from the training part.
        source: name of the set, or path of the file.
        sha256: of the whole text in UTF-8.
        n_bytes: bytes of each part's text in UTF-8.
        n_unknown: characters of each part that the vocabulary lacks; they became token 0.
    """

    train: NDArray[np.uint16]
    val: NDArray[np.uint16]
    test: NDArray[np.uint16]
    tokenizer: Tokenizer
    source: str
    sha256: str
    n_bytes: dict[str, int]
    n_unknown: dict[str, int]

    def tokens(self, split: str) -> NDArray[np.uint16]:
        """Tokens of `train`, `val` or `test`, (n,) uint16."""
        if split not in SPLITS:
            raise DataError("unknown split", found=repr(split), expected=" or ".join(SPLITS))
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def bits_per_byte(self, loss: float, split: str) -> float:
        """A loss [nat/token] on a split as bits per byte of its UTF-8 text."""
        return float(loss / np.log(2) * len(self.tokens(split)) / self.n_bytes[split])

    def batch(self, split: str, step: int, batch_size: int, seq_len: int, seed: int, *, dropout: bool = False) -> Batch:
        """Rows at random offsets; the result depends on the arguments alone, so that resuming needs no state.

        Args:
            split: `train`, `val` or `test`.
            step: number of the training step.
            batch_size: rows B.
            seq_len: tokens T of a row.
            seed: of the run.
            dropout: put each row's dropout counter into the context.

        Raises:
            DataError: the split has fewer than `seq_len` + 1 tokens.
        """
        tokens = self.tokens(split)
        n_offsets = len(tokens) - seq_len
        if n_offsets < 1:
            raise _too_short(self.source, split, len(tokens), seq_len + 1)
        # The high half of a random 64-bit number times n, divided by 2**32: an offset, uniform to n / 2**32.
        high_B = row_counters(seed, step, batch_size, _OFFSET) >> np.uint64(32)
        offsets_B = ((high_B * np.uint64(n_offsets)) >> np.uint64(32)).astype(np.int64)
        rows = tokens[offsets_B[:, None] + np.arange(seq_len + 1)].astype(np.int64)
        context = {}
        if dropout:
            counters_B = row_counters(seed, step, batch_size, _DROPOUT).astype(np.int64)
            context["dropout"] = torch.from_numpy(counters_B)
        rows_BT = torch.from_numpy(rows)
        return Batch(rows_BT[:, :-1].contiguous(), rows_BT[:, 1:].contiguous(), context)

    def windows(self, split: str, seq_len: int, batch_size: int) -> Iterator[Batch]:
        """The whole split in order, in windows that don't overlap.

        Each token but the first is a target exactly once. All batches have the shape (batch_size, seq_len); what is
        left over at the end is filled with token 0 and ignored targets.
        """
        tokens = self.tokens(split)
        if len(tokens) < 2:
            raise _too_short(self.source, split, len(tokens), 2)
        per_batch = batch_size * seq_len
        for start in range(0, len(tokens) - 1, per_batch):
            piece = tokens[start : start + per_batch + 1].astype(np.int64)
            inputs, targets = np.zeros(per_batch, np.int64), np.full(per_batch, -100, np.int64)
            inputs[: len(piece) - 1], targets[: len(piece) - 1] = piece[:-1], piece[1:]
            shape = (batch_size, seq_len)
            yield Batch(torch.from_numpy(inputs).view(shape), torch.from_numpy(targets).view(shape), {})


def load_corpus(
    *,
    name: str | None = None,
    path: str | Path | None = None,
    tokenizer: str = "char",
    split: tuple[float, float, float] = (0.9, 0.05, 0.05),
    cache_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
) -> Corpus:
    """Read a text, tokenize it (once: the tokens are kept in the cache folder), map the tokens.

    Args:
        name: `topics`, the help texts of the running Python (`pydoc_data.topics`), which need no download, or a name
            in `DATA_SETS`. Without name and path: `topics`.
        path: any text file in UTF-8, instead of a name.
        tokenizer: `char` or `byte`.
        split: shares of characters for train, val and test, in this order along the text.
        cache_dir: where tokens are kept; None: `$HETEROQ_CACHE` or the user's cache folder.
        data_dir: where the files of `DATA_SETS` lie; None: `data` in the cache folder.

    Raises:
        DataError: missing, empty, not UTF-8, too short, wrong checksum.
    """
    if name is not None and path is not None:
        raise DataError("a corpus has a name or a path", found=f"name={name!r} and path={str(path)!r}")
    cache = cache_folder() if cache_dir is None else Path(cache_dir)
    if path is not None:
        source, text = str(path), _read(Path(path))
    else:
        source = name or "topics"
        text = _topics() if source == "topics" else _named(source, Path(data_dir) if data_dir else cache / "data")
    return _tokenized(text, source, tokenizer, split, cache)


def row_counters(seed: int, step: int, n_rows: int, purpose: int) -> NDArray[np.uint64]:
    """Random 64-bit numbers, one a row, as a hash of the arguments: (n_rows,) uint64.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014; constants of Stafford's variant 13), applied once for each argument.
    """
    x = np.full(n_rows, purpose, np.uint64)
    for value in (np.uint64(seed % (1 << 64)), np.uint64(step), np.arange(n_rows, dtype=np.uint64)):
        x = (x ^ value) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x


_OFFSET, _DROPOUT, MASKING = 1, 2, 3  # purposes: streams of numbers that have nothing to do with each other


def _topics() -> str:
    from pydoc_data.topics import topics

    return "".join(topics[key] for key in sorted(topics))


def _named(name: str, folder: Path) -> str:
    if name not in DATA_SETS:
        raise DataError("unknown data set", found=repr(name), expected=", ".join(["topics", *DATA_SETS]))
    file, sha256, url = DATA_SETS[name]
    if not (folder / file).is_file():
        raise DataError(
            f"the data set '{name}' is not here",
            found=f"no file {folder / file}",
            expected=f"a file with SHA-256 {sha256}",
            remedy=f"put {url} there, or name another folder as data_dir",
        )
    text = _read(folder / file)
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{folder / file} is not the data set '{name}'",
            found=f"SHA-256 {found}",
            expected=sha256,
            remedy=f"get it again from {url}",
        )
    return text


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read {path}", found=error.strerror or str(error), remedy="check data.path") from error
    if not data:
        raise DataError(f"{path} is empty", expected="text in UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8",
            found=f"byte 0x{data[error.start]:02x} at position {error.start}",
            expected="text in UTF-8",
            remedy=f"convert it, e.g. iconv -f latin1 -t utf-8 {path.name}",
        ) from error


def _too_short(source: str, split: str, found: int, needed: int) -> DataError:
    return DataError(
        f"the {split} split of {source} is too short",
        found=f"{found} tokens",
        expected=f"at least {needed}",
        remedy="use a longer text, a smaller seq_len, or another split",
    )


def _tokenized(text: str, source: str, kind: str, split: tuple[float, float, float], cache: Path) -> Corpus:
    if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
        raise DataError("split needs three positive shares with the sum 1", found=str(split))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    ends = [round(len(text) * split[0]), round(len(text) * (split[0] + split[1])), len(text)]
    key = hashlib.sha256(f"1 {sha256} {kind} {ends}".encode()).hexdigest()  # 1: version of the folder's format
    parts = dict(zip(SPLITS, (text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]), strict=True))
    for name, part in parts.items():
        if len(part) < 2:
            raise _too_short(source, name, len(part), 2)

    def build() -> tuple[dict[str, NDArray[np.uint16]], dict[str, object]]:
        tok = make_tokenizer(kind, parts["train"])
        tokens = {name: tok.encode(part) for name, part in parts.items()}
        unknown = {name: int((t == 0).sum()) if kind == "char" else 0 for name, t in tokens.items()}
        n_bytes = {name: len(part.encode()) for name, part in parts.items()}
        return tokens, {"tokenizer": tok.to_json(), "n_bytes": n_bytes, "n_unknown": unknown}

    tokens, facts = load_or_build(cache / "tokens" / key, build)
    return Corpus(
        **tokens,
        tokenizer=tokenizer_from_json(facts["tokenizer"]),
        source=source,
        sha256=sha256,
        n_bytes=facts["n_bytes"],
        n_unknown=facts["n_unknown"],
    )
