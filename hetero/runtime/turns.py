"""Step times of several placements of a model, measured in turn."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from hetero.errors import HeteroError
from hetero.runtime.pipeline import place_stages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

    from hetero.runtime.pipeline import Batch, Placed
    from hetero.runtime.stage import Loss
    from hetero.topology import Topology

Stages = tuple[tuple[str, int, int], ...]
"""(device, first layer, last layer) of each stage."""


class Arrangement(NamedTuple):
    """What is to be run.

    Attributes:
        stages: of the placement.
        recomputed: names of the layers that are run again in their backward pass.
    """

    stages: Stages
    recomputed: tuple[str, ...] = ()


TURN = 5
"""Steps of one placement after another. The first finds the caches as the placement before left them: not used."""


@contextlib.contextmanager
def placed_copies(
    model: nn.Module,
    arrangements: Iterable[Arrangement],
    topology: Topology,
    reasons: dict[Arrangement, str],
    *,
    loss: Loss,
    n_microbatches: int,
    schedule: str,
) -> Iterator[dict[Arrangement, Placed]]:
    """A copy of the model in each placement that is possible here: placing moves a model to its devices.

    Args:
        model: to be copied.
        arrangements: distinct ones.
        topology: of their devices.
        reasons: gets why a placement isn't possible.
        loss: of the last stage.
        n_microbatches: of a step.
        schedule: `gpipe` or `1f1b`.
    """
    with contextlib.ExitStack() as stack:
        placed: dict[Arrangement, Placed] = {}
        for wanted in arrangements:
            try:
                one = place_stages(
                    copy.deepcopy(model),
                    wanted.stages,
                    topology,
                    loss,
                    n_microbatches,
                    schedule=schedule,
                    recomputed=wanted.recomputed,
                )
            except HeteroError as error:
                reasons[wanted] = error.message
            else:
                placed[wanted] = stack.enter_context(one)
        yield placed


def measure_in_turn(
    placed: dict[Arrangement, Placed], batches: Sequence[Batch], steps: int, into: dict[Arrangement, list[float]]
) -> None:
    """Time steps of placements, a few of each in turn, so that a slow moment of the machine hits all alike.

    Args:
        placed: what to run.
        batches: taken one after the other, and again; each placement gets the same ones.
        steps: to be timed of each.
        into: gets the times of each placement [s], as they are measured: what is there stays when Ctrl-C comes.
    """
    for turn in range(1 + math.ceil(steps / (TURN - 1))):  # the first turn is to warm up
        for arrangement, one in placed.items():
            own = into.setdefault(arrangement, [])
            for k in range(TURN):
                for parameter in one.parameters():
                    parameter.grad = None
                start = time.perf_counter()
                one.step(batches[(turn * TURN + k) % len(batches)])
                if turn > 0 and k > 0 and len(own) < steps:
                    own.append(time.perf_counter() - start)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high
