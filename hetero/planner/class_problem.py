"""A chain problem with one column for each class of interchangeable devices, and how many there are of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero.planner.problem import Floats, Problem
    from hetero.planner.symmetry import Classes, Ints


@dataclass(frozen=True)
class ClassChain:
    """A chain problem over device classes.

    Attributes:
        counts: (C,) devices of each class, no more than there are layers.
        forward: (L, C) time of a layer on a device of the class [s]; infinite: it can't run there.
        backward: (L, C) likewise.
        overhead: (C, 2) fixed time of a stage's forward and backward call [s].
        nbytes: (L, C) memory that a layer fills [B].
        limits: (C,) memory of one device [B].
        latency: (C, C) of a hand-over between devices of two classes, on the diagonal between two of one class [s].
        inverse_bandwidth: (C, C) likewise [s/B].
        output_bytes: (L,) what a layer hands on [B].
        joined: (L,) whether a layer has to be on the device of the layer before it.
    """

    counts: Ints
    forward: Floats
    backward: Floats
    overhead: Floats
    nbytes: Ints
    limits: Ints
    latency: Floats
    inverse_bandwidth: Floats
    output_bytes: Floats
    joined: NDArray[np.bool_]

    def hops(self) -> Floats:
        """(C, C, L + 1) seconds of a hand-over between two classes at each cut; infinite: not possible there."""
        sent = np.concatenate([[0.0], self.output_bytes])
        possible = np.isfinite(self.latency)[:, :, None]
        seconds = np.where(possible, self.latency[:, :, None], 0.0) + sent * self.inverse_bandwidth[:, :, None]
        result: Floats = np.where(possible & ~np.append(self.joined, False), seconds, np.inf)
        return result

    def stops(self) -> Ints:
        """(C, L + 1) last cut that memory and missing times let a stage from each cut reach."""
        n_layers, n_classes = self.forward.shape
        stop = np.empty((n_classes, n_layers + 1), np.int64)
        for c in range(n_classes):
            runs = np.isfinite(self.forward[:, c])
            filled = np.concatenate([[0], np.cumsum(np.where(runs, self.nbytes[:, c], 0))])
            fits = np.searchsorted(filled, filled + min(int(self.limits[c]), int(filled[-1])), side="right") - 1
            gaps = np.append(np.flatnonzero(~runs), n_layers)
            stop[c] = np.minimum(fits, gaps[np.searchsorted(gaps, np.arange(n_layers + 1))])
        return stop


def reduced(problem: Problem, groups: Classes) -> ClassChain:
    """The problem with one column for each class."""
    reps = groups.representatives
    latency, inverse = (table[np.ix_(reps, reps)].copy() for table in (problem.latency, problem.inverse_bandwidth))
    limits = problem.limits.copy()
    for pool in problem.pools:
        limits[list(pool.members)] = np.minimum(limits[list(pool.members)], pool.limit)
    for k, group in enumerate(groups.members):
        if len(group) > 1:
            latency[k, k], inverse[k, k] = (t[group[0], group[1]] for t in (problem.latency, problem.inverse_bandwidth))
    counts = [min(len(group), len(problem.layers)) for group in groups.members]
    tables = (t[:, reps] for t in (problem.forward, problem.backward))
    forward, backward = (np.ascontiguousarray(table) for table in tables)
    return ClassChain(
        counts=np.array(counts, np.int64),
        forward=forward,
        backward=backward,
        overhead=problem.overhead[reps],
        nbytes=problem.nbytes[:, reps],
        limits=limits[reps],
        latency=latency,
        inverse_bandwidth=inverse,
        output_bytes=problem.output_bytes,
        joined=problem.joined,
    )
