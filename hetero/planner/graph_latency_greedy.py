"""A baseline for latency: fill one accelerator after another in a topological order, as the authors' program does.

Source: github.com/msr-fiddle/dnn-partitioning, latency-greedy/greedy.cpp. Colours that depend on one another in a
circle are one block there. Its order is depth first and leaves ties to a hash table; here they go to the file's order.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from hetero.planner.graph_latency_units import colour_components, longest_path, neighbours, topological
from hetero.planner.workload_latency import check_inference, latency
from hetero.planner.workload_plan import HEURISTIC, Placement

if TYPE_CHECKING:
    from hetero.planner.workload import Workload


def greedy(workload: Workload) -> Placement:
    """Blocks in order: onto the open accelerator while they fit, then onto the next; processors take the rest.

    Raises:
        PlacementError: an operator ends up where it can't run: the rule doesn't look at that.
    """
    begin = time.monotonic()
    check_inference(workload)
    _, component = colour_components(workload)
    number = {c: k for k, c in enumerate(dict.fromkeys(component))}
    block = [number[c] for c in component]
    reads, _ = neighbours(workload)
    preds: list[set[int]] = [set() for _ in number]
    nbytes = [0.0] * len(number)
    for node, k in enumerate(block):
        preds[k] |= {block[u] for u in reads[node]} - {k}
        nbytes[k] += float(workload.nbytes[node])
    kind = workload.classes[0]
    home, device, used = [kind.count] * len(number), -1, math.inf
    for k in topological(preds):
        fits_one, has_more = nbytes[k] <= kind.memory_bytes, device + 1 < kind.count
        if used + nbytes[k] > kind.memory_bytes and fits_one and has_more:
            device, used = device + 1, 0.0
        if used + nbytes[k] <= kind.memory_bytes:
            home[k], used = device, used + nbytes[k]
        else:
            used = math.inf  # what follows goes to a new accelerator, if any
    devices = tuple(home[k] for k in block)
    value = latency(workload, devices, contiguous=True)
    return Placement(devices, value, longest_path(workload), HEURISTIC, "greedy by bytes", time.monotonic() - begin)
