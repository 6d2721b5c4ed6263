"""The model's structure: layers, initial weights, replaced inner modules, settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lm
from lm.model import Residual

CONFIG = {"n_layer": 2, "d_model": 16, "n_head": 2, "vocab_size": 11, "seq_len": 8}


def _model(seed: int = 0, **settings: object) -> lm.Transformer:
    return lm.Transformer(lm.ModelConfig(**{**CONFIG, **settings}), generator=torch.Generator().manual_seed(seed))


class _Inner(nn.Module):
    """A foreign module: ignores the context, is silent about devices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor, context: object = None) -> torch.Tensor:
        return torch.tanh(x * self.weight)


class _Talking(_Inner):
    device_apis = frozenset({"aer"})

    def layer_cost(self, api: str, shape: tuple[int, ...]) -> dict[str, float]:
        return {"flops": 7.0}

    def flops(self, shape: tuple[int, ...]) -> float:
        return 3.0


FAMILIES = pytest.mark.parametrize("family", list(lm.FAMILIES))


@FAMILIES
def test_layers_are_the_model_from_left_to_right(family: str) -> None:
    model, tokens = _model(family=family), torch.arange(8)[None]
    names = [name for name, _ in model.layers()]
    assert names == ["embedding", "block0.attention", "block0.mlp", "block1.attention", "block1.mlp", "head"]
    x = tokens
    for _, unit in model.layers():
        x = unit(x, {})
    assert torch.equal(x, model(tokens))


@FAMILIES
def test_layers_own_every_parameter_once_under_their_name(family: str) -> None:
    model = _model(family=family)
    owned = {f"{name}.{key}": p for name, unit in model.layers() for key, p in unit.named_parameters()}
    assert owned.keys() == model.state_dict().keys()
    assert sum(p.numel() for p in owned.values()) == sum(p.numel() for p in model.parameters())


def test_initial_weights_come_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = _model(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    b, c = _model(5), _model(6)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.head.linear.weight, c.head.linear.weight)


@pytest.mark.parametrize(("d_model", "expected"), [(768, 0.02), (192, 0.04)])
@FAMILIES
def test_initial_spread_is_that_of_gpt2_at_its_width(d_model: int, expected: float, family: str) -> None:
    """Relative sd of a sample sd of n values is 1 / sqrt(2n); 5 of them."""
    model = _model(d_model=d_model, n_layer=2, family=family)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scaled = family != "bert" and name.endswith(("inner.proj.weight", "inner.down.weight"))
            std = expected / math.sqrt(4) if scaled else expected
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
        else:
            assert p.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


def test_an_untrained_model_is_about_uniform() -> None:
    """Logits have the variance 0.02**2 * 768 = 0.31 at every width, which costs half of it in the loss."""
    tokens = torch.randint(0, 11, (64, 8), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 11, (64, 8), generator=torch.Generator().manual_seed(1))
    assert lm.loss(_model()(tokens), targets).item() == pytest.approx(math.log(11) + 0.15, abs=0.1)


def test_replacing_an_inner_module_changes_no_other_weight() -> None:
    model = _model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inner = _Inner()
    model.replace_inner("block1.mlp", inner)
    after = model.state_dict()
    assert dict(model.layers())["block1.mlp"].inner is inner
    assert set(after) - set(before) == {"block1.mlp.inner.weight"}
    assert all(torch.equal(before[k], after[k]) for k in set(after) & set(before))
    assert model(torch.arange(8)[None]).shape == (1, 8, 11)


@pytest.mark.parametrize("name", ["head", "embedding", "block2.mlp", "block0", ""])
def test_only_residual_units_have_an_inner_module(name: str) -> None:
    with pytest.raises(lm.SettingError, match=r"block1\.mlp"):
        _model().replace_inner(name, _Inner())


def test_a_unit_says_about_devices_and_cost_what_its_inner_module_says() -> None:
    model = _model()
    unit = dict(model.layers())["block0.mlp"]
    assert not hasattr(unit, "device_apis")
    assert not hasattr(unit, "layer_cost")
    assert unit.flops((2, 8, 16)) == 2 * 2 * 8 * 16 * 64 * 2
    model.replace_inner("block0.mlp", _Inner())
    assert not hasattr(unit, "flops")
    model.replace_inner("block0.mlp", _Talking())
    assert unit.device_apis == {"aer"}
    assert unit.layer_cost("aer", (1, 2, 3)) == {"flops": 7.0}
    assert unit.flops((1, 2, 3)) == 3.0


@pytest.mark.parametrize("settings", [{"family": f, "n_kv_head": k} for f in lm.FAMILIES for k in (None, 1)])
def test_flops_agree_with_torchs_own_count(settings: dict[str, object]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = _model(**settings).double(), torch.zeros(3, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    units = dict(model.layers())
    ours = sum(unit.flops((3, 8, 16)) for name, unit in units.items() if name != "embedding")
    assert ours == counter.get_total_flops()


@FAMILIES
def test_one_compiled_graph_serves_all_blocks(family: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = _model(n_layer=4, dropout=0.1, family=family), CompileCounter()
    x, context = torch.randn(2, 8, 16), {"dropout": torch.tensor([1, 2])}
    for name, unit in model.layers():
        if name.startswith("block"):
            torch.compile(unit, backend=counter, fullgraph=True, dynamic=False)(x, context)
    torch._dynamo.reset()
    assert counter.frame_count == 2  # attention and MLP


@FAMILIES
def test_buffers_are_no_state(family: str) -> None:
    model = _model(dropout=0.5, family=family)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(("d_model", "hidden"), [(8, 24), (64, 176), (768, 2048), (4096, 10928)])
def test_a_gated_mlp_has_about_the_parameters_of_a_plain_one(d_model: int, hidden: int) -> None:
    assert lm.ModelConfig(1, d_model, 1, 5, 4, family="llama").hidden == hidden
    assert 0 <= 3 * hidden - 8 * d_model < 24


def test_grouped_queries_share_weights_of_keys_and_values() -> None:
    shapes = {n: tuple(p.shape) for n, p in _model(family="llama", n_head=4, n_kv_head=2).named_parameters()}
    assert shapes["block0.attention.inner.qkv.weight"] == (16 + 8 + 8, 16)
    assert not any(name.endswith("bias") for name in shapes)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_a_tied_head_has_the_embeddings_weight(family: str) -> None:
    model = _model(family=family, tie_embeddings=True)
    assert model.head.linear.weight is model.embedding.token.weight


def test_a_sequence_longer_than_the_positions_is_an_error() -> None:
    with pytest.raises(lm.SettingError, match="9 tokens"):
        _model()(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"n_head": 3}, "n_head has to divide d_model"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": 2.5}, "vocab_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"d_ff": 0}, "d_ff"),
        ({"family": "rnn"}, r"rnn'\n.*'gpt' or 'llama' or 'bert'"),
        ({"n_head": 4, "n_kv_head": 3}, "n_kv_head has to divide n_head"),
        ({"n_kv_head": 4}, "n_kv_head has to divide n_head"),
        ({"n_kv_head": 0}, "n_kv_head has to be a whole number"),
        ({"norm_eps": 0.0}, "norm_eps has to be a number above 0"),
        ({"norm_eps": "tiny"}, "norm_eps has to be a number above 0"),
        ({"family": "llama", "rope_base": math.inf}, "rope_base has to be a number above 0"),
        ({"rope_base": 1e4}, "rope_base needs rotary positions"),
        ({"family": "llama", "n_head": 16}, "heads of even width"),
        ({"family": "bert", "vocab_size": 1}, "at least 2 tokens"),
    ],
)
def test_impossible_sizes_are_errors_that_name_the_setting(setting: dict[str, object], text: str) -> None:
    with pytest.raises(lm.SettingError, match=text):
        _model(**setting)


def test_loss_ignores_targets_of_minus_100() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    kept = [(0, 0, 1), (0, 2, 2), (1, 2, 4)]
    expected = -sum(logits[b, t].log_softmax(-1)[v].item() for b, t, v in kept) / 3
    assert lm.loss(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_a_model_can_be_described_without_memory() -> None:
    with torch.device("meta"):
        model = lm.Transformer(lm.ModelConfig(n_layer=48, d_model=1600, n_head=25, vocab_size=50257, seq_len=1024))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert isinstance(dict(model.layers())["block47.mlp"], Residual)
