"""Other OpenCL runtimes than PoCL's wheel, two of them in one process, and starting a second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetero import discover, plan, profile
from hetero.errors import PlacementError
from hetero.opencl import compile_module, fallbacks, memory_plans
from hetero.opencl.errors import NoOpenCLError
from hetero.opencl.program import DeviceDescription, list_devices, open_device
from hetero.planner.arrays import layer_bytes
from hetero.runtime.stage import Chain
from tests.numerics.test_compile_units import FACTOR, FLOOR, distance, gradients

ROOT = Path(__file__).parents[2]


def _devices() -> list[DeviceDescription]:
    try:
        return list_devices()
    except NoOpenCLError:
        return []


DEVICES = _devices()
needs_two = pytest.mark.skipif(
    len({d.platform for d in DEVICES}) < 2,
    reason="needs two OpenCL platforms: pip install 'heteroq[intel-opencl]' (x86-64)",
)
needs_one = pytest.mark.skipif(not DEVICES, reason="needs OpenCL: pip install 'pyopencl[pocl]'")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(20), nn.Linear(20, 60)
        self.mlp = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 20))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 4, 5).transpose(1, 2) for t in self.attention(self.norm(x)).split(20, -1))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + heads.transpose(1, 2).reshape(x.shape)
        result: Tensor = x + self.mlp(x)
        return result


def _check(device: str) -> None:
    torch.manual_seed(0)
    module, double, x = Block(), Block().double(), torch.randn(2, 17, 20, requires_grad=True)
    double.load_state_dict(module.state_dict())
    seed, compiled, before = torch.randn(2, 17, 20), compile_module(module, device), open_device(device).counts.total()
    ours = gradients(module, compiled, [x], seed)
    exact = gradients(double, double, [x.detach().double().requires_grad_()], seed)
    eager = gradients(module, module, [x], seed)
    for a, b in zip(distance(ours, exact), distance(eager, exact), strict=True):
        assert a <= FACTOR * b + FLOOR
    assert open_device(device).counts.total() > before
    assert fallbacks(compiled) == []


@pytest.mark.parametrize("name", [d.name for d in DEVICES if d.name != "opencl:0"])
def test_every_other_device_computes_a_block_as_float64(name: str) -> None:
    _check(name)


@needs_two
def test_two_platforms_in_one_process() -> None:
    first, second = (next(d for d in DEVICES if d.platform == k) for k in (0, 1))
    for device in (first, second, first):
        _check(f"opencl:{device.platform}:{device.index}")


@needs_one
def test_the_planner_is_told_the_memory_that_was_planned_before_the_first_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    module = Block()
    batch = SimpleNamespace(inputs=torch.randn(4, 17, 20), targets=torch.zeros(4), context={})
    for _ in range(2):  # measured, then from the cache
        costs = profile([("block", module)], batch, discover(["opencl:0"]), n_microbatches=2)
        time = costs.layers[0].times["opencl:0"]
        plans = memory_plans(compile_module(Chain([module]), "opencl:0"))
        assert time.call_bytes == max(plan.slab_bytes + plan.output_bytes for plan in plans) > 2 * 17 * 20 * 4
        assert time.scratch_bytes == max(plan.arena_bytes + plan.constant_bytes for plan in plans) > 0
    with pytest.raises(PlacementError, match=f"{layer_bytes(costs.layers[0], costs, 'opencl:0')} B"):
        plan(costs, discover(["opencl:0"]), max_memory={"opencl:0": 1000})


# --- starting again ---------------------------------------------------------------------------------------------------

_START = """
import json, sys, torch
from hetero.opencl import compile_module
from hetero.opencl.program import open_device
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.LayerNorm(7), torch.nn.Linear(7, 5), torch.nn.Tanh())
    def forward(self, x, context=None):
        return self.net(x)
torch.manual_seed(0)
y = compile_module(Net(), "opencl:0")(torch.randn(3, 7))
y.sum().backward()
print(json.dumps([open_device("opencl:0").programs_built, y.tolist()]))
"""


def _environment(cache: Path) -> dict[str, str]:
    """PoCL keeps the kernels that it has compiled in a cache of its own."""
    (cache / "pocl").mkdir(parents=True, exist_ok=True)
    return os.environ | {"HETEROQ_CACHE": str(cache), "POCL_CACHE_DIR": str(cache / "pocl"), "OMP_NUM_THREADS": "1"}


def _start(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _START], env=_environment(cache), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def _result(process: subprocess.Popen[str]) -> Any:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(output)


@needs_one
def test_a_second_start_compiles_nothing_even_if_two_began_at_the_same_time(tmp_path: Path) -> None:
    first = [_start(tmp_path) for _ in range(2)]
    results = [_result(process) for process in first]
    compiled = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.so")}
    assert compiled
    _, y = _result(_start(tmp_path))
    assert y == results[0][1] == results[1][1]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.so")} == compiled


@needs_one
def test_a_cache_that_can_not_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    environment = _environment(tmp_path) | {"HETEROQ_CACHE": str(tmp_path / "file" / "cache")}
    code = (
        "from hetero.opencl import build; build._CACHING_PLATFORMS = frozenset();"
        "from hetero.opencl.program import open_device; d = open_device('opencl:0');"
        "d.program('KERNEL k(TENSOR_OUT(x)) { BASE(x)[0] = 1.0f; }', {}, is_generated=True); print(d.programs_built)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'source': 1" in done.stdout
    assert "no cache of OpenCL programs" in done.stderr
