"""Text to tokens and back: one token a character, or one a byte."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

Tokens = NDArray[np.uint16]

UNKNOWN = "\ufffd"
"""What an unknown character becomes: U+FFFD REPLACEMENT CHARACTER (Unicode 15, section 23.8), always token 0."""


class Tokenizer(Protocol):
    """What data, generation and checkpoints need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""

    def encode(self, text: str) -> Tokens:
        """Tokens of a text, (T,) uint16."""

    def decode(self, tokens: ArrayLike) -> str:
        """The text of tokens."""

    def to_json(self) -> dict[str, Any]:
        """All that `tokenizer_from_json` needs."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character (Unicode code point).

    Attributes:
        characters: the vocabulary; position is the token. The first stands for every character that is not in it.
    """

    characters: str

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Vocabulary of a text: the unknown character, then all of the text's in code point order.

        Raises:
            DataError: more different characters than uint16 can number.
        """
        characters = UNKNOWN + "".join(sorted(set(text) - {UNKNOWN}))
        if len(characters) > 1 << 16:
            raise DataError(
                "the text has too many different characters for one token a character",
                found=f"{len(characters)}",
                expected=f"at most {1 << 16}",
                remedy="use the byte tokenizer",
            )
        return cls(characters)

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, the unknown character included."""
        return len(self.characters)

    @cached_property
    def _known(self) -> NDArray[np.uint32]:
        return _code_points(self.characters[1:])  # in ascending order

    def encode(self, text: str) -> Tokens:
        """Tokens of a text, (T,) uint16; 0 for a character outside the vocabulary."""
        points = _code_points(text)
        if not self._known.size:
            return np.zeros(points.shape, np.uint16)
        place = np.searchsorted(self._known, points).clip(max=self._known.size - 1)
        return np.where(self._known[place] == points, place + 1, 0).astype(np.uint16)

    def decode(self, tokens: ArrayLike) -> str:
        """The text of tokens, U+FFFD for token 0."""
        points = _code_points(self.characters)[np.asarray(tokens, np.int64).ravel()]
        return points.tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        """Kind and vocabulary."""
        return {"kind": "char", "characters": self.characters}


@dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte of the text's UTF-8 form."""

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    def encode(self, text: str) -> Tokens:
        """Tokens of a text, (T,) uint16."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint16)

    def decode(self, tokens: ArrayLike) -> str:
        """The text of tokens, U+FFFD where the bytes are not UTF-8."""
        return np.asarray(tokens, np.int64).ravel().astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        """Kind alone."""
        return {"kind": "byte"}


def make_tokenizer(kind: str, train_text: str) -> Tokenizer:
    """The tokenizer of a kind; a vocabulary comes from the training split's text alone.

    Args:
        kind: `char` or `byte`.
        train_text: what the model trains on.

    Raises:
        DataError: unknown kind.
    """
    if kind == "char":
        return CharTokenizer.from_text(train_text)
    if kind == "byte":
        return ByteTokenizer()
    raise DataError("unknown tokenizer", found=repr(kind), expected="'char' or 'byte'")


def tokenizer_from_json(data: Mapping[str, Any]) -> Tokenizer:
    """The inverse of `to_json`."""
    return CharTokenizer(data["characters"]) if data["kind"] == "char" else make_tokenizer(data["kind"], "")


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
