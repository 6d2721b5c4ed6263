"""The whole transformer, top to bottom: decoders and encoders as a chain of units.

A model is the loop over `layers()`: the embedding, one residual unit a sublayer, the head. Every unit is called
`unit(x, context) -> x` and stands alone, so that any of them can run on any device. Identical blocks hold no Python
value that differs between them: one compiled graph serves all. What sets the families apart is a table, `FAMILIES`.

What the context may hold, each with the batch as first dimension:
    dropout: (B,) int64, one counter a row; in training.
    mask: (B, T) bool, True for tokens that may be attended to; without it all may.
    token_types: (B, T) int64, 0 or 1; without them all are 0. Only encoders have them.

Shape suffixes:
    B = batch, T = sequence, D = model width, N = heads, K = heads of keys and values, G = N / K, H = head width,
    F = MLP width, S = cache slots, V = vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, silu

from lm.config import FAMILIES, ModelConfig
from lm.draws import Context, Dropout
from lm.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Cache = tuple[Tensor, ...]
"""What a unit remembers of the tokens so far; () where it remembers nothing. Its shapes never change."""


# --- the units --------------------------------------------------------------------------------------------------------


def _norm(config: ModelConfig) -> nn.Module:
    kind = nn.LayerNorm if config.traits.norm == "layer" else nn.RMSNorm
    return kind(config.d_model, eps=config.epsilon)


class Embedding(nn.Module):
    """First unit: token plus learned position, (B, T) int64 -> (B, T, D).

    Without the positions where the family has rotary ones; an encoder adds the token's type and normalises the sum.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        traits, width = config.traits, config.d_model
        self.token = nn.Embedding(config.vocab_size, width)
        self.position = None if traits.has_rotary else nn.Embedding(config.seq_len, width)
        self.token_type = None if traits.is_causal else nn.Embedding(2, width)
        self.norm = None if traits.norm_first else _norm(config)
        self.dropout = Dropout(config.dropout, 0)

    def forward(self, tokens_BT: Tensor, context: Context | None = None) -> Tensor:
        """Embed tokens that start at position 0."""
        x_BTD = self.token(tokens_BT)
        if self.position is not None:
            x_BTD = x_BTD + self.position.weight[: tokens_BT.shape[1]]
        if self.token_type is not None:
            types_BT = None if context is None else context.get("token_types")
            x_BTD = x_BTD + (self.token_type.weight[0] if types_BT is None else self.token_type(types_BT))
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return cast("Tensor", self.dropout(x_BTD, context))

    def new_cache(self, batch_size: int) -> Cache:
        """Nothing."""
        return ()

    def decode(self, tokens_BT: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """Embed tokens of a causal family that start at `position` () int64."""
        x_BTD = self.token(tokens_BT)
        if self.position is None:
            return x_BTD, ()
        return x_BTD + self.position(_places(tokens_BT, position)), ()

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over tokens of this (B, T): one for each number that comes out."""
        return float(shape[0] * shape[1] * self.token.embedding_dim)


def _places(x: Tensor, position: Tensor) -> Tensor:
    """Positions (T,) int64 of tokens (B, T, ...) that start at `position`."""
    return position + torch.arange(x.shape[1], device=x.device)


def rotary_table(config: ModelConfig) -> Tensor:
    """By how much rotary positions turn queries and keys: (S, H), a position's H / 2 cosines, then its sines.

    Position m turns pair i by the angle m * base**(-2 i / H). Computed in float64, so that each number is right to its
    last place however large the angle.

    Source: Su et al., "RoFormer: Enhanced transformer with rotary position embedding", 2021, section 3.2.2.
    """
    pair_F = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    angle_SF = torch.outer(
        torch.arange(config.seq_len, dtype=torch.float64), config.rotary_base ** (-pair_F / config.head_dim)
    )
    return torch.cat([angle_SF.cos(), angle_SF.sin()], dim=1).to(torch.get_default_dtype())


def rotate(x_BNTH: Tensor, table_TH: Tensor) -> Tensor:
    """Vectors turned by what a `rotary_table` holds for their positions, (B, N, T, H).

    A pair is elements i and i + H / 2, as in GPT-NeoX and in Llama's weights as Hugging Face keeps them; RoFormer pairs
    2 i and 2 i + 1 (equation 34). The models are the same but for the order of the projections' rows.
    """
    a, b = x_BNTH.chunk(2, dim=-1)
    cos, sin = table_TH.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head attention, (B, T, D) -> (B, T, D): of each token to all, or to itself and those before it.

    K heads of keys and values serve N heads of queries, each of them N / K neighbours.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2; scale 1 / sqrt(H). K < N: Ainslie et al.,
    "GQA: Training generalized multi-query transformer models", 2023, section 2.2.
    """

    rotary: Tensor | None

    def __init__(self, config: ModelConfig, rotary_SH: Tensor | None = None) -> None:
        super().__init__()
        has_bias = config.traits.has_bias
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.seq_len, self.is_causal = config.seq_len, config.traits.is_causal
        self.qkv = nn.Linear(config.d_model, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=has_bias)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=has_bias)
        self.register_buffer("rotary", rotary_SH, persistent=False)

    def _split(self, x_BTD: Tensor, table_TH: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, T, H), keys and values (B, K, T, H); the first two turned by a rotary table."""
        B, T, _ = x_BTD.shape
        N, K = self.n_head, self.n_kv_head
        parts = self.qkv(x_BTD).view(B, T, N + 2 * K, self.head_dim).split([N, K, K], dim=2)
        q_BNTH, k_BKTH, v_BKTH = (part.transpose(1, 2) for part in parts)
        if table_TH is None:
            return q_BNTH, k_BKTH, v_BKTH
        return rotate(q_BNTH, table_TH), rotate(k_BKTH, table_TH), v_BKTH

    def _merge(self, y_BNTH: Tensor) -> Tensor:
        return cast("Tensor", self.proj(y_BNTH.transpose(1, 2).flatten(2)))

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Attend within a whole sequence, to tokens that `context["mask"]` doesn't hide."""
        T = x_BTD.shape[1]
        q, k, v = self._split(x_BTD, None if self.rotary is None else self.rotary[:T])
        mask_BT = None if context is None else context.get("mask")
        allowed_B1TT = None if mask_BT is None else mask_BT[:, None, None, :]
        if allowed_B1TT is not None and self.is_causal:
            allowed_B1TT = allowed_B1TT & torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
        is_causal, enable_gqa = self.is_causal and mask_BT is None, self.n_kv_head < self.n_head
        return self._merge(
            scaled_dot_product_attention(q, k, v, allowed_B1TT, is_causal=is_causal, enable_gqa=enable_gqa)
        )

    def new_cache(self, batch_size: int) -> Cache:
        """Keys and values, each (B, K, seq_len, H), of no token yet.

        Raises:
            SettingError: the attention is not causal.
        """
        if not self.is_causal:
            raise SettingError(
                "an encoder can't generate",
                found="attention in which tokens see those that follow them",
                expected="a model of the family " + " or ".join(n for n, f in FAMILIES.items() if f.is_causal),
            )
        weight = self.proj.weight
        shape = (batch_size, self.n_kv_head, self.seq_len, self.head_dim)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def decode(self, x_BTD: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """Attend from tokens that start at `position` () int64 to themselves and to the cache, which they join.

        All shapes are those of the whole cache, and nothing is written in place: one compiled graph serves all
        positions. The queries that share a head of keys are the rows of one matrix.
        """
        B, T, _ = x_BTD.shape
        token_T = _places(x_BTD, position)
        table_TH = None if self.rotary is None else functional.embedding(token_T, self.rotary)
        q_BNTH, k_BKTH, v_BKTH = self._split(x_BTD, table_TH)
        slot_S1 = torch.arange(self.seq_len, device=x_BTD.device).view(-1, 1)
        is_new_S1 = (slot_S1 >= position) & (slot_S1 < position + T)
        into_ST = (slot_S1 == token_T).to(k_BKTH.dtype)
        k_BKSH = torch.where(is_new_S1, into_ST @ k_BKTH, cache[0])
        v_BKSH = torch.where(is_new_S1, into_ST @ v_BKTH, cache[1])
        by_head, by_kv_head = (B, self.n_head, T, -1), (B, self.n_kv_head, self.n_head // self.n_kv_head * T, -1)
        scores_BNTS = (q_BNTH.reshape(by_kv_head) @ k_BKSH.transpose(2, 3)).view(by_head) * self.head_dim**-0.5
        weights_BNTS = scores_BNTS.masked_fill(slot_S1.view(1, -1) > token_T.view(-1, 1), -torch.inf).softmax(-1)
        return self._merge((weights_BNTS.view(by_kv_head) @ v_BKSH).view(by_head)), (k_BKSH, v_BKSH)

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over (B, T, D): two matrix products outside and two inside the attention.

        The products inside are counted in full, without what a kernel may save above the diagonal.
        """
        B, T, D = shape
        return 2.0 * B * T * D * (self.qkv.out_features + D) + 4.0 * B * T * T * D


def swiglu(x_BTF2: Tensor) -> Tensor:
    """The second half of the last dimension, gated by SiLU of the first, (..., 2 F) -> (..., F).

    Source: Shazeer, "GLU variants improve transformer", 2020, equation 6.
    """
    gate, x = x_BTF2.chunk(2, dim=-1)
    return silu(gate) * x


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "swiglu": swiglu,
}


class MLP(nn.Module):
    """Two linear maps with an activation between them, (B, T, D) -> (B, T, D).

    The first map is twice as wide for `swiglu`: its upper half makes the gate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        traits = config.traits
        self.activation = traits.activation
        n_maps = 2 if traits.activation == "swiglu" else 1
        self.up = nn.Linear(config.d_model, n_maps * config.hidden, bias=traits.has_bias)
        self.down = nn.Linear(config.hidden, config.d_model, bias=traits.has_bias)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Each token by itself."""
        return cast("Tensor", self.down(_ACTIVATIONS[self.activation](self.up(x_BTD))))

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over (B, T, D): its matrix products."""
        B, T, D = shape
        return 2.0 * B * T * D * (self.up.out_features + self.down.in_features)


class Residual(nn.Module):
    """Every unit but the ends: x + dropout(inner(norm(x), context)).

    Without `norm_first` it is norm(x + dropout(inner(x, context))).

    `inner` may be any module with that call. Where it has no `decode`, it treats each token by itself. What it says
    about where it can run (`device_apis`) and what it costs (`layer_cost`, `flops`) holds for the unit; a unit whose
    inner module is silent has none of these attributes.
    """

    def __init__(
        self, norm: nn.Module, inner: nn.Module, dropout: nn.Module | None = None, *, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm = norm
        self.inner = inner
        self.dropout = Dropout(0.0, 0) if dropout is None else dropout

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Add what `inner` makes of the input."""
        y_BTD = self.inner(self._before(x_BTD), context)
        return self._after(x_BTD + cast("Tensor", self.dropout(y_BTD, context)))

    def _before(self, x_BTD: Tensor) -> Tensor:
        return cast("Tensor", self.norm(x_BTD)) if self.norm_first else x_BTD

    def _after(self, x_BTD: Tensor) -> Tensor:
        return x_BTD if self.norm_first else cast("Tensor", self.norm(x_BTD))

    def new_cache(self, batch_size: int) -> Cache:
        """The inner module's cache, () where it remembers nothing."""
        new_cache = getattr(self.inner, "new_cache", None)
        return () if new_cache is None else cast("Cache", new_cache(batch_size))

    def decode(self, x_BTD: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """The unit for tokens that start at `position` () int64; earlier ones are in the cache."""
        y_BTD = self._before(x_BTD)
        decode = getattr(self.inner, "decode", None)
        y_BTD, cache = (self.inner(y_BTD, None), ()) if decode is None else decode(y_BTD, cache, position)
        return self._after(x_BTD + y_BTD), cache

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
    """Last unit: norm and linear map to logits, (B, T, D) -> (B, T, V); an encoder has a map with GELU before them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        is_causal = config.traits.is_causal
        self.transform = None if is_causal else nn.Linear(config.d_model, config.d_model)
        self.norm = _norm(config)
        self.linear = nn.Linear(config.d_model, config.vocab_size, bias=not is_causal)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        """Logits [nat, up to a constant]."""
        if self.transform is not None:
            x_BTD = gelu(self.transform(x_BTD))
        return cast("Tensor", self.linear(self.norm(x_BTD)))

    def new_cache(self, batch_size: int) -> Cache:
        """Nothing."""
        return ()

    def decode(self, x_BTD: Tensor, cache: Cache, position: Tensor) -> tuple[Tensor, Cache]:
        """The same as `forward`."""
        return self.forward(x_BTD), ()

    def flops(self, shape: tuple[int, ...]) -> float:
        """FLOP of a forward pass over (B, T, D): its matrix products."""
        B, T, D = shape
        return 2.0 * B * T * D * (self.linear.out_features + (0 if self.transform is None else D))


# --- the model --------------------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A model of any family, (B, T) tokens -> (B, T, V) logits: of the next token, an encoder's of the token itself.

    Initial weights are normal; where norms come first, the last matrix of each sublayer is narrower by
    sqrt(2 * n_layer) (GPT-2, Radford et al. 2019, section 2.3, as in karpathy/nanoGPT `model.py`); biases are zero. The
    standard deviation of 0.02, GPT-2's and BERT's, is that of width 768; it goes with 1 / sqrt(d_model) (LeCun et al.,
    "Efficient BackProp", 1998, section 4.6), so that activations and logits start alike at every width.

    A parameter's key in `state_dict()` is its layer's name followed by its name in the layer.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        """Build and initialise.

        Args:
            config: family and size.
            generator: source of all initial weights, drawn layer by layer in the order of `layers()`; None: torch's
                default generator.
        """
        super().__init__()
        self.config = config
        self._names = ["embedding"]
        with torch.random.fork_rng(devices=[]):  # modules draw weights when made; all of them are drawn again below
            self.embedding = Embedding(config)
            rotary_SH = rotary_table(config) if config.traits.has_rotary else None  # one for all blocks
            for i in range(config.n_layer):
                self.add_module(f"block{i}", _block(config, i, rotary_SH))
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
            is_narrow = is_last and self.config.traits.norm_first
            parameter.normal_(0.0, std / (2 * self.config.n_layer) ** 0.5 if is_narrow else std, generator=generator)

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
        """The caches of all units, for `decode`.

        Raises:
            SettingError: the model is an encoder.
        """
        return [cast("Any", unit).new_cache(batch_size) for _, unit in self.layers()]

    def decode(self, tokens_BT: Tensor, caches: list[Cache], position: Tensor) -> tuple[Tensor, list[Cache]]:
        """Logits (B, T, V) of tokens that start at `position` () int64, and the caches with these tokens in them."""
        x, after = tokens_BT, []
        for (_, unit), cache in zip(self.layers(), caches, strict=True):
            x, cache = cast("Any", unit).decode(x, cache, position)
            after.append(cache)
        return x, after


def _block(config: ModelConfig, i: int, rotary_SH: Tensor | None) -> nn.ModuleDict:
    inners: dict[str, nn.Module] = {"attention": SelfAttention(config, rotary_SH), "mlp": MLP(config)}
    first = config.traits.norm_first
    return nn.ModuleDict(
        {
            name: Residual(_norm(config), inner, Dropout(config.dropout, 1 + 2 * i + j), norm_first=first)
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
