"""Exact placement of a chain over device classes with counts, for more devices than `chain` can tell apart.

Where devices differ by their class alone, a plan is a sequence of (class, run of layers). `class_boxes` finds the best
one under any objective; here it gets the names of its devices, or the reason why there is none.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hetero.errors import PlacementError
from hetero.planner.chain import weights
from hetero.planner.checks import refuse_memory
from hetero.planner.class_boxes import best
from hetero.planner.class_problem import reduced
from hetero.planner.class_sums import Sums
from hetero.planner.refusals import check_hopeless
from hetero.planner.solution import NotFoundInTimeError, Solution
from hetero.planner.symmetry import Classes, classes
from hetero.schedule import GPIPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.planner.bounds import Weights
    from hetero.planner.class_problem import ClassChain
    from hetero.planner.class_sums import Path
    from hetero.planner.problem import Problem

_MOST_STATES = 4_000_000


def applies(problem: Problem) -> bool:
    """Whether a plan's cost depends on the classes of its devices alone, and their counts make few enough states."""
    is_timed = problem.objective in ("latency", "throughput", "train_step") and problem.schedule == GPIPE
    if not (is_timed and problem.contiguous) or problem.can_recompute or problem.media:
        return False
    if len(problem.crews) > 1 or any(problem.conflicts):
        return False
    if any(len(group) > 1 for group in problem.core_groups):
        return False
    total = sum(problem.nbytes.max(axis=1).tolist())
    if any(len(pool.members) > 1 and pool.limit < total for pool in problem.pools):
        return False
    n_layers = len(problem.layers)
    sizes = [min(len(group), n_layers) for group in classes(problem).members]
    return int(np.prod([float(size + 1) for size in sizes])) * len(sizes) <= _MOST_STATES


def solve(problem: Problem, *, time_limit_s: float = 60.0, reference: Sequence[int] | None = None) -> Solution:
    """The best placement; as `chain.solve`, for a problem to which this solver `applies`.

    Raises:
        PlacementError: there is none; the message says whether memory forbids it or the order of the layers.
    """
    start = time.monotonic()
    check_hopeless(problem)
    groups = classes(problem)
    chain = reduced(problem, groups)
    objective = weights(problem.objective, problem.n_microbatches)
    known = _class_path(reference, groups) if reference is not None else ()
    found = best(chain, objective, deadline=start + time_limit_s, reference=known)
    if not found.path:
        _refuse(problem, groups, chain, objective, is_complete=found.is_complete, is_only=reference is not None)
    return Solution(
        stages=_named(problem, groups, found.path),
        value=found.value,
        lower_bound=found.lower_bound,
        is_optimal=found.is_complete,
        seconds=time.monotonic() - start,
    )


def _class_path(path: Sequence[int], groups: Classes) -> Path:
    """A placement (device of each layer) as class and end of each stage."""
    cuts = [*(i for i in range(1, len(path)) if path[i] != path[i - 1]), len(path)]
    return tuple((int(groups.of[path[j - 1]]), j) for j in cuts)


def _named(problem: Problem, groups: Classes, path: Path) -> tuple[tuple[str, int, int], ...]:
    """(device, first, last) of each stage; the devices of a class in their order."""
    unused = [iter(group) for group in groups.members]
    cuts = [0, *(end for _, end in path)]
    devices = [problem.devices[next(unused[c])] for c, _ in path]
    return tuple((device, a, b - 1) for device, (a, b) in zip(devices, itertools.pairwise(cuts), strict=True))


def _refuse(
    problem: Problem, groups: Classes, chain: ClassChain, objective: Weights, *, is_complete: bool, is_only: bool
) -> NoReturn:
    """Say why there is no placement, or none was found."""
    if not is_complete:
        raise NotFoundInTimeError("no placement was found in the time given", remedy="a larger time_limit_s")
    if is_only:
        raise PlacementError("there is no other placement")
    boundless = dataclasses.replace(chain, limits=np.full_like(chain.limits, np.iinfo(np.int64).max))
    names = [f"{len(group)} x {problem.devices[group[0]]}" for group in groups.members]
    if not Sums(boundless, objective).any((np.inf, np.inf)).path:
        layer = Sums(boundless, objective).reached()
        able = [name for name, times in zip(names, chain.forward[layer], strict=True) if np.isfinite(times)]
        raise PlacementError(
            f"no placement reaches layer {problem.layers[layer]!r}: a device holds one run of consecutive layers",
            found=f"it can run on {', '.join(able)} only, which earlier layers had to take or no link leads to",
            remedy="remove a pin, add a link, or add a device",
        )
    layer = Sums(chain, objective).reached()
    needed = int(chain.nbytes[layer][np.isfinite(chain.forward[layer])].min())
    free = {name: int(limit) for name, limit in zip(names, chain.limits, strict=True)}
    refuse_memory(problem.layers[layer], needed, free, after=f" that the {layer} layers before it leave unused")
