"""The small graph by which the planner's kernels are compiled."""

import pytest

from hetero.planner.compiled import example
from hetero.planner.graph import plan_workload


@pytest.mark.parametrize(("objective", "contiguous"), [("throughput", True), ("throughput", False), ("latency", True)])
def test_every_solver_proves_its_placement_of_the_example(objective, contiguous):
    found = plan_workload(example(), objective=objective, contiguous=contiguous)
    assert found.proof == "optimal"
    assert len(set(found.devices)) > 1
