"""Label-setting search over contiguous placements of a chain: exact, vectorised over all labels of a layer.

A label is a partial placement of the layers before i. What can still matter of it is kept as a row of numbers:

    S | F B | f b of the current stage | f, b of each shared core group | bytes of the current stage | bytes of each
    shared pool | S plus multipliers x loads, for each completion bound

with S the sum part of the objective, F and B the largest loads so far. Two labels at the same layer with the same
devices unused and the same current device are comparable: whatever completes the one completes the other. If a
completion of b has the largest loads F_b', B_b', then the same completion of a has at most

    F_a' <= F_b' + d_f,   d_f = max(0, largest excess of a's forward loads over b's)

so a dominates b when S_a + w_f d_f + w_b d_b <= S_b and a holds no more bytes. Loads below a known floor (the least
F that any placement has) count as the floor. Labels are dropped when dominated or when their bound reaches the best
known value; a beam drops more, and the least bound of what it dropped says how much that may have cost.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hetero.planner.problem import Pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hetero.planner.bounds import Completion, States, Weights
    from hetero.planner.problem import Floats, Problem
    from hetero.planner.symmetry import Classes, Ints

_S, _F, _B, _CUR_F, _CUR_B, _SHARED = 0, 1, 2, 3, 4, 5
_HURRIED_BEAM = 256
_ROUNDING = 1e-13


@dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
        value: of the best placement found; infinite: none.
        path: device of each layer.
        lower_bound: no placement that was asked for is better.
        is_complete: whether nothing was dropped without proof.
        reached: number of layers that some label has placed.
        free: device -> bytes free there at best for the layer that no label could place.
    """

    value: float
    path: tuple[int, ...]
    lower_bound: float
    is_complete: bool
    reached: int
    free: dict[int, int] = field(default_factory=dict)


@dataclass
class _Labels:
    """Labels of one layer, in rows; `parent` and `device` lead back."""

    columns: Floats
    unavailable: Ints
    last: Ints
    on_reference: NDArray[np.bool_]
    parent: Ints

    def __len__(self) -> int:
        return len(self.last)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> _Labels:
        return _Labels(
            self.columns[rows], self.unavailable[rows], self.last[rows], self.on_reference[rows], self.parent[rows]
        )


class LabelSearch:
    """The search for one objective; `run` may be called often, with growing beams and better bounds."""

    def __init__(
        self, problem: Problem, weights: Weights, classes: Classes, states: States, bounds: Sequence[Completion]
    ) -> None:
        self.problem, self.weights, self.classes, self.states, self.bounds = problem, weights, classes, states, bounds
        self.n_layers, self.n_devices = problem.forward.shape
        self.runs = np.isfinite(problem.forward)
        self.groups = [group for group in problem.core_groups if len(group) > 1 or not problem.contiguous]
        held = np.where(self.runs, problem.nbytes, 0).sum(axis=0)
        own = [Pool(name, (d,), int(problem.limits[d])) for d, name in enumerate(problem.devices)]
        self.pools = [
            pool
            for pool in (*problem.pools, *([] if problem.contiguous else own))
            if pool.limit < min(sum(int(held[d]) for d in pool.members), int(problem.nbytes.max(axis=1).sum()))
        ]
        self.is_limited = problem.contiguous and bool((problem.limits < held).any())
        self._layout()
        self._increments()
        self.bit = np.array([1 << d for d in range(self.n_devices)], np.int64)
        self.closes = self.bit * problem.contiguous + np.array(
            [sum(1 << k for k in other) for other in problem.conflicts], np.int64
        )
        later = np.cumsum(self.runs[::-1], axis=0)[::-1] > 0
        self.useless = np.array([*(self.bit @ ~later.T), self.bit.sum()], np.int64)
        self.hops = [problem.transfer(i) for i in range(self.n_layers)]

    def _layout(self) -> None:
        n_groups, n_pools, n_bounds = len(self.groups), len(self.pools), len(self.bounds)
        stops = np.cumsum([_SHARED, n_groups, n_groups, 1, n_pools, n_bounds])
        spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(stops)]
        self.shared_f, self.shared_b, self.own_bytes, self.pool_bytes, self.bound_columns = spans
        self.width = int(stops[-1])
        self.of_stage = [_CUR_F, _CUR_B, self.own_bytes.start]
        self.forward_columns = [_F, _CUR_F, *range(self.shared_f.start, self.shared_f.stop)]
        self.backward_columns = [_B, _CUR_B, *range(self.shared_b.start, self.shared_b.stop)]
        self.byte_columns = [*range(self.own_bytes.start, self.pool_bytes.stop)]
        self.additive = [_S, *range(self.bound_columns.start, self.bound_columns.stop)]

    def _increments(self) -> None:
        """What a layer, and what the opening of a stage, adds to each column on each device."""
        p, w = self.problem, self.weights
        forward, backward = np.where(self.runs, p.forward, 0.0), np.where(self.runs, p.backward, 0.0)
        self.add = np.zeros((self.n_layers, self.n_devices, self.width))
        self.opening = np.zeros((self.n_devices, self.width))
        rows = ((self.add, forward, backward), (self.opening, p.overhead[:, 0], p.overhead[:, 1]))
        alone = np.array([not any(d in group for group in self.groups) for d in range(self.n_devices)], float)
        for target, f, b in rows:
            target[..., _S] = w.forward * f + w.backward * b
            target[..., _CUR_F], target[..., _CUR_B] = f * alone, b * alone
            for k, group in enumerate(self.groups):
                inside = np.array([d in group for d in range(self.n_devices)], float)
                target[..., self.shared_f.start + k] = f * inside
                target[..., self.shared_b.start + k] = b * inside
        for k, pool in enumerate(self.pools):
            inside = np.array([d in pool.members for d in range(self.n_devices)], float)
            self.add[..., self.pool_bytes.start + k] = p.nbytes * inside
        if self.is_limited:
            self.add[..., self.own_bytes.start] = p.nbytes
        for k, bound in enumerate(self.bounds):
            self.add[..., self.bound_columns.start + k] = np.where(self.runs, bound.price, 0.0)
            self.opening[..., self.bound_columns.start + k] = bound.opening

    def run(
        self,
        *,
        upper: float,
        beam: int,
        deadline: float,
        floors: tuple[float, float] = (0.0, 0.0),
        caps: tuple[float, float] = (np.inf, np.inf),
        reference: Sequence[int] | None = None,
    ) -> Found:
        """Search all placements better than `upper`.

        Args:
            upper: value of a known placement; infinite: none is known.
            beam: labels kept at each layer.
            deadline: `time.monotonic()` after which the beam becomes small.
            floors: least possible F and B.
            caps: largest F and B that are allowed.
            reference: a placement (device of each layer) that doesn't count: asks for the best other one.

        Returns:
            The best placement below `upper`. Its bound is `upper` where there is none and the search is complete.
        """
        labels = _Labels(
            np.zeros((1, self.width)),
            np.array([self.useless[0]]),
            np.array([-1]),
            np.array([reference is not None]),
            np.array([0]),
        )
        trail: list[tuple[Ints, Ints]] = []
        dropped = np.inf
        for i in range(self.n_layers):
            before, labels = labels, self._extend(labels, i, caps, reference)
            if not len(labels):
                return Found(np.inf, (), min(upper, dropped), dropped == np.inf, i, self._free(before, i))
            bound = self._bound(labels, i + 1, floors)
            alive = bound < upper * (1 - _ROUNDING)
            labels, bound = labels.take(alive), bound[alive]
            kept = self._undominated(labels, floors, caps)
            labels, bound = labels.take(kept), bound[kept]
            limit = beam if time.monotonic() < deadline else min(beam, _HURRIED_BEAM)
            if len(labels) > limit:
                order = np.argpartition(bound, limit)
                dropped = min(dropped, float(bound[order[limit:]].min()))
                labels = labels.take(np.sort(order[:limit]))
            trail.append((labels.parent, labels.last))
            if not len(labels):
                return Found(np.inf, (), min(upper, dropped), dropped == np.inf, self.n_layers)
        return self._best(labels, trail, upper, dropped)

    def within(self, limit: float, *, beam: int, deadline: float) -> Found:
        """Any placement whose largest forward (or backward) load is at most `limit`; the weights are that one alone."""
        floors = (limit, 0.0) if self.weights.max_forward else (0.0, limit)
        caps = (limit, np.inf) if self.weights.max_forward else (np.inf, limit)
        return self.run(upper=limit * (1 + 1e-9), beam=beam, deadline=deadline, floors=floors, caps=caps)

    def _best(self, labels: _Labels, trail: list[tuple[Ints, Ints]], upper: float, dropped: float) -> Found:
        value = self._value(labels.columns)
        value[labels.on_reference] = np.inf
        row = int(np.argmin(value))
        best = float(value[row])
        path = []
        for parent, last in reversed(trail):
            path.append(int(last[row]))
            row = int(parent[row])
        if not best < upper:
            return Found(np.inf, (), min(upper, dropped), dropped == np.inf, self.n_layers)
        return Found(best, tuple(reversed(path)), min(best, dropped), dropped >= best, self.n_layers)

    def _value(self, columns: Floats) -> Floats:
        value: Floats = (
            columns[:, _S] + self.weights.max_forward * columns[:, _F] + self.weights.max_backward * columns[:, _B]
        )
        return value

    def _extend(self, labels: _Labels, i: int, caps: tuple[float, float], reference: Sequence[int] | None) -> _Labels:
        """All labels that place layer i after one of `labels` and keep to the limits."""
        parts = [self._stay(labels, i)] if i else [labels.take(np.zeros(0, np.int64))]
        parts += [self._switch(labels, i, int(device)) for device in np.flatnonzero(self.runs[i])]
        new = _Labels(
            np.concatenate([part.columns for part in parts]),
            np.concatenate([part.unavailable for part in parts]),
            np.concatenate([part.last for part in parts]),
            np.concatenate([part.on_reference for part in parts]),
            np.concatenate([part.parent for part in parts]),
        )
        columns = new.columns
        columns[:, _F] = columns[:, self.forward_columns].max(axis=1)
        columns[:, _B] = columns[:, self.backward_columns].max(axis=1)
        fits = (columns[:, _F] <= caps[0]) & (columns[:, _B] <= caps[1])
        if self.is_limited:
            fits &= columns[:, self.own_bytes.start] <= self.problem.limits[new.last]
        for k, pool in enumerate(self.pools):
            fits &= columns[:, self.pool_bytes.start + k] <= pool.limit
        if reference is not None:
            new.on_reference &= new.last == reference[i]
        new.unavailable |= self.useless[i + 1]
        self._forget(new)
        return new.take(fits)

    def _stay(self, labels: _Labels, i: int) -> _Labels:
        rows = np.flatnonzero(self.runs[i, labels.last])
        new = labels.take(rows)
        new.columns += self.add[i, new.last]
        new.parent = rows
        return new

    def _switch(self, labels: _Labels, i: int, device: int) -> _Labels:
        is_open = ((labels.unavailable & self.bit[device]) == 0) & (labels.last != device)
        if (previous := self.classes.previous[device]) >= 0:
            is_open &= (labels.unavailable & self.bit[previous]) != 0
        hop = self.hops[i - 1][labels.last, device] if i else np.zeros(len(labels))
        rows = np.flatnonzero(is_open & np.isfinite(hop))
        new, hop = labels.take(rows), hop[rows]
        new.columns[:, self.of_stage] = 0.0
        new.columns += self.opening[device] + self.add[i, device]
        new.columns[:, self.additive] += (self.weights.transfer * hop)[:, None]
        if self.weights.links:
            new.columns[:, _F] = np.maximum(new.columns[:, _F], hop)
        new.unavailable |= self.closes[device]
        new.last = np.full(len(rows), device)
        new.parent = rows
        return new

    def _forget(self, labels: _Labels) -> None:
        """Clear loads and bytes of groups and pools that nothing can be added to any more."""
        shared: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        shared += [(group, (self.shared_f.start + k, self.shared_b.start + k)) for k, group in enumerate(self.groups)]
        shared += [(pool.members, (self.pool_bytes.start + k,)) for k, pool in enumerate(self.pools)]
        for members, columns in shared:
            bits = int(self.bit[list(members)].sum())
            is_closed = ((labels.unavailable & bits) == bits) & ~np.isin(labels.last, members)
            for column in columns:
                labels.columns[is_closed, column] = 0.0

    def _bound(self, labels: _Labels, i: int, floors: tuple[float, float]) -> Floats:
        """What any completion of each label costs at least."""
        state = self.states.index(labels.unavailable)
        last = self.classes.of[labels.last]
        largest_f = np.maximum(labels.columns[:, _F], floors[0])
        largest_b = np.maximum(labels.columns[:, _B], floors[1])
        best = np.full(len(labels), -np.inf)
        for k, bound in enumerate(self.bounds):
            value = labels.columns[:, self.bound_columns.start + k] + bound.table[i, state, last]
            value = value + (self.weights.max_forward - bound.forward.sum()) * largest_f
            value = value + (self.weights.max_backward - bound.backward.sum()) * largest_b
            best = np.maximum(best, value)
        return best

    def _undominated(self, labels: _Labels, floors: tuple[float, float], caps: tuple[float, float]) -> Ints:
        """Rows that the best few labels of their kind don't dominate."""
        columns = labels.columns
        forward, backward = columns[:, self.forward_columns], columns[:, self.backward_columns]
        forward[:, 0], backward[:, 0] = np.maximum(forward[:, 0], floors[0]), np.maximum(backward[:, 0], floors[1])
        sums, nbytes = columns[:, _S], columns[:, self.byte_columns]
        kind = (labels.unavailable * self.n_devices + labels.last) * 2 + labels.on_reference
        value = sums + self.weights.max_forward * forward[:, 0] + self.weights.max_backward * backward[:, 0]
        order = np.lexsort((forward[:, 1], value, kind))
        kind = kind[order]
        first = np.searchsorted(kind, kind)
        position = np.arange(len(order))
        alive = np.ones(len(order), bool)
        rounds = 96 if len(order) < 20_000 else 32
        for k in range(rounds):
            candidates = np.flatnonzero(alive & (first + k < position))
            if not len(candidates):
                break
            a, b = order[first[candidates] + k], order[candidates]
            excess_f = np.maximum((forward[a] - forward[b]).max(axis=1), 0.0)
            excess_b = np.maximum((backward[a] - backward[b]).max(axis=1), 0.0)
            extra = self.weights.max_forward * excess_f + self.weights.max_backward * excess_b
            is_worse = (sums[a] + extra <= sums[b]) & (nbytes[a] <= nbytes[b]).all(axis=1)
            for excess, cap in zip((excess_f, excess_b), caps, strict=True):
                if cap < np.inf:
                    is_worse &= excess == 0.0
            alive[candidates[is_worse]] = False
        return np.sort(order[alive])

    def _free(self, labels: _Labels, i: int) -> dict[int, int]:
        """Device -> bytes that the most fortunate label leaves free there for layer i."""
        free: dict[int, int] = {}
        for device in map(int, np.flatnonzero(self.runs[i])):
            is_current = labels.last == device
            possible = is_current | ((labels.unavailable & self.bit[device]) == 0)
            own = np.where(is_current, labels.columns[:, self.own_bytes.start], 0.0)
            left = float(self.problem.limits[device]) - own
            for k, pool in enumerate(self.pools):
                if device in pool.members:
                    left = np.minimum(left, pool.limit - labels.columns[:, self.pool_bytes.start + k])
            if possible.any():
                free[device] = int(left[possible].max())
        return free
