"""The floor that a language model has to beat: losses of unigram and bigram models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lm.data import Corpus


def ngram_floor(corpus: Corpus, split: str) -> dict[str, float]:
    """Loss of n-gram models on a split [nat/token]; all counts and weights come from the training split.

    Unigram: add-one smoothing. Bigram: interpolated absolute discounting, a strong floor without anything to tune:
    P(b|a) = max(c(ab) - d, 0) / c(a) + d n(a) / c(a) * P(b), with n(a) the number of different followers of a and
    d = n1 / (n1 + 2 n2) from the numbers of bigrams seen once and twice; a token never followed by anything
    falls back to the unigram.

    Args:
        corpus: counts come from its training split.
        split: `train`, `val` or `test`; each token but the first is predicted once, as in `Corpus.windows`.

    Returns:
        {"unigram": loss, "bigram": loss}.

    Source: Chen, Goodman, "An empirical study of smoothing techniques for language modeling", 1999, section 2.6.
    """
    V = corpus.tokenizer.vocab_size
    train, test = corpus.train.astype(np.int64), corpus.tokens(split).astype(np.int64)
    p_unigram_V = (np.bincount(train, minlength=V) + 1.0) / (len(train) + V)

    pairs, counts = np.unique(train[:-1] * V + train[1:], return_counts=True)
    followed_V = np.bincount(train[:-1], minlength=V)
    followers_V = np.bincount(pairs // V, minlength=V)
    n1, n2 = int((counts == 1).sum()), int((counts == 2).sum())
    discount = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5

    a, b = test[:-1], test[1:]
    seen = _lookup(pairs, counts, a * V + b)
    with np.errstate(invalid="ignore", divide="ignore"):
        direct = np.maximum(seen - discount, 0) / followed_V[a]
        rest = discount * followers_V[a] / followed_V[a]
    p_bigram = np.where(followed_V[a] > 0, direct + rest * p_unigram_V[b], p_unigram_V[b])
    return {"unigram": float(-np.log(p_unigram_V[b]).mean()), "bigram": float(-np.log(p_bigram).mean())}


def _lookup(keys: NDArray[np.int64], values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """values[i] where keys[i] is wanted, 0 where no key is; keys ascend."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
