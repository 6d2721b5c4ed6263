"""The whole transformer, top to bottom: a GPT decoder as a chain of units.

A model is the loop over `layers()`: the embedding, one residual unit a sublayer, the head. Every unit is called
`unit(x, context) -> x` and stands alone, so that any of them can run on any device. Identical blocks hold no Python
value that differs between them: one compiled graph serves all.

Shape suffixes:
    B = batch, T = sequence, D = model width, N = heads, H = head width, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from lm.errors import SettingError

Context = Mapping[str, Tensor]
"""Non-differentiable tensors beside the activations, each with the batch as first dimension."""


@dataclass(frozen=True)
class ModelConfig:
    """Size of a model.

    Attributes:
        family: `gpt`: pre-LayerNorm decoder with learned positions and a GELU (tanh) MLP.
        n_layer: number of blocks; each is two units, attention and MLP.
        d_model: width D of the residual stream.
        n_head: number of heads N; divides `d_model`.
        vocab_size: number of tokens V.
        seq_len: longest sequence T.
        dropout: probability of a zero after the embedding and after each sublayer, in training.
        d_ff: width of the MLP; None: 4 * d_model.
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

    def __post_init__(self) -> None:
        if self.family != "gpt":
            raise SettingError("unknown model family", found=repr(self.family), expected="'gpt'")
        for name in ("n_layer", "d_model", "n_head", "vocab_size", "seq_len", "d_ff"):
            value = getattr(self, name)
            if not (value is None and name == "d_ff") and (not isinstance(value, int) or value < 1):
                raise SettingError(f"{name} has to be a whole number of at least 1", found=repr(value))
        if self.d_model % self.n_head:
            raise SettingError(
                "n_head has to divide d_model",
                found=f"d_model={self.d_model}, n_head={self.n_head}",
                remedy="choose d_model as a multiple of n_head",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise SettingError("dropout is out of range", found=str(self.dropout), expected="0 <= dropout < 1")

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


# --- dropout: a mask that is a pure function of (row counter, layer, element) -----------------------------------------

_M32 = 0xFFFFFFFF
# Multipliers of lowbias32 (C. Wellons, github.com/skeeto/hash-prospector, bias 0.17): 0x7FEB352D and 0x846CA68B, the
# second written modulo 2**32 as a negative number. |multiplier| < 2**31 times an operand < 2**32 stays inside int64,
# so no device ever meets a signed overflow, which C and OpenCL leave undefined.
_MUL1, _MUL2 = 0x7FEB352D, 0x846CA68B - (1 << 32)
# Spreads the layers over the 32-bit keys: 2**32 / golden ratio (Knuth, TAOCP 3, section 6.4), likewise modulo 2**32.
_GOLDEN = 0x9E3779B9 - (1 << 32)


def _mix(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """lowbias32 of x in [0, 2**32), with a second key entering between its two rounds."""
    x = x ^ (x >> 16)
    x = (x * _MUL1) & _M32
    x = x ^ (x >> 15) ^ key
    x = (x * _MUL2) & _M32
    return x ^ (x >> 16)


def keep_mask(rows: Tensor, layer: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """Which elements a dropout keeps.

    An integer hash in plain int64 operations, so that every device computes the same bits. It depends on all 64 bits
    of a row's counter.

    Args:
        rows: (B,) int64, one counter a row.
        layer: () int64, number of the dropout in the model.
        shape: (T, D) of a row; T * D < 2**32.
        p: probability of dropping an element.

    Returns:
        (B, T, D) bool, True with probability 1 - p (to 2**-32).
    """
    T, D = shape
    low_B = _mix(((rows & _M32) + layer * _GOLDEN) & _M32)
    high_B = _mix(((rows >> 32) & _M32) ^ low_B)
    element_1TD = torch.arange(T * D, device=rows.device, dtype=torch.int64).view(1, T, D)
    return _mix(element_1TD ^ low_B.view(-1, 1, 1), high_B.view(-1, 1, 1)) >= round(p * (1 << 32))


class Dropout(nn.Module):
    """Inverted dropout whose mask comes from `context["dropout"]`; without that key it is the identity."""

    layer: Tensor

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p = p
        # A buffer and no Python int: the layers' compiled graphs stay equal. It is no state, hence not in state_dict.
        self.register_buffer("layer", torch.tensor(layer, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Zero elements with probability p and scale the others by 1 / (1 - p)."""
        if self.p == 0.0 or context is None or "dropout" not in context:
            return x_BTD
        keep = keep_mask(context["dropout"], self.layer, (x_BTD.shape[1], x_BTD.shape[2]), self.p)
        return x_BTD * (keep.to(x_BTD.dtype) * (1.0 / (1.0 - self.p)))


# --- the units --------------------------------------------------------------------------------------------------------


Cache = tuple[Tensor, ...]
"""What a unit remembers of the tokens so far; () where it remembers nothing. Its shapes never change."""


class Embedding(nn.Module):
    """First unit: token plus learned position, (B, T) int64 -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.seq_len, config.d_model)
        self.dropout = Dropout(config.dropout, 0)

    def forward(self, tokens_BT: Tensor, context: Context | None = None) -> Tensor:
        """Embed tokens that start at position 0."""
        x_BTD = self.token(tokens_BT) + self.position.weight[: tokens_BT.shape[1]]
        return cast("Tensor", self.dropout(x_BTD, context))

    @property
    def seq_len(self) -> int:
        """Longest sequence."""
        return self.position.num_embeddings

    def new_cache(self, batch_size: int) -> Cache:
        """Nothing."""
        return ()

    def decode(self, tokens_BT: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """Embed tokens that start at `position` () int64."""
        places_T = position + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.token(tokens_BT) + self.position(places_T), ()

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over tokens of this (B, T)."""
        return float(shape[0] * shape[1] * self.token.embedding_dim)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it, (B, T, D) -> (B, T, D).

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2; scale 1 / sqrt(H).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.seq_len = config.n_head, config.seq_len
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def _split(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.n_head, D // self.n_head)
        return tuple(part.transpose(1, 2) for part in qkv.unbind(2))  # 3 x (B, N, T, H)

    def _merge(self, y_BNTH: Tensor) -> Tensor:
        return cast("Tensor", self.proj(y_BNTH.transpose(1, 2).flatten(2)))

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Attend within a whole sequence."""
        q_BNTH, k_BNTH, v_BNTH = self._split(x_BTD)
        return self._merge(scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True))

    def new_cache(self, batch_size: int) -> Cache:
        """Keys and values, each (B, N, seq_len, H), of no token yet."""
        weight = self.proj.weight
        shape = (batch_size, self.n_head, self.seq_len, weight.shape[0] // self.n_head)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def decode(self, x_BTD: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """Attend from tokens that start at `position` () int64 to themselves and to the cache, which they join.

        All shapes are those of the whole cache, and nothing is written in place: one compiled graph serves all
        positions. S = seq_len.
        """
        q_BNTH, k_BNTH, v_BNTH = self._split(x_BTD)
        slot_S1 = torch.arange(self.seq_len, device=x_BTD.device).view(-1, 1)
        token_T = position + torch.arange(x_BTD.shape[1], device=x_BTD.device)
        is_new_S1 = (slot_S1 >= position) & (slot_S1 < position + x_BTD.shape[1])
        into_ST = (slot_S1 == token_T).to(k_BNTH.dtype)
        k_BNSH = torch.where(is_new_S1, into_ST @ k_BNTH, cache[0])
        v_BNSH = torch.where(is_new_S1, into_ST @ v_BNTH, cache[1])
        scores_BNTS = (q_BNTH @ k_BNSH.transpose(2, 3)) * q_BNTH.shape[-1] ** -0.5
        weights_BNTS = scores_BNTS.masked_fill(slot_S1.view(1, -1) > token_T.view(-1, 1), -torch.inf).softmax(-1)
        return self._merge(weights_BNTS @ v_BNSH), (k_BNSH, v_BNSH)

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over (B, T, D): two matrix products outside and two inside the attention.

        The products inside are counted in full, without what a kernel may save above the diagonal.
        """
        B, T, D = shape
        return 8.0 * B * T * D * D + 4.0 * B * T * T * D


class MLP(nn.Module):
    """Two linear maps with GELU (tanh form) between them, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.hidden)
        self.down = nn.Linear(config.hidden, config.d_model)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Each token by itself."""
        return cast("Tensor", self.down(gelu(self.up(x_BTD), approximate="tanh")))

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over (B, T, D): two matrix products."""
        B, T, D = shape
        return 4.0 * B * T * D * self.up.out_features


class Residual(nn.Module):
    """Every unit but the ends: x + dropout(inner(norm(x), context)).

    `inner` may be any module with that call. Where it has no `decode`, it treats each token by itself. What it says
    about where it can run (`device_apis`) and what it costs (`layer_cost`, `flops`) holds for the unit; a unit whose
    inner module is silent has none of these attributes.
    """

    def __init__(self, norm: nn.Module, inner: nn.Module, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.inner = inner
        self.dropout = Dropout(0.0, 0) if dropout is None else dropout

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Add what `inner` makes of the normalised input."""
        y_BTD = self.inner(self.norm(x_BTD), context)
        return x_BTD + cast("Tensor", self.dropout(y_BTD, context))

    def new_cache(self, batch_size: int) -> Cache:
        """The inner module's cache, () where it remembers nothing."""
        new_cache = getattr(self.inner, "new_cache", None)
        return () if new_cache is None else cast("Cache", new_cache(batch_size))

    def decode(self, x_BTD: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """The unit for tokens that start at `position` () int64; earlier ones are in the cache."""
        y_BTD = self.norm(x_BTD)
        decode = getattr(self.inner, "decode", None)
        y_BTD, cache = (self.inner(y_BTD, None), ()) if decode is None else decode(y_BTD, cache, position)
        return x_BTD + y_BTD, cache

    # The inner module's own statements. Where it lacks one, the AttributeError makes `hasattr(unit, ...)` False.
    @property
    def device_apis(self) -> frozenset[str]:
        """Runtimes that can execute the inner module."""
        return cast("frozenset[str]", self.inner.device_apis)

    @property
    def layer_cost(self) -> Callable[..., dict[str, Any]]:
        """What the inner module says about its cost."""
        return cast("Callable[..., dict[str, Any]]", self.inner.layer_cost)

    @property
    def flops(self) -> Callable[[tuple[int, ...]], float]:
        """FLOP of a forward pass for an input of a shape."""
        return cast("Callable[[tuple[int, ...]], float]", self.inner.flops)


class Head(nn.Module):
    """Last unit: final norm and linear map to logits, (B, T, D) -> (B, T, V)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.linear = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Logits [nat, up to a constant]."""
        return cast("Tensor", self.linear(self.norm(x_BTD)))

    def new_cache(self, batch_size: int) -> Cache:
        """Nothing."""
        return ()

    def decode(self, x_BTD: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """The same as `forward`."""
        return self.forward(x_BTD), ()

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over (B, T, D): one matrix product."""
        B, T, D = shape
        return 2.0 * B * T * D * self.linear.out_features


# --- the model --------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A GPT decoder, (B, T) tokens -> (B, T, V) logits.

    Initial weights are normal, for the last matrix of each sublayer narrower by sqrt(2 * n_layer) (GPT-2, Radford et
    al. 2019, section 2.3, as in karpathy/nanoGPT `model.py`); biases are zero. GPT-2's standard deviation of 0.02 is
    that of width 768; it goes with 1 / sqrt(d_model) (LeCun et al., "Efficient BackProp", 1998, section 4.6), so that
    activations and logits start alike at every width.

    A parameter's key in `state_dict()` is its layer's name followed by its name in the layer.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        """Build and initialise.

        Args:
            config: the size.
            generator: source of all initial weights, drawn layer by layer in the order of `layers()`; None: torch's
                default generator.
        """
        super().__init__()
        self.config = config
        self._names = ["embedding"]
        with torch.random.fork_rng(devices=[]):  # modules draw weights when made; all of them are drawn again below
            self.embedding = Embedding(config)
            for i in range(config.n_layer):
                self.add_module(f"block{i}", _block(config, i))
                self._names += [f"block{i}.attention", f"block{i}.mlp"]
            self.head = Head(config)
        self._names.append("head")
        self._initialise(generator)
        if config.tie_embeddings:
            self.head.linear.weight = self.embedding.token.weight

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None) -> None:
        std = 0.02 * (768 / self.config.d_model) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                if name.endswith("bias"):
                    parameter.zero_()
                continue
            is_last = name.endswith(("inner.proj.weight", "inner.down.weight"))
            parameter.normal_(0.0, std / (2 * self.config.n_layer) ** 0.5 if is_last else std, generator=generator)

    def layers(self) -> list[tuple[str, nn.Module]]:
        """The units in execution order, each with its name."""
        return [(name, self.get_submodule(name)) for name in self._names]

    def replace_inner(self, name: str, module: nn.Module) -> None:
        """Put a module inside a residual unit; every other weight keeps its value.

        Args:
            name: of a residual unit in `layers()`, e.g. `block1.mlp`.
            module: called `module(x, context)` with (B, T, D) -> (B, T, D).

        Raises:
            SettingError: no residual unit has that name.
        """
        units = dict(self.layers())
        unit = units.get(name)
        if not isinstance(unit, Residual):
            names = ", ".join(n for n, u in units.items() if isinstance(u, Residual))
            raise SettingError("no residual unit of that name", found=repr(name), expected=f"one of {names}")
        unit.inner = module

    def forward(self, tokens_BT: Tensor, context: Context | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T) int64, T <= seq_len."""
        if tokens_BT.shape[1] > self.config.seq_len:
            raise SettingError(
                "the sequence is longer than the model's positions",
                found=f"{tokens_BT.shape[1]} tokens",
                expected=f"at most seq_len={self.config.seq_len}",
            )
        x = tokens_BT
        for _, unit in self.layers():
            x = unit(x, context)
        return x

    def new_cache(self, batch_size: int) -> list[Cache]:
        """The caches of all units, for `decode`."""
        return [cast("Any", unit).new_cache(batch_size) for _, unit in self.layers()]

    def decode(self, tokens_BT: Tensor, caches: list[Cache], position: Tensor) -> tuple[Tensor, list[Cache]]:
        """Logits (B, T, V) of tokens that start at `position` () int64, and the caches with these tokens in them."""
        x, after = tokens_BT, []
        for (_, unit), cache in zip(self.layers(), caches, strict=True):
            x, cache = cast("Any", unit).decode(x, cache, position)
            after.append(cache)
        return x, after


def _block(config: ModelConfig, i: int) -> nn.ModuleDict:
    inners: dict[str, nn.Module] = {"attention": CausalSelfAttention(config), "mlp": MLP(config)}
    return nn.ModuleDict(
        {
            name: Residual(nn.LayerNorm(config.d_model), inner, Dropout(config.dropout, 1 + 2 * i + j))
            for j, (name, inner) in enumerate(inners.items())
        }
    )


def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are not -100 [nat/token].

    Args:
        logits_BTV: (B, T, V).
        targets_BT: (B, T) int64; -100 is ignored. NaN where all are.
    """
    return cross_entropy(logits_BTV.flatten(0, -2), targets_BT.flatten(), ignore_index=-100)


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that get gradients."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
