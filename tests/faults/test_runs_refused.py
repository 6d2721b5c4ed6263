"""The user's mistakes: one message with its place, exit code 2, no folder left behind."""

import pytest

from experiments import cli

BASE = """\
name: refused
data:
  path: {path}
train:
  steps: 2
plan:
  devices: {devices}
"""


def outcome(capsys, tmp_path, *overrides, path="text.txt", devices="[cpu]", content=b"some words to learn " * 200):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    config = tmp_path / "x.yaml"
    config.write_text(BASE.format(path=path, devices=devices))
    out = tmp_path / "out"
    code = cli.main(["run", str(config), *overrides, "--out", str(out)])
    assert not out.exists()
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err.replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "x.yaml:3:9: data.path: can't read"),
        (b"", "x.yaml:3:9: data.path: text.txt is empty"),
        (b"abc\xff" * 100, "x.yaml:3:9: data.path: text.txt is not UTF-8"),
        (b"short text", "x.yaml:3:9: data.path: "),
    ],
)
def test_a_bad_text_is_named_with_its_place(capsys, tmp_path, content, expected):
    code, err = outcome(capsys, tmp_path, content=content)
    assert code == 2
    assert expected in err


@pytest.mark.parametrize("device", ["opencl:9", "cuda:7", "cpu:3", "tpu"])
def test_an_absent_device_is_named_with_its_place_and_what_exists(capsys, tmp_path, device):
    code, err = outcome(capsys, tmp_path, devices=f"[cpu, '{device}']")
    assert code == 2
    assert f"x.yaml:7:18: plan.devices.1: device '{device}' does not exist" in err
    assert "found: cpu" in err
    assert "heteroq devices" in err


def test_more_qubits_than_memory_is_refused_with_both_figures(capsys, tmp_path):
    overrides = ["quantum.unit=block0.mlp", "quantum.n_qubits=48"]
    code, err = outcome(capsys, tmp_path, *overrides, devices="[cpu, aer]")
    assert code == 2
    assert "override 'quantum.n_qubits=48': quantum.n_qubits: 48 qubits do not fit into memory" in err
    assert "bytes free" in err


def test_an_unknown_text_is_named(capsys, tmp_path):
    code, err = outcome(capsys, tmp_path, "data.path=null", "data.name=moby-dick")
    assert code == 2
    assert "override 'data.name=moby-dick': data.name: " in err


def test_without_an_icd_an_opencl_device_is_absent_and_nothing_falls_back(tmp_path):
    import os
    import subprocess
    import sys

    (tmp_path / "text.txt").write_text("some words to learn " * 200)
    config = tmp_path / "x.yaml"
    config.write_text(BASE.format(path="text.txt", devices="[cpu, 'opencl:0']"))
    command = [sys.executable, "-m", "experiments.cli", "run", str(config), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OCL_ICD_VENDORS": "/nonexistent", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "x.yaml:7:18: plan.devices.1: device 'opencl:0' does not exist" in done.stderr
    assert "opencl is absent" in done.stderr
    assert not (tmp_path / "out").exists()
