"""The training loop: AdamW, warm-up and cosine, clipping, validation; all randomness is a function of seed and step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lm.data import Batch, Corpus
from lm.errors import NonFiniteError, SettingError
from lm.masking import mask_batch
from lm.model import Transformer, loss, trainable_parameters

if TYPE_CHECKING:
    from lm.config import ModelConfig

StepFn = Callable[[Batch], float]
EvaluateFn = Callable[[str], float]

_REMEDY = "start again with a lower learning_rate or more warmup_steps"


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: number of updates.
        batch_size: rows of a batch.
        learning_rate: the highest, reached at the end of the warm-up.
        warmup_steps: steps in which it rises linearly from 0.
        weight_decay: AdamW's, on matrices only (2-dimensional parameters).
        grad_clip: largest norm of the whole gradient; inf: no clipping.
        beta1: AdamW's decay of the gradient's mean.
        beta2: AdamW's decay of its square's mean.
        min_lr_ratio: learning rate at the last step, as a share of the highest.
        eval_every: steps between validations, which take the whole split; the last step has one in any case.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 20
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    min_lr_ratio: float = 0.1
    eval_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} has to be at least 1", found=str(getattr(self, name)))
        for name in ("learning_rate", "warmup_steps", "weight_decay", "grad_clip", "min_lr_ratio"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} has to be at least 0", found=str(getattr(self, name)))


@dataclass
class TrainState:
    """What training changes beside the weights.

    Attributes:
        step: number of updates done.
        optimizer: over the parameters that require gradients.
    """

    step: int
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Step:
    """One finished step, as `on_event` gets it.

    Attributes:
        step: number of updates done, 1 after the first.
        loss: of the step's batch before the update [nat/token].
        lr: learning rate of the update.
        grad_norm: norm of the whole gradient before clipping.
        val_loss: on the whole validation split after the update [nat/token]; None between validations.
        step_s: time of forward and backward passes [s].
        optimizer_s: time of clipping and update [s].
        data_s: time to make the batch [s].
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    val_loss: float | None
    step_s: float
    optimizer_s: float
    data_s: float


def train(
    model: Transformer,
    corpus: Corpus,
    config: TrainConfig,
    *,
    seed: int,
    step_fn: StepFn | None = None,
    evaluate_fn: EvaluateFn | None = None,
    on_event: Callable[[Step], None] | None = None,
    start: TrainState | None = None,
) -> TrainState:
    """Train until `config.steps` updates are done: to predict the next token, or, an encoder, masked ones.

    `on_event` is called once a step, when weights and `start.step` are those after it: a checkpoint written there
    resumes to the same bits. An exception from it ends training between two steps.

    Args:
        model: holds the parameters; its dropout counters are put into the batches if `model.config.dropout` > 0.
        corpus: batches come from its training split.
        config: how to train.
        seed: of batches and dropout masks.
        step_fn: returns the loss [nat/token] of a batch and leaves gradients in `p.grad`; None: plain autograd.
        evaluate_fn: loss on a whole split [nat/token]; None: `evaluate`.
        on_event: told about each step.
        start: where to go on; None: `start_training(model, config)`.

    Returns:
        The state after the last step.

    Raises:
        NonFiniteError: a loss or a gradient is NaN or infinite, and weights are those before the step; or the
            validation after the step is, and `on_event` isn't told of it.
    """
    state = start or start_training(model, config)
    run_step = step_fn or (lambda batch: autograd_step(model, batch))
    run_evaluation = evaluate_fn or (lambda split: evaluate(model, corpus, split, config.batch_size))
    parameters = [p for _, p in trainable_parameters(model)]

    while state.step < config.steps:
        t0 = time.perf_counter()
        batch = _batch(model.config, corpus, state.step, config.batch_size, seed)
        t1 = time.perf_counter()
        state.optimizer.zero_grad()
        step_loss = run_step(batch)
        t2 = time.perf_counter()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = float(norm)
        if not (math.isfinite(step_loss) and math.isfinite(grad_norm)):
            raise _non_finite(model, state.step + 1, step_loss, grad_norm)
        nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        lr = learning_rate(config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        t3 = time.perf_counter()

        state.step += 1
        is_due = state.step % config.eval_every == 0 or state.step == config.steps
        val_loss = run_evaluation("val") if is_due else None
        if val_loss is not None and not math.isfinite(val_loss):
            raise _non_finite_evaluation(state.step, val_loss)
        if on_event is not None:
            on_event(Step(state.step, step_loss, lr, grad_norm, val_loss, t2 - t1, t3 - t2, t1 - t0))
    return state


def start_training(model: nn.Module, config: TrainConfig) -> TrainState:
    """State before the first step: AdamW over the parameters that require gradients, decay on matrices only.

    Source: Loshchilov, Hutter, "Decoupled weight decay regularization", 2019; no decay on biases, norms and other
    parameters that are no matrices, after karpathy/nanoGPT `model.py`.
    """
    parameters = [p for _, p in trainable_parameters(model)]
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    groups = [group for group in groups if group["params"]]
    return TrainState(0, torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update after `step` updates: linear warm-up, then half a cosine to the smallest.

    Source: Loshchilov, Hutter, "SGDR", 2017, eq. 5, without restarts.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def autograd_step(model: nn.Module, batch: Batch) -> float:
    """Loss of a batch [nat/token]; adds its gradients to `p.grad`."""
    value = loss(model(batch.inputs, batch.context), batch.targets)
    value.backward()  # type: ignore[no-untyped-call]
    return value.item()


@torch.no_grad()
def evaluate(model: Transformer, corpus: Corpus, split: str, batch_size: int) -> float:
    """Mean loss over all tokens of a split but the first [nat/token].

    An encoder's is that over masked ones, which are always the same for a batch size.

    The split is read in windows of `seq_len` that don't overlap, so a token is predicted from up to `seq_len` tokens
    of its own window.
    """
    nats, count = 0.0, 0
    for i, batch in enumerate(corpus.windows(split, model.config.seq_len, batch_size)):
        batch = _objective(model.config, batch, 0, i)
        logits_BTV = model(batch.inputs, batch.context)
        nats += cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten(), reduction="sum").item()
        count += int((batch.targets != -100).sum())
    return nats / count


def _batch(model: ModelConfig, corpus: Corpus, step: int, batch_size: int, seed: int) -> Batch:
    batch = corpus.batch("train", step, batch_size, model.seq_len, seed, dropout=model.dropout > 0)
    return _objective(model, batch, seed, step)


def _objective(model: ModelConfig, batch: Batch, seed: int, step: int) -> Batch:
    """What the family learns from a batch of `Corpus`."""
    if model.traits.is_causal:
        return batch
    return mask_batch(batch, seed=seed, step=step, mask_token=model.mask_token)


def _non_finite_evaluation(step: int, val_loss: float) -> NonFiniteError:
    message = f"the validation after step {step} gave a loss of {val_loss}"
    return NonFiniteError(message, step=step, remedy=_REMEDY)


def _non_finite(model: nn.Module, step: int, step_loss: float, grad_norm: float) -> NonFiniteError:
    """The error, with the parameter whose gradient is worst: most NaN or infinite elements, then largest element."""
    worst = ("", 0.0, 0.0)
    for name, parameter in trainable_parameters(model):
        if parameter.grad is None:
            continue
        grad = parameter.grad.detach()
        bad = float((~grad.isfinite()).float().mean())
        largest = float(grad.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if (bad, largest) > worst[1:]:
            worst = (name, bad, largest)
    name, bad, largest = worst
    where = f"worst gradient: {name} ({bad:.0%} of it not finite, largest other element {largest:.3g})" if name else ""
    return NonFiniteError(
        f"step {step} stopped before its update: the loss is {step_loss}, the gradient's norm {grad_norm}",
        step=step,
        parameter=name,
        found=where,
        remedy=_REMEDY,
    )
