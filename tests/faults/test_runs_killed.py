"""Kills, signals, second runners and full disks, from outside: subprocesses and files only."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli

TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}, says the table. " for i in range(400))
CONFIG = """\
name: killed
seeds: [3]
arms: [{arms}]
data: {{path: text.txt}}
model: {{n_layer: 1, d_model: 16, n_head: 2, seq_len: 16, dropout: 0.1}}
quantum: {{unit: block0.mlp, n_qubits: 2{shots}}}
train: {{steps: {steps}, batch_size: 4, eval_every: 10, checkpoint_every: 7}}
plan: {{devices: [cpu, aer], n_microbatches: 2, alternative_steps: 0}}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def write_config(folder: Path, *, arms: str = "baseline", shots: str = "", steps: int = 60) -> Path:
    (folder / "text.txt").write_text(TEXT)
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(arms=arms, shots=shots, steps=steps))
    return path


def start(cache, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.cli", *map(str, words)]
    environment = os.environ | {"HETEROQ_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=240)
    return process.returncode, err


def metrics(out: Path, arm: str) -> Path:
    return out / "arms" / arm / "seed-3" / "metrics.jsonl"


def wait_for_lines(path: Path, number: int, process: subprocess.Popen) -> None:
    """Until the file has so many lines or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.002)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def killed_and_resumed(cache, config: Path, out: Path, arm: str, kills: int, rng: random.Random) -> int:
    """Run, kill at random lines, resume, until the run ends; the number of kills that hit."""
    words = ["run", config, "--out", out]
    hits = 0
    for _ in range(kills):
        process = start(cache, *words)
        lines = metrics(out, arm).read_bytes().count(b"\n") if metrics(out, arm).exists() else 0
        wait_for_lines(metrics(out, arm), lines // 2 + rng.randint(1, 15), process)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hits += process.returncode == -signal.SIGKILL
        words = ["run", "--resume", out]
    code, err = finish(start(cache, *words))
    assert code == 0, err
    return hits


@pytest.mark.parametrize(("arm", "shots", "kills"), [("baseline", "", 2), ("hybrid", ", shots: 20", 1)])
def test_a_killed_run_resumes_to_the_same_metrics(tmp_path, cache, arm, shots, kills):
    config = write_config(tmp_path, arms=arm, shots=shots, steps=30)
    code, err = finish(start(cache, "run", config, "--out", tmp_path / "whole"))
    assert code == 0, err
    assert killed_and_resumed(cache, config, tmp_path / "killed", arm, kills, random.Random(1)) == kills
    assert digest(metrics(tmp_path / "killed", arm)) == digest(metrics(tmp_path / "whole", arm))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["baseline", "hybrid"])
def test_twenty_kills_change_nothing(tmp_path, cache, arm):
    config = write_config(tmp_path, arms=arm, steps=300)
    assert finish(start(cache, "run", config, "--out", tmp_path / "whole"))[0] == 0
    assert killed_and_resumed(cache, config, tmp_path / "killed", arm, 20, random.Random(2)) > 10
    assert digest(metrics(tmp_path / "killed", arm)) == digest(metrics(tmp_path / "whole", arm))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, cache):
    """Folder of a run that SIGINT ended, with its exit code and messages."""
    folder = tmp_path_factory.mktemp("interrupted")
    config, out = write_config(folder, steps=5000), folder / "out"
    process = start(cache, "run", config, "--out", out)
    wait_for_lines(metrics(out, "baseline"), 30, process)
    process.send_signal(signal.SIGINT)
    return out, *finish(process)


@pytest.fixture
def copied(interrupted, tmp_path):
    return Path(shutil.copytree(interrupted[0], tmp_path / "out"))


def test_ctrl_c_ends_in_a_checkpoint_and_says_how_to_go_on(interrupted):
    out, code, err = interrupted
    assert code == 130, err
    assert f"heteroq run --resume {out}" in err
    assert "Traceback" not in err
    last = len([line for line in metrics(out, "baseline").read_text().splitlines() if '"train"' in line])
    assert (out / "arms/baseline/seed-3/checkpoints" / f"step-{last:08d}.json").exists()
    assert '"interrupted"' in (out / "arms/baseline/seed-3/status.json").read_text()


def test_a_second_runner_is_refused_by_the_pid_of_the_first(tmp_path, cache):
    config, out = write_config(tmp_path, steps=5000), tmp_path / "out"
    first = start(cache, "run", config, "--out", out)
    try:
        wait_for_lines(metrics(out, "baseline"), 3, first)
        code, err = finish(start(cache, "run", config, "--out", out))
        assert code == 2
        assert f"in use by process {first.pid}" in err
    finally:
        first.kill()
        first.communicate()


def test_a_full_disk_fails_the_run_with_the_path(tmp_path, cache, monkeypatch):
    config, out = write_config(tmp_path), tmp_path / "out"
    # No file may grow beyond 8 blocks of 1024 bytes: the first checkpoint doesn't fit.
    environment = os.environ | {"HETEROQ_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("HETEROQ_CACHE", str(cache))
    assert cli.main(["plan", str(config), "--json"]) == 0  # the caches are full before the limit
    command = f"ulimit -f 8; exec {sys.executable} -m experiments.cli run {config} --out {out}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert str(out) in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_fails_the_run(tmp_path, cache):
    config, out = write_config(tmp_path), tmp_path / "out"
    code, err = finish(start(cache, "run", config, "train.learning_rate=1e12", "train.warmup_steps=0", "--out", out))
    assert code == 1, err
    assert "baseline, seed 3: step" in err
    assert "Traceback" not in err
    assert '"failed"' in (out / "arms/baseline/seed-3/status.json").read_text()


def test_a_damaged_checkpoint_is_reported_and_sigterm_ends_143(copied, cache):
    newest = max((copied / "arms/baseline/seed-3/checkpoints").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    process = start(cache, "run", "--resume", copied)
    wait_for_lines(metrics(copied, "baseline"), metrics(copied, "baseline").read_bytes().count(b"\n") + 20, process)
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 143, err
    assert newest.stem in err


def test_a_checkpoint_of_another_configuration_is_refused(copied, cache):
    resolved = copied / "config.yaml"
    assert "dropout: 0.1" in resolved.read_text()
    resolved.write_text(resolved.read_text().replace("dropout: 0.1", "dropout: 0.2"))
    code, err = finish(start(cache, "run", "--resume", copied))
    assert code == 1
    assert "dropout" in err
