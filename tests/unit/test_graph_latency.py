"""Single-sample latency: the rules on small graphs whose price can be worked out by hand, and the shared workloads."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hetero.errors import PlacementError
from hetero.planner.graph_latency import solve
from hetero.planner.graph_latency_greedy import greedy
from hetero.planner.workload import DeviceClass, Workload
from hetero.planner.workload_latency import latency

SHARED = Path(os.environ.get("HETEROQ_SHARED", Path(__file__).parents[3] / "shared")) / "workloads" / "open"
FILES = ("LayerGraphs_bert24", "LayerGraphs_resnet50", "OperatorGraphs_bert_l-12", "OperatorGraphs_bert_l-3")


def diamond() -> Workload:
    """a -> b, c -> d; an operator takes 1 in a call, 10 on a processor; moving costs 0.5 (a), 0.25 (others)."""
    return Workload(
        ids=("a", "b", "c", "d"),
        times=np.tile([1.0, 10.0], (4, 1)),
        transfers=np.array([[0.5, 0.0], [0.25, 0.0], [0.25, 0.0], [0.25, 0.0]]),
        nbytes=np.ones(4),
        edges=np.array([[0, 1], [0, 2], [1, 3], [2, 3]], np.int64),
        is_backward=np.zeros(4, bool),
        colours=np.arange(4),
        classes=(DeviceClass("acc", 2, 4.0), DeviceClass("cpu", 1)),
    )


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        pytest.param((2, 2, 2, 2), 30.0, id="processors run b and c side by side"),
        pytest.param((0, 0, 0, 0), 4.0, id="one call"),
        pytest.param((0, 0, 1, 1), (2 + 0.5 + 0.25) + (2 + 0.5 + 0.25), id="both calls pay for what passes between"),
        pytest.param((2, 0, 0, 2), 10 + (2 + 0.5 + 0.25 + 0.25) + 10, id="an output is moved in once"),
        pytest.param((0, 2, 2, 1), (1 + 0.5) + 10 + (1 + 0.5), id="both inputs are moved in"),
    ],
)
def test_price_of_a_diamond(devices: tuple[int, ...], expected: float) -> None:
    assert latency(diamond(), devices, contiguous=True) == pytest.approx(expected)


def test_an_accelerator_that_is_called_twice_is_refused_or_priced_piece_by_piece() -> None:
    devices = (0, 2, 2, 0)
    with pytest.raises(PlacementError, match="acc:0 are not contiguous"):
        latency(diamond(), devices, contiguous=True)
    assert latency(diamond(), devices, contiguous=False) == pytest.approx((1 + 0.5) + 10 + (1 + 0.5))


def test_calls_that_wait_for_one_another_are_refused() -> None:
    crossed = replace(diamond(), edges=np.array([[0, 1], [2, 3]], np.int64))
    with pytest.raises(PlacementError, match="wait for one another in a circle"):
        latency(crossed, (0, 1, 1, 0), contiguous=True)


def test_memory_that_nothing_fits_is_one_error() -> None:
    workload = replace(diamond(), classes=(DeviceClass("acc", 1, 3.0), DeviceClass("cpu", 0)))
    with pytest.raises(PlacementError, match="no placement fits"):
        solve(workload, contiguous=True, time_limit_s=10)


def test_several_calls_are_not_searched() -> None:
    with pytest.raises(PlacementError, match="one call to each accelerator"):
        solve(diamond(), contiguous=False, time_limit_s=10)


def test_training_graphs_have_no_single_sample_latency() -> None:
    with pytest.raises(PlacementError, match="operator 'd' belongs to the backward pass"):
        solve(replace(diamond(), is_backward=np.array([False, False, False, True])), contiguous=True, time_limit_s=10)


def test_no_time_gives_a_placement_with_a_true_bound() -> None:
    found = solve(diamond(), contiguous=True, time_limit_s=0)
    assert found.value == latency(diamond(), found.devices, contiguous=True)
    assert 0 < found.lower_bound <= 4.0


def shared(name: str) -> Workload:
    path = SHARED / f"latency__{name}_inference.json"
    if not path.exists():
        pytest.skip(f"{path} is missing: set HETEROQ_SHARED")
    return Workload.from_file(path)


@pytest.mark.parametrize("name", FILES[:3])
def test_greedy_gives_what_the_authors_program_gives(name: str) -> None:
    """The fourth file differs: its order has ties, which the authors leave to a hash table."""
    workload = shared(name)
    known = json.loads((SHARED / "EXPECTED.json").read_text())[f"latency__{name}_inference"]["authors_greedy"]
    assert greedy(workload).value == pytest.approx(known, rel=1e-9)


@pytest.mark.parametrize("name", FILES)
def test_shared_workloads_are_proven_and_no_worse_than_greedy(name: str) -> None:
    workload = shared(name)
    found = solve(workload, contiguous=True, time_limit_s=math.inf)
    assert found.value == pytest.approx(latency(workload, found.devices, contiguous=True), rel=1e-12)
    assert found.proof == "optimal"
    assert found.value <= greedy(workload).value * (1 + 1e-12)
