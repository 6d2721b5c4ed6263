"""Label-setting search over contiguous placements of a chain: exact, vectorised over all labels of a layer.

A label is a partial placement of the layers before i. What can still matter of it is kept as a row of numbers:

    S | F B | loads of the current stage | f, b of each shared core group | transfers of each shared medium | bytes of
    the current stage | bytes of each shared pool | room to recompute in | S plus multipliers x loads, for each bound

with S the sum part of the objective, F and B the largest loads so far. Two labels at the same layer with the same
devices unused and the same current device are comparable: whatever completes the one completes the other. If a
completion of b has the largest loads F_b', B_b', then the same completion of a has at most

    F_a' <= F_b' + d_f,   d_f = max(0, largest excess of a's forward loads over b's)

so a dominates b when S_a + w_f d_f + w_b d_b <= S_b and a holds no more bytes. Loads below a known floor (the least
F that any placement has) count as the floor. Labels are dropped when dominated or when their bound reaches the best
known value; a beam drops more, and the least bound of what it dropped says how much that may have cost.

Where layers may be recomputed, each is placed in two variants. A stage that recomputes needs room for what one of its
layers drops and restores: r, the largest of them. For whatever r' the layers to come need, the bytes x + max(r, r') of
a are no more than b's if x_a - x_b + max(0, r_a - r_b) <= 0.

Under 1F1B (see `one_f_one_b`, where the three loads of a stage are derived) the chain is searched from its end, so that
the number of stages placed is the number of micro-batches that the current one holds: the label's level.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hetero.planner.arrays import Pool
from hetero.planner.dominance import undominated
from hetero.schedule import GPIPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hetero.planner.bounds import Completion, States, Weights
    from hetero.planner.problem import Floats, Problem
    from hetero.planner.symmetry import Classes, Ints

_S, _F, _B, _CUR_F, _CUR_B, _CUR_R, _SHARED = 0, 1, 2, 3, 4, 5, 6
_HURRIED_BEAM = 256
_ROUNDING = 1e-13
_COMPARED = 96


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
        recomputed: whether each layer is run again in its backward pass.
    """

    value: float
    path: tuple[int, ...]
    lower_bound: float
    is_complete: bool
    reached: int
    free: dict[int, int] = field(default_factory=dict)
    recomputed: tuple[bool, ...] = ()


@dataclass
class _Labels:
    """Labels of one layer, in rows; `parent`, `last` and `variant` lead back.

    Attributes:
        columns: (n, W) as above.
        unavailable: bits of the devices that can't be opened any more.
        last: device of the current stage.
        level: what decides how many micro-batches the current stage holds.
        tied: (n, G) device of each tie that is not complete; -1: none yet, or not any more.
        on_reference: whether it is the reference so far.
        variant: 1: the last layer is recomputed.
        parent: row in the labels of the layer before.
    """

    columns: Floats
    unavailable: Ints
    last: Ints
    level: Ints
    tied: Ints
    on_reference: NDArray[np.bool_]
    variant: Ints
    parent: Ints

    def __len__(self) -> int:
        return len(self.last)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> _Labels:
        return _Labels(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    @classmethod
    def joint(cls, parts: Sequence[_Labels]) -> _Labels:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))


@dataclass
class _Trail:
    """Final labels and the way back."""

    labels: _Labels
    steps: list[tuple[Ints, Ints, Ints]]

    def path(self, row: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Device of each layer, and whether it is recomputed."""
        found = []
        for parent, last, variant in reversed(self.steps):
            found.append((int(last[row]), bool(variant[row])))
            row = int(parent[row])
        devices, recomputed = zip(*reversed(found), strict=True)
        return devices, recomputed


class LabelSearch:
    """The search for one objective; `run` may be called often, with growing beams and better bounds."""

    def __init__(
        self, problem: Problem, weights: Weights, classes: Classes, states: States, bounds: Sequence[Completion]
    ) -> None:
        self.problem, self.weights, self.classes, self.states, self.bounds = problem, weights, classes, states, bounds
        self.n_layers, self.n_devices = problem.forward.shape
        self.runs = np.isfinite(problem.forward)
        self.is_gpipe = problem.schedule == GPIPE
        self.n_levels = 1 if self.is_gpipe else min(problem.n_microbatches, self.n_devices)
        self.variants = [self.runs, self.runs & (problem.kept < problem.saved)][: 1 + problem.can_recompute]
        self.room = problem.saved - problem.kept
        self.media = problem.media if weights.links else ()
        self.groups = [
            group for group in problem.core_groups if (len(group) > 1 and self.is_gpipe) or not problem.contiguous
        ]
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
        n_rooms = (1 if self.problem.contiguous else self.n_devices) * (len(self.variants) - 1)
        stops = np.cumsum([_SHARED, n_groups, n_groups, len(self.media), 1, n_pools, n_rooms, n_bounds])
        spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(stops)]
        self.shared_f, self.shared_b, self.medium, self.own_bytes, self.pool_bytes, self.rooms, self.bound_columns = (
            spans
        )
        self.width = int(stops[-1])
        self.of_stage = [_CUR_F, _CUR_B, _CUR_R, self.own_bytes.start]
        self.of_stage += range(self.rooms.start, self.rooms.stop) if self.problem.contiguous else []
        self.forward_columns = [
            *(_F, _CUR_F),
            *range(self.shared_f.start, self.shared_f.stop),
            *range(self.medium.start, self.medium.stop),
        ]
        self.backward_columns = [_B, _CUR_B, *range(self.shared_b.start, self.shared_b.stop)]
        if not self.is_gpipe:
            self.forward_columns, self.backward_columns = [_F, _CUR_F, _CUR_B, _CUR_R], [_B]
        self.byte_columns = [*range(self.own_bytes.start, self.pool_bytes.stop)]
        self.additive = [_S, *range(self.bound_columns.start, self.bound_columns.stop)]
        # (columns, D): whose room counts in which bytes.
        members = [range(self.n_devices) if self.is_limited else (), *(pool.members for pool in self.pools)]
        self.counts = np.array([[d in inside for d in range(self.n_devices)] for inside in members], float)
        self.room_counts = self.counts.T[:, :, None] if self.problem.contiguous else self.counts[None]
        self.room_counts = np.ascontiguousarray(self.room_counts)

    def _increments(self) -> None:
        """What a layer, and what the opening of a stage, adds to each column on each device."""
        p = self.problem
        forward, backward = np.where(self.runs, p.forward, 0.0), np.where(self.runs, p.backward, 0.0)
        shape = (self.n_layers, self.n_devices, self.width)
        self.add = np.zeros((self.n_levels, len(self.variants), *shape))
        self.opening = np.zeros((self.n_levels, self.n_devices, self.width))
        for level in range(self.n_levels):
            held = level + 1 if not self.is_gpipe else p.n_microbatches
            self._loads(self.opening[level], p.overhead[:, 0], p.overhead[:, 1], held)
            for k, bound in enumerate(self.bounds):
                self.opening[level, :, self.bound_columns.start + k] = bound.opening
            for variant in range(len(self.variants)):
                target = self.add[level, variant]
                self._loads(target, forward, backward + variant * forward, held)
                target[..., _S] += p.calls
                self._bytes(target, p.fixed + held * (p.kept if variant else p.saved))
                again = variant * (self.weights.backward + p.busy_rate) * forward
                for k, bound in enumerate(self.bounds):
                    target[..., self.bound_columns.start + k] = np.where(self.runs, bound.price, 0.0) + again

    def _loads(self, target: Floats, f: Floats, b: Floats, held: int) -> None:
        w, m = self.weights, self.problem.n_microbatches
        target[..., _S] = (w.forward + self.problem.busy_rate) * f + (w.backward + self.problem.busy_rate) * b
        if not self.is_gpipe:
            target[..., _CUR_F] = (m - 1) * b + (m - held) * f
            target[..., _CUR_B] = (m - 1) * f + (m - held) * b
            target[..., _CUR_R] = (m - 1) * (f + b)
            return
        alone = np.array([not any(d in group for group in self.groups) for d in range(self.n_devices)], float)
        target[..., _CUR_F], target[..., _CUR_B] = f * alone, b * alone
        for k, group in enumerate(self.groups):
            inside = np.array([d in group for d in range(self.n_devices)], float)
            target[..., self.shared_f.start + k] = f * inside
            target[..., self.shared_b.start + k] = b * inside

    def _bytes(self, target: Floats, nbytes: Ints) -> None:
        for k, pool in enumerate(self.pools):
            inside = np.array([d in pool.members for d in range(self.n_devices)], float)
            target[..., self.pool_bytes.start + k] = nbytes * inside
        if self.is_limited:
            target[..., self.own_bytes.start] = nbytes

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
        found = self._search(upper, beam, deadline, floors, caps, reference, dominate=True)
        return found if isinstance(found, Found) else self._best(*found, upper)

    def every(
        self, *, upper: float, beam: int, deadline: float
    ) -> tuple[float, list[tuple[float, tuple[int, ...], tuple[bool, ...]]]]:
        """All placements whose value, which is a bound on something else, is less than `upper`; least value first.

        Returns:
            The least value that a placement which is missing may have (infinite: none is), and (value, device of each
            layer, whether it is recomputed) of each placement.
        """
        found = self._search(upper, beam, deadline, (0.0, 0.0), (np.inf, np.inf), None, dominate=False)
        if isinstance(found, Found):
            return (np.inf if found.is_complete else found.lower_bound), []
        trail, dropped = found
        value = self._value(trail.labels.columns)
        rows = [row for row in np.argsort(value, kind="stable").tolist() if value[row] < upper]
        return dropped, [(float(value[row]), *trail.path(row)) for row in rows]

    def _search(
        self,
        upper: float,
        beam: int,
        deadline: float,
        floors: tuple[float, float],
        caps: tuple[float, float],
        reference: Sequence[int] | None,
        *,
        dominate: bool,
    ) -> Found | tuple[_Trail, float]:
        """The final labels and the least bound of those dropped without proof; or that there are none."""
        labels = _Labels(
            columns=np.zeros((1, self.width)),
            unavailable=np.array([self.useless[0]]),
            last=np.array([-1]),
            level=np.array([-1]),
            tied=np.full((1, len(self.problem.ties)), -1),
            on_reference=np.array([reference is not None]),
            variant=np.array([0]),
            parent=np.array([0]),
        )
        steps: list[tuple[Ints, Ints, Ints]] = []
        dropped = np.inf
        for i in range(self.n_layers):
            before, labels = labels, self._extend(labels, i, caps, reference)
            if not len(labels):
                return Found(np.inf, (), min(upper, dropped), dropped == np.inf, i, self._free(before, i))
            bound = self._bound(labels, i + 1, floors)
            alive = bound < upper * (1 - _ROUNDING)
            labels, bound = labels.take(alive), bound[alive]
            if dominate:
                kept = self._undominated(labels, floors, caps)
                labels, bound = labels.take(kept), bound[kept]
            limit = beam if time.monotonic() < deadline else min(beam, _HURRIED_BEAM)
            if len(labels) > limit:
                order = np.argpartition(bound, limit)
                dropped = min(dropped, float(bound[order[limit:]].min()))
                labels = labels.take(np.sort(order[:limit]))
            steps.append((labels.parent, labels.last, labels.variant))
            if not len(labels):
                return Found(np.inf, (), min(upper, dropped), dropped == np.inf, self.n_layers)
        return _Trail(labels, steps), dropped

    def within(self, limit: float, *, beam: int, deadline: float) -> Found:
        """Any placement whose largest forward (or backward) load is at most `limit`; the weights are that one alone."""
        floors = (limit, 0.0) if self.weights.max_forward else (0.0, limit)
        caps = (limit, np.inf) if self.weights.max_forward else (np.inf, limit)
        return self.run(upper=limit * (1 + 1e-9), beam=beam, deadline=deadline, floors=floors, caps=caps)

    def _best(self, trail: _Trail, dropped: float, upper: float) -> Found:
        value = self._value(trail.labels.columns)
        value[trail.labels.on_reference] = np.inf
        row = int(np.argmin(value))
        best = float(value[row])
        if not best < upper:
            return Found(np.inf, (), min(upper, dropped), dropped == np.inf, self.n_layers)
        path, recomputed = trail.path(row)
        return Found(best, path, min(best, dropped), dropped >= best, self.n_layers, recomputed=recomputed)

    def _value(self, columns: Floats) -> Floats:
        value: Floats = (
            columns[:, _S] + self.weights.max_forward * columns[:, _F] + self.weights.max_backward * columns[:, _B]
        )
        return value

    def _extend(self, labels: _Labels, i: int, caps: tuple[float, float], reference: Sequence[int] | None) -> _Labels:
        """All labels that place layer i after one of `labels` and keep to the limits."""
        parts = [labels.take(np.zeros(0, np.int64))]
        for variant, runs in enumerate(self.variants):
            if i:
                parts.append(self._stay(labels, i, variant))
            if not self.problem.joined[i]:
                parts += [self._switch(labels, i, int(device), variant) for device in np.flatnonzero(runs[i])]
        new = _Labels.joint(parts)
        columns = new.columns
        columns[:, _F] = columns[:, self.forward_columns].max(axis=1)
        columns[:, _B] = columns[:, self.backward_columns].max(axis=1)
        fits = (columns[:, _F] <= caps[0]) & (columns[:, _B] <= caps[1])
        for tie, layers in enumerate(self.problem.ties):
            if i in layers[1:]:
                fits &= new.tied[:, tie] == new.last
            if i in layers:
                new.tied[:, tie] = new.last if i < layers[-1] else -1
        nbytes = self._filled(new)
        if self.is_limited:
            fits &= nbytes[:, 0] <= self.problem.limits[new.last]
        for k, pool in enumerate(self.pools):
            fits &= nbytes[:, 1 + k] <= pool.limit
        if reference is not None:
            new.on_reference &= new.last == reference[i]
        new.unavailable |= self.useless[i + 1]
        self._forget(new)
        return new.take(fits)

    def _filled(self, labels: _Labels) -> Floats:
        """(n, 1 + P) bytes of the current stage and of the pools, with the room that recomputed layers need."""
        nbytes: Floats = labels.columns[:, self.byte_columns]
        if len(self.variants) > 1:
            rooms = labels.columns[:, self.rooms]
            if self.problem.contiguous:
                nbytes = nbytes + rooms * self.counts[:, labels.last].T
            else:
                nbytes = nbytes + rooms @ self.counts.T
        return nbytes

    def _stay(self, labels: _Labels, i: int, variant: int) -> _Labels:
        rows = np.flatnonzero(self.variants[variant][i, labels.last])
        new = labels.take(rows)
        new.columns += self.add[new.level, variant, i, new.last]
        self._make_room(new, i, variant, rows)
        return new

    def _switch(self, labels: _Labels, i: int, device: int, variant: int) -> _Labels:
        is_open = ((labels.unavailable & self.bit[device]) == 0) & (labels.last != device)
        if (previous := self.classes.previous[device]) >= 0:
            is_open &= (labels.unavailable & self.bit[previous]) != 0
        if not self.is_gpipe:
            is_open &= labels.level + 1 < self.n_levels
        hop = self.hops[i - 1][labels.last, device] if i else np.zeros(len(labels))
        rows = np.flatnonzero(is_open & np.isfinite(hop))
        new, hop = labels.take(rows), hop[rows]
        if len(self.variants) > 1 and self.problem.contiguous and i:
            new.columns[:, self.pool_bytes] += new.columns[:, self.rooms] * self.counts[1:, new.last].T
        new.level = new.level * 0 if self.is_gpipe else new.level + 1
        new.columns[:, self.of_stage] = 0.0
        new.columns[:, self.additive] += (self.weights.transfer * hop)[:, None]
        if not self.is_gpipe:
            new.columns[:, _CUR_R] = -new.columns[:, _S]
        new.columns += self.opening[new.level, device] + self.add[new.level, variant, i, device]
        if self.weights.links:
            new.columns[:, _F] = np.maximum(new.columns[:, _F], hop)
        for k, medium in enumerate(self.media if i else ()):
            new.columns[:, self.medium.start + k] += hop * medium[new.last, device]
        new.unavailable |= self.closes[device]
        new.last = np.full(len(rows), device)
        self._make_room(new, i, variant, rows)
        return new

    def _make_room(self, new: _Labels, i: int, variant: int, parent: Ints) -> None:
        new.parent, new.variant = parent, np.full(len(parent), variant)
        if variant:
            at = np.arange(len(new)), self.rooms.start + new.last * (not self.problem.contiguous)
            new.columns[at] = np.maximum(new.columns[at], self.room[i, new.last])

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
        sums, kind = columns[:, _S].copy(), self._kind(labels)
        value = sums + self.weights.max_forward * forward[:, 0] + self.weights.max_backward * backward[:, 0]
        alive = undominated(
            np.lexsort((forward[:, 1], value, kind)),
            kind,
            sums,
            forward,
            backward,
            columns[:, self.byte_columns],
            columns[:, self.rooms].copy(),
            self.room_counts,
            labels.last if self.problem.contiguous else np.zeros_like(labels.last),
            np.array([self.weights.max_forward, self.weights.max_backward]),
            np.isfinite(np.array(caps)),
            _COMPARED,
        )
        return np.flatnonzero(alive)

    def _kind(self, labels: _Labels) -> Ints:
        """Number of the labels that can be compared: what completes the one completes the other."""
        kind: Ints = (labels.unavailable * self.n_devices + labels.last) * 2 + labels.on_reference
        if not self.is_gpipe:
            kind = kind * self.n_levels + labels.level
        if self.problem.ties:
            rows = np.column_stack([kind, labels.tied])
            kind = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        return kind

    def _free(self, labels: _Labels, i: int) -> dict[int, int]:
        """Device -> bytes that the most fortunate label leaves free there for layer i."""
        free: dict[int, int] = {}
        for device in map(int, np.flatnonzero(self.runs[i])):
            is_current = labels.last == device
            possible = is_current | ((labels.unavailable & self.bit[device]) == 0)
            nbytes = self._filled(labels) if i else labels.columns[:, self.byte_columns]
            own = np.where(is_current, nbytes[:, 0], 0.0)
            left = float(self.problem.limits[device]) - own
            for k, pool in enumerate(self.pools):
                if device in pool.members:
                    left = np.minimum(left, pool.limit - nbytes[:, 1 + k])
            if possible.any():
                free[device] = int(left[possible].max())
        return free
