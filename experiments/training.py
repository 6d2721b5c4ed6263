"""Train one arm with one seed on its placed model: metrics, checkpoints, resume, final losses.

Files of `arms/<arm>/seed-<k>/`: `metrics.jsonl` has only what is the same in every run of the configuration;
`timings.jsonl` has what a clock says. Resuming cuts both back to the checkpoint's step and goes on, so that
`metrics.jsonl` ends up the same bit by bit.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hetero
import lm
from experiments import arms, record, usage
from experiments.cost import Meter
from experiments.errors import RunInterruptedError
from hetero import trace
from hetero.schedule import simulate
from lm import checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from experiments.config import Config
    from experiments.interrupts import Interrupts
    from experiments.planning import Setting
    from experiments.progress import Progress

_LAST_STEPS = 20  # of which the training loss is the mean: one batch is too noisy


@dataclass(frozen=True)
class Surroundings:
    """What a training needs beside its own settings.

    Attributes:
        setting: devices, text, configuration.
        folder: of the run.
        floors: split -> n-gram losses [nat/token].
        progress: told about every step.
        interrupts: asked after every step.
    """

    setting: Setting
    folder: Path
    floors: Mapping[str, Mapping[str, float]]
    progress: Progress
    interrupts: Interrupts


def train_seed(around: Surroundings, arm: str, seed: int, plan: hetero.Plan) -> dict[str, Any]:
    """Train, or go on training, or return the result of a training that is finished.

    Returns:
        The seed's part of `summary.json`, with the resources it used.

    Raises:
        RunInterruptedError: a signal came; a checkpoint of the last step is written.
        RunFolderError: the finished training is of other settings or another text.
        HeteroError, QuantumError, LMError: the training failed; `status.json` says how.
    """
    folder = seed_folder(around.folder, arm, seed)
    record.make_folder(folder)
    status_file = folder / "status.json"
    if status_file.exists() and (status := record.read_json(status_file))["status"] == "complete":
        remedy = "put configuration and text back as they were, or start a new run with --out DIR"
        now = checkpoint_config(around.setting, arm, seed)
        record.refuse_other(status_file, status.get("config", {}), now, remedy=remedy)
        result: dict[str, Any] = status["result"]
        return result
    training = _Training(around, arm, seed, plan)
    try:
        with around.interrupts.deferred():
            result = training.run()
    except BaseException as error:
        training.end(_word_for(error), message=str(error))
        raise
    training.end("complete", result=result)
    return result


def seed_folder(run_folder: Path, arm: str, seed: int) -> Path:
    """Where a seed's files are."""
    return run_folder / "arms" / arm / f"seed-{seed}"


def checkpoint_config(setting: Setting, arm: str, seed: int) -> dict[str, Any]:
    """What a training is made of: all that its weights depend on, the text included, by dotted key."""
    config = setting.config
    kept = {name: getattr(config, name).model_dump(mode="json") for name in ("data", "model", "train")}
    kept["quantum"] = config.quantum.model_dump(mode="json") if config.quantum else {}
    flat = {f"{section}.{key}": value for section, values in kept.items() for key, value in values.items()}
    flat["train.learning_rate"] = config.train.rate(arm)
    for name in ("eval_every", "checkpoint_every"):
        del flat[f"train.{name}"]
    flat |= {"data.sha256": setting.corpus.sha256, "plan.n_microbatches": config.plan.n_microbatches}
    return flat | {"arm": arm, "seed": seed}


def train_config(config: Config, arm: str) -> lm.TrainConfig:
    """The training of an arm in `lm`'s terms."""
    train = config.train
    return lm.TrainConfig(
        steps=train.steps,
        batch_size=train.batch_size,
        learning_rate=train.rate(arm),
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        grad_clip=math.inf if train.grad_clip is None else train.grad_clip,
        min_lr_ratio=train.min_lr_ratio,
        eval_every=train.eval_every,
    )


class _Training:
    """One training under way: owns the placed model and the open files."""

    def __init__(self, around: Surroundings, arm: str, seed: int, plan: hetero.Plan) -> None:
        self.around, self.arm, self.seed, self.plan = around, arm, seed, plan
        setting = around.setting
        self.config, self.corpus = setting.config, setting.corpus
        self.folder = seed_folder(around.folder, arm, seed)
        self.step = 0
        self.model = arms.build(self.config, arm, seed, self.corpus.tokenizer.vocab_size)
        self.placed = hetero.place(self.model, plan, topology=setting.topology, loss=lm.loss)
        self.settings = train_config(self.config, arm)
        self.state = lm.start_training(self.model, self.settings)
        self.before = usage.Usage()
        self.started = usage.counters(self.placed, self.model)
        self.meter = Meter()

    def run(self) -> dict[str, Any]:
        """Train to the end and return the seed's result."""
        self._resume()
        self.metrics = record.JsonLines(self.folder / "metrics.jsonl")
        self.timings = record.JsonLines(self.folder / "timings.jsonl")
        self.around.progress.training(f"{self.arm} seed {self.seed}", self.around.floors["val"])
        record.write_json(self.folder / "status.json", self._status("running"))
        if self.state.step == 0:
            self._evaluated("val", self.evaluate("val"), step=0)
        lm.train(
            self.model,
            self.corpus,
            self.settings,
            seed=self.seed,
            step_fn=self.placed.step,
            evaluate_fn=self.evaluate,
            on_event=self._after_step,
            start=self.state,
        )
        self.around.interrupts.check()
        test_loss = self.evaluate("test")
        self.around.progress.training(f"{self.arm} seed {self.seed}", self.around.floors["test"])
        self._evaluated("test", test_loss, step=self.settings.steps)
        return self._result(test_loss)

    def end(self, word: str, *, message: str = "", result: dict[str, Any] | None = None) -> None:
        """Close everything and write the last status."""
        self.placed.close()
        for file in (getattr(self, "metrics", None), getattr(self, "timings", None)):
            if file is not None:
                file.close()
        record.write_json(self.folder / "status.json", self._status(word, message=message, result=result))

    def evaluate(self, split: str) -> float:
        """Loss on a whole split [nat/token], by the placed model.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        nats, count = 0.0, 0
        for batch in self.corpus.windows(split, self.config.model.seq_len, self.config.train.batch_size):
            part, number = self.placed.evaluate(batch)
            nats, count = nats + part, count + number
        loss = nats / count
        if not math.isfinite(loss):
            raise self._non_finite(f"the {split} loss is {loss}")
        return loss

    def _non_finite(self, what: str) -> lm.NonFiniteError:
        step, remedy = self.state.step, "start again with a lower learning_rate or more warmup_steps"
        return lm.NonFiniteError(f"{what} after step {step}", step=step, remedy=remedy)

    def _resume(self) -> None:
        """Take up the newest good checkpoint, and cut the records back to its step."""
        folder = self.folder / "checkpoints"
        found = None
        if any(folder.glob("step-*.json")):
            config = checkpoint_config(self.around.setting, self.arm, self.seed)
            found = checkpoint.load(folder, self.model, self.state.optimizer, config=config)
        if found is not None:
            self.step = self.state.step = found.step
            self.before = usage.Usage.from_json(found.extra["usage"])
        for name in ("metrics.jsonl", "timings.jsonl"):
            record.keep_lines(
                self.folder / name,
                lambda line: found is not None and line["step"] <= found.step and line.get("split") != "test",
            )

    def _after_step(self, event: lm.Step) -> None:
        self.step = event.step
        line = {"step": event.step, "split": "train", "loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm}
        self.metrics.append(line)
        times = {"step_s": event.step_s, "optimizer_s": event.optimizer_s, "data_s": event.data_s}
        self.timings.append({"step": event.step} | times)
        self.around.progress.step(event.step, self.settings.steps, event.loss)
        if event.val_loss is not None:
            self._evaluated("val", event.val_loss, step=event.step)
        is_last = event.step == self.settings.steps
        if is_last:  # before the checkpoint: whoever resumes there has no step to measure
            predicted = simulate(self.plan, self.around.setting.topology).events
            trace.write(self.folder / "trace.json", predicted=predicted, measured=self.placed.last_events)
        due = event.step % self.config.train.checkpoint_every == 0 or is_last
        if due or self.around.interrupts.received is not None:
            self._save()
        self.around.interrupts.check()

    def _evaluated(self, split: str, loss: float, *, step: int) -> None:
        self.metrics.append({"step": step, "split": split, "loss": loss})
        self.around.progress.evaluated(step, self.settings.steps, split, loss)

    def _save(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self._non_finite("weights are not finite")
        folder, extra = self.folder / "checkpoints", {"usage": self._usage().to_json()}
        config = checkpoint_config(self.around.setting, self.arm, self.seed)
        checkpoint.save(folder, self.model, self.state.optimizer, self.state.step, extra, config=config)

    def _usage(self) -> usage.Usage:
        now = usage.counters(self.placed, self.model)
        return self.before + usage.Usage.since(self.started, now, self.meter.spent())

    def _status(self, word: str, *, message: str = "", result: dict[str, Any] | None = None) -> dict[str, Any]:
        status: dict[str, Any] = {"status": word, "step": self.step, "steps": self.settings.steps}
        status |= {"updated": record.now(), "message": message}
        if result is None:
            return status
        return status | {"config": checkpoint_config(self.around.setting, self.arm, self.seed), "result": result}

    def _result(self, test_loss: float) -> dict[str, Any]:
        lines = record.read_lines(self.folder / "metrics.jsonl")
        times = record.read_lines(self.folder / "timings.jsonl")
        whole = [t["step_s"] + t["optimizer_s"] + t["data_s"] for t in times]
        tokens = self.settings.batch_size * self.config.model.seq_len
        used = self._usage()
        return {
            "val_loss": [line["loss"] for line in lines if line["split"] == "val"][-1],
            "test_loss": test_loss,
            "perplexity": math.exp(min(test_loss, 700.0)),
            "bits_per_byte": self.corpus.bits_per_byte(test_loss, "test"),
            "train_loss": statistics.fmean([x["loss"] for x in lines if x["split"] == "train"][-_LAST_STEPS:]),
            "wall_s": used.spent.wall_s,
            "cpu_s": used.spent.cpu_s,
            "step_s_median": statistics.median(t["step_s"] for t in times),
            "tokens_per_s": tokens / statistics.median(whole),
            "first_step_s": times[0]["step_s"],
            "usage": used.to_json(),
        }


def _word_for(error: BaseException) -> str:
    return "interrupted" if isinstance(error, (RunInterruptedError, KeyboardInterrupt)) else "failed"
