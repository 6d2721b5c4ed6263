"""The size of a model, and what sets the families apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lm.errors import SettingError


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common, whatever their size.

    Attributes:
        norm: `layer` (LayerNorm) or `rms` (RMSNorm, without mean and bias).
        norm_eps: what a norm adds to the variance or mean square, unless a model says otherwise.
        norm_first: a unit is x + inner(norm(x)), with one norm before the head; else norm(x + inner(x)), with one norm
            after the embedding.
        is_causal: a token sees itself and those before it, and predicts the next; else it sees all, and predicts
            itself where it is masked. The latter have token types and one more map in the head.
        has_rotary: positions turn queries and keys; else they are learned vectors, added to the tokens'.
        activation: of the MLP, see `lm.model.MLP`.
        has_bias: whether linear maps have biases; the head of a causal family has none in any case.
    """

    norm: str
    norm_eps: float
    norm_first: bool
    is_causal: bool
    has_rotary: bool
    activation: str
    has_bias: bool


FAMILIES = {
    # Radford et al., "Language models are unsupervised multitask learners", 2019 (GPT-2), section 2.3
    "gpt": Family("layer", 1e-5, True, True, False, "gelu_tanh", True),
    # Touvron et al., "LLaMA: Open and efficient foundation language models", 2023, section 2.2
    "llama": Family("rms", 1e-5, True, True, True, "swiglu", False),
    # Devlin et al., "BERT: Pre-training of deep bidirectional transformers", 2019, section 3
    "bert": Family("layer", 1e-12, False, False, False, "gelu", True),
}

_WHOLE = ("n_layer", "d_model", "n_head", "vocab_size", "seq_len", "d_ff", "n_kv_head")
_OPTIONAL = ("d_ff", "n_kv_head", "norm_eps", "rope_base")


@dataclass(frozen=True)
class ModelConfig:
    """Family and size of a model.

    Attributes:
        family: `gpt`: decoder with learned positions, LayerNorm and GELU (tanh). `llama`: decoder with rotary
            positions, RMSNorm and SwiGLU, without biases. `bert`: encoder with learned positions, LayerNorm after each
            sublayer and GELU; its last token, number `mask_token`, stands for masked ones.
        n_layer: number of blocks; each is two units, attention and MLP.
        d_model: width D of the residual stream.
        n_head: number of heads N; divides `d_model`.
        vocab_size: number of tokens V.
        seq_len: longest sequence T.
        dropout: probability of a zero after the embedding and after each sublayer, in training.
        d_ff: width of the MLP; None: 4 * d_model, for SwiGLU 8/3 * d_model, rounded up to a multiple of 8.
        n_kv_head: number of heads K of keys and values; divides `n_head`. None: `n_head`.
        norm_eps: what norms add to the variance; None: the family's.
        rope_base: of the wavelengths of rotary positions; None: 10 000.
        tie_embeddings: the head's matrix is the token embedding's. Such a model can't be placed on several devices.
    """

    n_layer: int
    d_model: int
    n_head: int
    vocab_size: int
    seq_len: int
    family: str = "gpt"
    dropout: float = 0.0
    d_ff: int | None = None
    tie_embeddings: bool = False
    n_kv_head: int | None = None
    norm_eps: float | None = None
    rope_base: float | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            expected = " or ".join(map(repr, FAMILIES))
            raise SettingError("unknown model family", found=repr(self.family), expected=expected)
        for name in _WHOLE:
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and (not isinstance(value, int) or value < 1):
                raise SettingError(f"{name} has to be a whole number of at least 1", found=repr(value))
        self._check_heads()
        if not 0.0 <= self.dropout < 1.0:
            raise SettingError("dropout is out of range", found=str(self.dropout), expected="0 <= dropout < 1")
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0.0 < value < math.inf):
                raise SettingError(f"{name} has to be a number above 0", found=repr(value))
        if self.rope_base is not None and not self.traits.has_rotary:
            raise SettingError("rope_base needs rotary positions", found=f"family={self.family!r}", expected="'llama'")

    def _check_heads(self) -> None:
        if self.d_model % self.n_head:
            raise SettingError(
                "n_head has to divide d_model",
                found=f"d_model={self.d_model}, n_head={self.n_head}",
                remedy="choose d_model as a multiple of n_head",
            )
        if self.n_head % self.kv_heads:
            raise SettingError(
                "n_kv_head has to divide n_head", found=f"n_head={self.n_head}, n_kv_head={self.n_kv_head}"
            )
        if self.traits.has_rotary and self.head_dim % 2:
            raise SettingError(
                "rotary positions need heads of even width",
                found=f"d_model / n_head = {self.head_dim}",
                remedy="choose another d_model or n_head",
            )
        if not self.traits.is_causal and self.vocab_size < 2:
            raise SettingError("a vocabulary with a mask has at least 2 tokens", found=str(self.vocab_size))

    @property
    def traits(self) -> Family:
        """What the family says."""
        return FAMILIES[self.family]

    @property
    def head_dim(self) -> int:
        """Width H of a head."""
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number K of heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden(self) -> int:
        """Width F of the MLP's hidden layer."""
        if self.d_ff is not None:
            return self.d_ff
        # Three matrices of 8/3 D have the parameters of two of 4 D (Shazeer, "GLU variants improve transformer", 2020).
        return -(-8 * self.d_model // 24) * 8 if self.traits.activation == "swiglu" else 4 * self.d_model

    @property
    def epsilon(self) -> float:
        """What norms add to the variance."""
        return self.traits.norm_eps if self.norm_eps is None else self.norm_eps

    @property
    def rotary_base(self) -> float:
        """Su et al., "RoFormer", 2021, section 3.2.2, unless the model says otherwise."""
        return 10_000.0 if self.rope_base is None else self.rope_base

    @property
    def mask_token(self) -> int:
        """The token that an encoder sees in place of a masked one: the last of the vocabulary."""
        return self.vocab_size - 1
