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


def test_layers_are_the_model_from_left_to_right() -> None:
    model, tokens = _model(), torch.arange(8)[None]
    names = [name for name, _ in model.layers()]
    assert names == ["embedding", "block0.attention", "block0.mlp", "block1.attention", "block1.mlp", "head"]
    x = tokens
    for _, unit in model.layers():
        x = unit(x, {})
    assert torch.equal(x, model(tokens))


def test_layers_own_every_parameter_once_under_their_name() -> None:
    model = _model()
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
def test_initial_spread_is_that_of_gpt2_at_its_width(d_model: int, expected: float) -> None:
    """Relative sd of a sample sd of n values is 1 / sqrt(2n); 5 of them."""
    model = _model(d_model=d_model, n_layer=2)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scaled = name.endswith(("inner.proj.weight", "inner.down.weight"))
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


def test_flops_agree_with_torchs_own_count() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = _model().double(), torch.zeros(3, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    units = dict(model.layers())
    ours = sum(unit.flops((3, 8, 16)) for name, unit in units.items() if name != "embedding")
    assert ours == counter.get_total_flops()


def test_one_compiled_graph_serves_all_blocks() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = _model(n_layer=4, dropout=0.1), CompileCounter()
    x, context = torch.randn(2, 8, 16), {"dropout": torch.tensor([1, 2])}
    for name, unit in model.layers():
        if name.startswith("block"):
            torch.compile(unit, backend=counter, fullgraph=True, dynamic=False)(x, context)
    torch._dynamo.reset()
    assert counter.frame_count == 2  # attention and MLP


def test_buffers_of_the_dropout_are_no_state() -> None:
    assert _model(dropout=0.5).state_dict().keys() == _model().state_dict().keys()


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
        ({"family": "rnn"}, "rnn"),
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
