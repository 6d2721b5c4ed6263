"""Training killed with SIGKILL at random moments and resumed writes the same loss log, byte for byte."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lm
from lm import checkpoint

STEPS = 60


def _run(folder: Path) -> None:
    """One process's life: resume from the folder or begin, train, log each step, save every third."""
    corpus = lm.load_corpus(cache_dir=folder.parent / "cache")
    config = lm.ModelConfig(2, 32, 2, corpus.tokenizer.vocab_size, 16, dropout=0.1)
    model = lm.Transformer(config, generator=torch.Generator().manual_seed(0))
    training = lm.TrainConfig(steps=STEPS, batch_size=8, learning_rate=3e-3, warmup_steps=5, eval_every=1000)
    state = lm.start_training(model, training)
    log = folder / "loss.jsonl"
    loaded = checkpoint.load(folder / "checkpoints", model, state.optimizer)
    state.step = loaded.step if loaded else 0
    with open(log, "ab", buffering=0) as file:
        file.truncate(loaded.extra["log_bytes"] if loaded else 0)

        def on_event(event: lm.Step) -> None:
            line = {"step": event.step, "loss": event.loss.hex(), "norm": event.grad_norm.hex(), "lr": event.lr}
            file.write(json.dumps(line).encode() + b"\n")
            if event.step % 3 == 0:
                extra = {"log_bytes": os.fstat(file.fileno()).st_size}
                checkpoint.save(folder / "checkpoints", model, state.optimizer, event.step, extra)

        lm.train(model, corpus, training, seed=1, on_event=on_event, start=state, evaluate_fn=lambda split: 0.0)
    weights = b"".join(t.numpy().tobytes() for t in model.state_dict().values())
    (folder / "weights").write_bytes(weights)


def _child(folder: Path) -> int:
    """Fork: torch is imported but has computed nothing yet, so the child is as good as a new process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            _run(folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def _lines(folder: Path) -> int:
    try:
        return (folder / "loss.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _killed_until_done(folder: Path, rng: random.Random) -> int:
    """Number of kills before a child reached the end by itself."""
    kills = 0
    while True:
        pid, seen, wanted = _child(folder), _lines(folder), rng.randint(2, 15)
        new = 0
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            now = _lines(folder)
            new, seen = new + max(0, now - seen), now
            if new >= wanted:
                time.sleep(rng.random() * 0.01)
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills
        kills += 1


def main(base: Path, n_runs: int) -> None:
    importlib.import_module("torch._dynamo")  # every optimizer needs it: once here instead of in each child
    reference = base / "reference"
    reference.mkdir()
    os.waitpid(_child(reference), 0)
    rng, kills = random.Random(0), 0
    for run in range(n_runs):
        folder = base / f"run-{run}"
        folder.mkdir()
        kills += _killed_until_done(folder, rng)
        for name in ("loss.jsonl", "weights"):
            assert (folder / name).read_bytes() == (reference / name).read_bytes(), f"{folder / name} differs"
        shutil.rmtree(folder)
    lines = _lines(reference)
    sys.stdout.write(f"{kills} kills, {lines} lines")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork (Linux, macOS)")
@pytest.mark.parametrize("n_runs", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_loss_log_and_weights_are_byte_identical_after_kills(tmp_path: Path, n_runs: int) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(n_runs)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    kills, _, lines, _ = done.stdout.split()
    assert int(lines) == STEPS
    assert int(kills) >= 2 * n_runs


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
