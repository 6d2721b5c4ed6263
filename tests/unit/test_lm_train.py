"""The training loop: schedule, optimizer, events, evaluation, what stops it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

import lm

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def corpus(tmp_path: Path) -> lm.Corpus:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return lm.load_corpus(path=path, cache_dir=tmp_path)


def _model(corpus: lm.Corpus, **settings: object) -> lm.Transformer:
    sizes = {"n_layer": 1, "d_model": 16, "n_head": 2, "vocab_size": corpus.tokenizer.vocab_size, "seq_len": 12}
    return lm.Transformer(lm.ModelConfig(**{**sizes, **settings}), generator=torch.Generator().manual_seed(0))


def _config(**settings: object) -> lm.TrainConfig:
    return lm.TrainConfig(**{"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, **settings})


def test_learning_rate_rises_linearly_and_falls_along_half_a_cosine() -> None:
    config = _config(steps=103, warmup_steps=2, learning_rate=3.0, min_lr_ratio=0.1)
    rates = [lm.learning_rate(config, step) for step in range(103)]
    assert rates[:3] == pytest.approx([1.0, 2.0, 3.0])
    assert rates[52] == pytest.approx((3.0 + 0.3) / 2)
    assert rates[102] == pytest.approx(0.3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_loop_equals_one_written_by_hand(corpus: lm.Corpus) -> None:
    config, events, losses = _config(grad_clip=0.3, weight_decay=0.2), [], []
    # float64: the keys' bias has no influence on the loss, and Adam would blow the rounding of its gradient up
    model, plain = _model(corpus).double(), _model(corpus).double()
    lm.train(model, corpus, config, seed=4, on_event=events.append)

    matrices = [p for p in plain.parameters() if p.dim() == 2]
    others = [p for p in plain.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for step in range(6):
        batch = corpus.batch("train", step, 4, 12, 4)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(plain(batch.inputs).mT, batch.targets)
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in plain.parameters()))
        for p in plain.parameters():
            p.grad *= min(1.0, 0.3 / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lm.learning_rate(config, step)
        optimizer.step()
        losses += [loss.item(), norm.item()]
    assert [x for e in events for x in (e.loss, e.grad_norm)] == pytest.approx(losses, rel=1e-9)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_only_parameters_that_require_gradients_are_trained(corpus: lm.Corpus) -> None:
    model = _model(corpus)
    frozen = dict(model.layers())["block0.mlp"].inner.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = lm.train(model, corpus, _config(), seed=0)
    assert len(state.optimizer.state) == sum(p.requires_grad for p in model.parameters())
    inner = {f"block0.mlp.inner.{name}" for name, _ in frozen.named_parameters()}
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == inner


def test_weight_decay_acts_on_matrices_alone(corpus: lm.Corpus) -> None:
    state = lm.start_training(_model(corpus), _config(weight_decay=0.3))
    decay = {p.dim(): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.3, 1: 0.0}


def test_validation_is_due_every_so_many_steps_and_at_the_end(corpus: lm.Corpus) -> None:
    events: list[lm.Step] = []
    asked: list[str] = []
    lm.train(
        _model(corpus),
        corpus,
        _config(steps=5, eval_every=2),
        seed=0,
        evaluate_fn=lambda split: asked.append(split) or 1.25,
        on_event=events.append,
    )
    assert [(e.step, e.val_loss) for e in events] == [(1, None), (2, 1.25), (3, None), (4, 1.25), (5, 1.25)]
    assert asked == ["val"] * 3


def test_training_goes_on_from_a_state_to_the_same_weights(corpus: lm.Corpus) -> None:
    whole, parted = _model(corpus, dropout=0.2), _model(corpus, dropout=0.2)
    lm.train(whole, corpus, _config(), seed=0)

    class Pause(Exception):  # noqa: N818
        pass

    def pause(event: lm.Step) -> None:
        if event.step == 3:
            raise Pause

    state = lm.start_training(parted, _config())
    with pytest.raises(Pause):
        lm.train(parted, corpus, _config(), seed=0, on_event=pause, start=state)
    assert state.step == 3
    lm.train(parted, corpus, _config(), seed=0, start=state)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parted.parameters(), strict=True))


def test_a_models_dropout_gets_its_counters(corpus: lm.Corpus) -> None:
    seen: list[lm.Batch] = []
    for dropout in (0.0, 0.1):
        model = _model(corpus, dropout=dropout)
        lm.train(model, corpus, _config(steps=1), seed=0, step_fn=lambda batch: seen.append(batch) or 1.0)
    assert [set(batch.context) for batch in seen] == [set(), {"dropout"}]


def test_evaluation_is_the_mean_over_the_whole_split(corpus: lm.Corpus) -> None:
    model = _model(corpus).double()
    tokens = torch.from_numpy(corpus.test.astype("int64"))
    nats = []
    for start in range(0, len(tokens) - 1, 12):
        x, y = tokens[start : start + 12], tokens[start + 1 : start + 13]
        log_p = model(x[None, : len(y)])[0].log_softmax(-1)
        nats += [-log_p[t, v].item() for t, v in enumerate(y)]
    assert len(nats) == len(tokens) - 1
    assert lm.evaluate(model, corpus, "test", 5) == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_a_small_model_learns_a_repeated_sentence(corpus: lm.Corpus) -> None:
    model = _model(corpus)
    lm.train(model, corpus, _config(steps=150, batch_size=8, warmup_steps=10), seed=0)
    assert lm.evaluate(model, corpus, "test", 8) < 0.6 * lm.ngram_floor(corpus, "test")["bigram"]


def _with_bad_gradient(model: lm.Transformer, name: str, value: float) -> float:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    dict(model.named_parameters())[name].grad.view(-1)[3] = value
    return 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_update(corpus: lm.Corpus, value: float) -> None:
    model = _model(corpus)
    before = [p.clone() for p in model.parameters()]
    name, done = "block0.mlp.inner.up.weight", []

    def step(batch: lm.Batch) -> float:
        return lm.autograd_step(model, batch) if len(done) < 2 else _with_bad_gradient(model, name, value)

    def remember(event: lm.Step) -> None:
        done.append(event.step)
        before[:] = [p.clone() for p in model.parameters()]

    with pytest.raises(lm.NonFiniteError, match=r"step 3 [\s\S]*block0\.mlp\.inner\.up\.weight") as caught:
        lm.train(model, corpus, _config(), seed=0, step_fn=step, on_event=remember)
    assert (caught.value.step, caught.value.parameter) == (3, name)
    assert done == [1, 2]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_names_step_and_parameter(corpus: lm.Corpus) -> None:
    model = _model(corpus)
    with torch.no_grad():
        model.head.linear.weight[2, 2] = math.nan
    with pytest.raises(lm.NonFiniteError, match=r"step 1 .*loss is nan") as caught:
        lm.train(model, corpus, _config(), seed=0)
    assert caught.value.parameter != ""


@pytest.mark.parametrize("steps", [1, 50])
def test_a_huge_learning_rate_ends_in_an_error_and_finite_weights(corpus: lm.Corpus, steps: int) -> None:
    model, told = _model(corpus), []
    config = _config(steps=steps, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(lm.NonFiniteError, match="validation" if steps == 1 else "stopped before its update"):
        lm.train(model, corpus, config, seed=0, on_event=told.append)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(event.val_loss is None or math.isfinite(event.val_loss) for event in told)


@pytest.mark.parametrize(
    "setting", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": -1.0}, {"grad_clip": math.nan}, {"eval_every": 0}]
)
def test_impossible_settings_are_errors_that_name_them(setting: dict[str, float]) -> None:
    with pytest.raises(lm.SettingError, match=next(iter(setting))):
        _config(**setting)
