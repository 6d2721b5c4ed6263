"""The transformer against a GPT-2 written plainly in float64, with the model's weights."""

from __future__ import annotations

import math

import pytest
import torch

import lm
from lm.draws import Dropout, keep_mask

# Float32 against float64: each of the ~20 roundings in sequence contributes eps = 6e-8 relative, sums over at most
# K = 4 * 24 terms add sqrt(K) eps; 1e-5 is 8 times the product.
RTOL32 = 1e-5


def _gpt2(weights: dict[str, torch.Tensor], tokens: torch.Tensor, n_layer: int, n_head: int) -> torch.Tensor:
    """GPT-2 without any module of torch: logits (B, T, V)."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (var + 1e-5) ** 0.5 * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    T = tokens.shape[1]
    x = weights["embedding.token.weight"][tokens] + weights["embedding.position.weight"][torch.arange(T)]
    for i in range(n_layer):
        unit = f"block{i}.attention"
        q, k, v = linear(norm(x, f"{unit}.norm"), f"{unit}.inner.qkv").chunk(3, dim=-1)
        heads = []
        for h in range(n_head):
            s = slice(h * q.shape[-1] // n_head, (h + 1) * q.shape[-1] // n_head)
            score = q[..., s] @ k[..., s].mT / math.sqrt(s.stop - s.start)
            future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
            heads.append(torch.exp(score.masked_fill(future, -math.inf)))
            heads[-1] = heads[-1] / heads[-1].sum(-1, keepdim=True) @ v[..., s]
        x = x + linear(torch.cat(heads, -1), f"{unit}.inner.proj")
        unit = f"block{i}.mlp"
        h = linear(norm(x, f"{unit}.norm"), f"{unit}.inner.up")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{unit}.inner.down")
    return norm(x, "head.norm") @ weights["head.linear.weight"].T


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    kept = targets != -100
    return -torch.log(p[kept].gather(1, targets[kept][:, None])).mean()


def _model(seed: int = 0, **settings: object) -> lm.Transformer:
    config = lm.ModelConfig(**{"n_layer": 3, "d_model": 24, "n_head": 3, "vocab_size": 17, "seq_len": 11, **settings})
    model = lm.Transformer(config, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():  # weights far from their initial values, biases and norms included
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


@pytest.mark.parametrize("T", [1, 2, 7, 11])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, RTOL32)])
def test_logits_loss_and_gradients_equal_those_of_a_plain_gpt2(T: int, dtype: torch.dtype, rtol: float) -> None:
    model = _model().to(dtype)
    generator = torch.Generator().manual_seed(T)
    tokens = torch.randint(0, 17, (3, T), generator=generator)
    targets = torch.randint(0, 17, (3, T), generator=generator)
    targets[0, 0] = -100
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}

    logits, expected = model(tokens), _gpt2(weights, tokens, 3, 3)
    torch.testing.assert_close(logits.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())

    loss, expected_loss = lm.loss(logits, targets), _nll(expected, targets)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=rtol)
    loss.backward()
    expected_loss.backward()
    scale = max(w.grad.abs().max().item() for w in weights.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.double(), weights[name].grad, rtol=rtol, atol=rtol * scale, msg=name)


def test_tied_head_gets_the_gradient_of_both_uses() -> None:
    model = _model(tie_embeddings=True).double()
    tokens = torch.randint(0, 17, (2, 11), generator=torch.Generator().manual_seed(0))
    assert "head.linear.weight" not in dict(model.named_parameters())
    lm.loss(model(tokens), tokens.roll(-1, 1)).backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights["head.linear.weight"] = weights["embedding.token.weight"]
    _nll(_gpt2(weights, tokens, 3, 3), tokens.roll(-1, 1)).backward()
    torch.testing.assert_close(model.embedding.token.weight.grad, weights["embedding.token.weight"].grad)


def test_a_token_sees_nothing_that_follows_it() -> None:
    model = _model()
    tokens = torch.randint(0, 17, (1, 11), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 17
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6], after[:, 6])


# --- dropout ----------------------------------------------------------------------------------------------------------


def _rows(seed: int, step: int, n: int) -> torch.Tensor:
    from lm.data import row_counters

    return torch.from_numpy(row_counters(seed, step, n, 2).view("int64"))


def _mix(x: int, key: int = 0) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= (x >> 15) ^ key
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def _hash(row: int, layer: int, element: int) -> int:
    """The mask's hash in Python's whole numbers."""
    low = _mix((row % 2**32 + layer * 0x9E3779B9) % 2**32)
    high = _mix(((row >> 32) % 2**32) ^ low)
    return _mix(element ^ low, high)


def test_dropout_mask_is_the_documented_hash_of_row_layer_and_element() -> None:
    rows = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
    for layer in (0, 1, 7, 1000):
        mask = keep_mask(rows, torch.tensor(layer), (5, 3), 0.3)
        for b, row in enumerate(rows.tolist()):
            expected = [_hash(row, layer, e) >= round(0.3 * 2**32) for e in range(15)]
            assert mask[b].flatten().tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_is_right_and_even_over_elements(p: float) -> None:
    """Binomial tests at 5 standard deviations: false alarm below 1e-6 a comparison, 64 * 32 + 1 comparisons."""
    n = 2000
    mask = torch.cat([keep_mask(_rows(3, step, 100), torch.tensor(2), (64, 32), p) for step in range(n // 100)])
    kept = mask.double()
    sd = math.sqrt(p * (1 - p))
    assert abs(kept.mean().item() - (1 - p)) < 5 * sd / math.sqrt(kept.numel())
    assert (kept.mean(0) - (1 - p)).abs().max().item() < 5 * sd / math.sqrt(n)
    z = (kept.mean(0) - (1 - p)) / (sd / math.sqrt(n))  # spread over elements: chi-square, mean 1, sd sqrt(2 / 2048)
    assert abs((z**2).mean().item() - 1) < 5 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("pair", ["rows", "layers", "steps", "seeds", "neighbours", "columns"])
def test_dropout_masks_are_uncorrelated_between(pair: str) -> None:
    """Correlation of 64 * 2048 pairs of bits, at 5 standard deviations (false alarm 6e-7)."""
    shape, p = (64, 32), 0.5

    def mask(seed: int, step: int, layer: int) -> torch.Tensor:
        return keep_mask(_rows(seed, step, 64), torch.tensor(layer), shape, p).double() - 0.5

    a = mask(0, 5, 1)
    b = {
        "rows": a.roll(1, 0),
        "layers": mask(0, 5, 2),
        "steps": mask(0, 6, 1),
        "seeds": mask(1, 5, 1),
        "neighbours": a.roll(1, 2),
        "columns": a.roll(1, 1),
    }[pair]
    assert abs((a * b).mean().item()) / 0.25 < 5 / math.sqrt(a.numel())


def test_consecutive_raw_counters_give_unrelated_masks() -> None:
    """Even counters that nothing has mixed; 1000 rows, all pairs of neighbours, 5 standard deviations."""
    mask = keep_mask(torch.arange(1000), torch.tensor(0), (16, 16), 0.5).double() - 0.5
    assert abs((mask[1:] * mask[:-1]).mean().item()) / 0.25 < 5 / math.sqrt(mask[1:].numel())


def test_dropout_keeps_the_mean_and_drops_the_same_elements_in_the_gradient() -> None:
    dropout = Dropout(0.25, 3)
    x = torch.ones(8, 64, 32, requires_grad=True)
    y = dropout(x, {"dropout": _rows(0, 0, 8)})
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(0.25 / 0.75 / x.numel()))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("n_microbatches", [2, 3, 4, 12])
def test_dropout_is_the_same_for_any_number_of_microbatches(n_microbatches: int) -> None:
    model = _model(dropout=0.3).double()
    tokens = torch.randint(0, 17, (12, 11), generator=torch.Generator().manual_seed(0))
    rows = _rows(0, 0, 12)
    whole = model(tokens, {"dropout": rows})
    chunks = zip(tokens.chunk(n_microbatches), rows.chunk(n_microbatches), strict=True)
    torch.testing.assert_close(torch.cat([model(t, {"dropout": r}) for t, r in chunks]), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, model(tokens))


def test_compiled_dropout_draws_the_same_mask() -> None:
    compiled = torch.compile(keep_mask, backend="aot_eager", fullgraph=True)
    rows, layer = _rows(0, 0, 4), torch.tensor(5)
    assert torch.equal(compiled(rows, layer, (7, 5), 0.4), keep_mask(rows, layer, (7, 5), 0.4))
