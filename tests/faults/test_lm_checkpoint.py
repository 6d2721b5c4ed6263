"""Checkpoints that are damaged, hostile, foreign, or can't be written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lm
from lm import checkpoint

CONFIG = {"model": {"d_model": 8, "n_layer": 1}, "train": {"learning_rate": 0.01}}


def _model(seed: int = 0, **settings: object) -> lm.Transformer:
    sizes = {"n_layer": 1, "d_model": 8, "n_head": 2, "vocab_size": 5, "seq_len": 4}
    return lm.Transformer(lm.ModelConfig(**{**sizes, **settings}), generator=torch.Generator().manual_seed(seed))


def _trained(seed: int, steps: int = 2, **settings: object) -> tuple[lm.Transformer, torch.optim.Optimizer]:
    model = _model(seed, **settings)
    optimizer = lm.start_training(model, lm.TrainConfig(steps=9, batch_size=2, learning_rate=0.01)).optimizer
    for step in range(steps):
        optimizer.zero_grad()
        tokens = torch.full((2, 4), step)
        lm.loss(model(tokens), tokens).backward()
        optimizer.step()
    return model, optimizer


def _tensors(model: lm.Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()}
    return {**model.state_dict(), **moments}


def _same(a: tuple[lm.Transformer, torch.optim.Optimizer], b: tuple[lm.Transformer, torch.optim.Optimizer]) -> bool:
    x, y = _tensors(*a), _tensors(*b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1 (seed 1) and 2 (seed 2)."""
    for step in (1, 2):
        checkpoint.save(tmp_path, *_trained(step), step, {"offset": step * 10}, config=CONFIG)
    return tmp_path


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = _trained(3)
    extra = {"offset": 17, "seeds": [1, 2], "best": 0.1 + 0.2, "text": "é"}
    checkpoint.save(tmp_path, *saved, 5, extra)
    loaded = _trained(4, steps=0)
    assert not _same(saved, loaded)
    assert checkpoint.load(tmp_path, *loaded) == checkpoint.Loaded(5, extra)
    assert _same(saved, loaded)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_family_comes_back_to_the_bit(tmp_path: Path, family: str) -> None:
    saved = _trained(3, family=family)
    checkpoint.save(tmp_path, *saved, 5, {})
    loaded = _trained(4, steps=0, family=family)
    checkpoint.load(tmp_path, *loaded)
    assert _same(saved, loaded)


def test_a_checkpoint_from_before_a_setting_existed_is_one_of_its_null(two: Path) -> None:
    newer = {**CONFIG, "model": {**CONFIG["model"], "n_kv_head": None}}
    assert checkpoint.load(two, _model(9), config=newer) == checkpoint.Loaded(2, {"offset": 20})
    newer["model"]["n_kv_head"] = 2
    with pytest.raises(lm.CheckpointError, match=r"model\.n_kv_head"):
        checkpoint.load(two, _model(9), config=newer)


def test_weights_alone_can_be_loaded(two: Path) -> None:
    model = _model(9)
    assert checkpoint.load(two, model) == checkpoint.Loaded(2, {"offset": 20})
    assert torch.equal(model.head.linear.weight, _trained(2)[0].head.linear.weight)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, *_trained(1, tie_embeddings=True), 1, {})
    model, optimizer = _trained(2, tie_embeddings=True)
    checkpoint.load(tmp_path, model, optimizer)
    assert model.head.linear.weight is model.embedding.token.weight
    assert _same((model, optimizer), _trained(1, tie_embeddings=True))


def test_an_empty_or_missing_folder_holds_nothing(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, _model()) is None
    assert checkpoint.load(tmp_path / "nowhere", _model()) is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, *_trained(step), step, {})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"step-0000000{s}.{kind}" for s in (3, 4) for kind in ("json", "safetensors")]


def _newest(folder: Path, kind: str) -> Path:
    return max(folder.glob(f"step-*.{kind}"))


def _assert_falls_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = _trained(9)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load(folder, *loaded, config=CONFIG) == checkpoint.Loaded(1, {"offset": 10})
    assert _same(loaded, _trained(1))
    assert "step-00000002" in caplog.text


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_truncated_or_empty_file_gives_way_to_the_one_before(
    two: Path, kind: str, size: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = _newest(two, kind)
    n = path.stat().st_size
    os.truncate(path, int(n * size) if 0 < size < 1 else n - 1 if size < 0 else int(size))
    _assert_falls_back(two, caplog)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_bit_flipped_anywhere_is_noticed(two: Path, kind: str) -> None:
    path, model = _newest(two, kind), _model(9)
    good = path.read_bytes()
    rng = random.Random(0)
    places = range(len(good)) if kind == "json" else [*range(16), *rng.sample(range(len(good)), 200), len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            changed = json.loads(bad) != json.loads(good)  # else: only space between values is another
        except ValueError:
            changed = True
        if changed:
            assert checkpoint.load(two, model) == checkpoint.Loaded(1, {"offset": 10}), f"byte {place}"


def test_a_missing_tensor_file_gives_way_to_the_one_before(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    _newest(two, "safetensors").unlink()
    _assert_falls_back(two, caplog)


def test_when_all_are_damaged_the_error_names_each(two: Path) -> None:
    for path in two.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(lm.CheckpointError, match=r"step-00000002[\s\S]*step-00000001"):
        checkpoint.load(two, _model())


def test_a_pickle_is_refused_and_never_run(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(two / "owned"),)

    payload = pickle.dumps({"model": Hostile()})
    assert pickle.loads(payload) is not None  # the payload works ...
    (two / "owned").rmdir()
    path = _newest(two, "safetensors")
    path.write_bytes(payload)
    _assert_falls_back(two, caplog)
    # ... even where its author has fixed the checksums
    content = json.loads(_newest(two, "json").read_bytes())
    content["body"]["tensors_sha256"] = hashlib.sha256(payload).hexdigest()
    content["body_sha256"] = hashlib.sha256(json.dumps(content["body"], sort_keys=True).encode()).hexdigest()
    _newest(two, "json").write_text(json.dumps(content), "utf-8")
    _assert_falls_back(two, caplog)
    assert not (two / "owned").exists()


def test_another_configuration_is_refused_with_the_differing_keys(two: Path) -> None:
    other = {"model": {"d_model": 16, "n_layer": 1}, "train": {"learning_rate": 0.01, "warmup_steps": 3}}
    model = _model(7)
    before = model.head.linear.weight.clone()
    with pytest.raises(lm.CheckpointError, match=r"model\.d_model, train\.warmup_steps\n.*model\.d_model=8"):
        checkpoint.load(two, model, config=other)
    assert torch.equal(model.head.linear.weight, before)


@pytest.mark.parametrize("settings", [{"d_model": 16}, {"n_layer": 2}, {"vocab_size": 6}])
def test_another_model_is_refused_and_left_alone(two: Path, settings: dict[str, object]) -> None:
    model = _model(7, **settings)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lm.CheckpointError, match="belongs to another model"):
        checkpoint.load(two, model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("body", [[], {}, "text", None, {"format": 1, "step": 2}])
def test_a_json_file_with_the_wrong_content_gives_way_to_the_one_before(
    two: Path, body: object, caplog: pytest.LogCaptureFixture
) -> None:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    _newest(two, "json").write_text(json.dumps({"body": body, "body_sha256": digest}), "utf-8")
    _assert_falls_back(two, caplog)


def test_another_version_is_refused(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    with pytest.raises(lm.CheckpointError, match=r"another version[\s\S]*format 1"):
        checkpoint.load(two, _model())


FULL_DISK = """
import resource, sys
sys.path[:0] = {path!r}
from tests_lm_checkpoint import _trained, checkpoint, lm
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    checkpoint.save({folder!r}, *_trained(3), 3, {{}})
except lm.CheckpointError as error:
    sys.stdout.write(str(error))
"""


def test_a_full_disk_names_path_and_bytes_and_keeps_the_old_one(
    two: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("script")
    (home / "tests_lm_checkpoint.py").write_text(Path(__file__).read_text("utf-8"), "utf-8")
    before = {p.name: p.read_bytes() for p in two.iterdir()}
    script = FULL_DISK.format(path=[str(home)], folder=str(two))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert f"can't write the checkpoint {two / 'step-00000003.json'}" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert "bytes" in done.stdout
    assert {p.name: p.read_bytes() for p in two.iterdir()} == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_in_any_system_call_keeps_the_old_one(two: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in two.iterdir()}

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(lm.CheckpointError, match=r"No space left[\s\S]*free space and resume"):
        checkpoint.save(two, *_trained(3), 3, {})
    assert {p.name: p.read_bytes() for p in two.iterdir()} == before


class _Killed(BaseException):
    pass


def _save_killed_after_the_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, []

    def replace(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise _Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(_Killed):
        checkpoint.save(folder, *_trained(3), 3, {})
    monkeypatch.undo()
    assert (folder / "step-00000003.safetensors").exists()


def test_a_kill_between_the_two_files_leaves_the_old_checkpoint(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save_killed_after_the_tensors(two, monkeypatch)
    loaded = _trained(9)
    assert checkpoint.load(two, *loaded) == checkpoint.Loaded(2, {"offset": 20})
    assert _same(loaded, _trained(2))


def test_a_kill_within_the_first_checkpoint_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save_killed_after_the_tensors(tmp_path, monkeypatch)
    assert checkpoint.load(tmp_path, _model()) is None
