"""How much the layers that are still to be placed cost at least: the bounds that make the chain's search short.

The objective is  S + w_f F + w_b B  with S a sum over stages, F and B the loads of the busiest core group. For any
multipliers l_g >= 0 with sum of l_g <= w_f the Lagrangian relaxation

    w_f F  =  w_f max_g load_g  >=  sum_g l_g load_g + (w_f - sum_g l_g) F

turns most of the maximum into a sum, and a sum can be minimised exactly by dynamic programming over (layer, devices
still unused, device of the current stage). Its value is a lower bound for every choice of l; `multipliers` looks for a
good one. At its best choice all devices are about equally attractive, as they are in the best fractional placement.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero.planner.problem import Floats, Problem
    from hetero.planner.symmetry import Classes

_MAX_STATES = 4096


@dataclass(frozen=True)
class Weights:
    """An objective as a weighted sum: of the sums over all stages, and of the busiest core group's loads.

    Attributes:
        forward: factor of the sum of forward times.
        backward: likewise.
        transfer: likewise, of the hand-over times in one direction.
        max_forward: factor of the largest forward load of a core group.
        max_backward: likewise.
        links: whether a hand-over counts as a load of its own in the largest forward load.
    """

    forward: float = 0.0
    backward: float = 0.0
    transfer: float = 0.0
    max_forward: float = 0.0
    max_backward: float = 0.0
    links: bool = False


@dataclass(frozen=True)
class States:
    """Which devices are still unused, as counts per class; a single state where that is no limit or there are too many.

    Attributes:
        stride: (D,) what an unavailable device adds to the index of its state.
        after: (n, C) state after opening a device of a class, -1: none is left.
    """

    stride: NDArray[np.int64]
    after: NDArray[np.int64]

    def index(self, unavailable: NDArray[np.int64]) -> NDArray[np.int64]:
        """State of each bit set of unavailable devices."""
        state = np.zeros_like(unavailable)
        for device, stride in enumerate(self.stride):
            if stride:
                state += ((unavailable >> device) & 1) * stride
        return state


def states(problem: Problem, classes: Classes) -> States:
    """The states of a problem's devices."""
    sizes = [len(group) for group in classes.members]
    n_classes, n_devices = len(sizes), len(problem.devices)
    strides = np.cumprod([1, *(size + 1 for size in sizes)])
    if strides[-1] > _MAX_STATES or not problem.contiguous:
        return States(np.zeros(n_devices, np.int64), np.zeros((1, n_classes), np.int64))
    after = np.full((strides[-1], n_classes), -1, np.int64)
    blocked = [{int(classes.of[k]) for k in problem.conflicts[group[0]]} for group in classes.members]
    for counts in itertools.product(*(range(size + 1) for size in sizes)):
        for c, size in enumerate(sizes):
            if counts[c] < size:
                then = [sizes[k] if k in blocked[c] else counts[k] + (k == c) for k in range(n_classes)]
                after[np.dot(counts, strides[:-1]), c] = np.dot(then, strides[:-1])
    return States(strides[:-1][classes.of], after)


@dataclass(frozen=True)
class Completion:
    """Least additive cost of the rest of the chain under given multipliers.

    Attributes:
        forward: (G,) multiplier of each core group's forward load.
        backward: (G,) likewise.
        price: (L, D) additive cost of a layer; infinite where it can't run.
        opening: (D,) additive cost of a stage's call.
        table: (L + 1, n, C) least cost of the layers from i on, given the state and the class of the last device.
        root: least cost of the whole chain.
    """

    forward: Floats
    backward: Floats
    price: Floats
    opening: Floats
    table: Floats
    root: float


def completion(
    problem: Problem, weights: Weights, classes: Classes, states: States, forward: Floats, backward: Floats
) -> Completion:
    """The completion table for multipliers of the core groups (forward and backward loads)."""
    member = np.array([[d in group for d in range(len(problem.devices))] for group in problem.core_groups], float)
    busy = problem.busy_rate
    factor_f, factor_b = weights.forward + busy + forward @ member, weights.backward + busy + backward @ member
    runs = np.isfinite(problem.forward)
    price = np.where(runs, factor_f * np.where(runs, problem.forward, 0), np.inf)
    price += factor_b * np.where(runs, problem.backward, 0) + problem.calls
    opening = factor_f * problem.overhead[:, 0] + factor_b * problem.overhead[:, 1]
    reps = classes.representatives
    n_layers, n_classes = len(problem.layers), len(reps)
    table = np.zeros((n_layers + 1, len(states.after), n_classes))
    opened = np.empty(0)
    for i in reversed(range(n_layers)):
        table[i] = price[i, reps] + table[i + 1]
        if not problem.joined[i]:
            opened = _opened(price[i, reps] + opening[reps], table[i + 1], states)
        if i and not problem.joined[i]:
            hop = _hop(problem, weights, classes, i)
            table[i] = np.minimum(table[i], (opened[:, None, :] + hop[None, :, :]).min(axis=2))
    return Completion(forward, backward, price, opening, table, float(opened[0].min()))


def _opened(cost: Floats, rest: Floats, states: States) -> Floats:
    """(n, C) least cost from here on when a device of a class is opened in a state."""
    columns = np.arange(rest.shape[1])
    value: Floats = np.where(states.after >= 0, cost + rest[states.after, columns], np.inf)
    return value


def _hop(problem: Problem, weights: Weights, classes: Classes, layer: int) -> Floats:
    """(C, C) weighted hand-over to a layer between devices of two classes; infinite where there is no way."""
    reps = classes.representatives
    seconds = problem.transfer(layer - 1)
    between = seconds[np.ix_(reps, reps)]
    for k, group in enumerate(classes.members):
        between[k, k] = seconds[group[0], group[1]] if len(group) > 1 else np.inf
    possible = np.isfinite(between)
    weighted: Floats = np.where(possible, weights.transfer * np.where(possible, between, 0.0), np.inf)
    return weighted


def cheapest_loads(
    problem: Problem, weights: Weights, classes: Classes, states: States, bound: Completion
) -> tuple[Floats, Floats]:
    """(G,) forward and backward loads of the placement that attains a completion's root.

    The loads of a class's members are averaged, since a state only counts them.
    """
    reps = classes.representatives
    class_loads = np.zeros((len(reps), 2))
    state, last = 0, -1
    for i in range(len(problem.layers)):
        opened = _opened((bound.price[i] + bound.opening)[reps], bound.table[i + 1], states)[state]
        if i:
            opened = opened + _hop(problem, weights, classes, i)[last]
        c = int(np.argmin(opened))
        staying = bound.price[i, reps[last]] + bound.table[i + 1, state, last] if i else np.inf
        if problem.joined[i] or staying <= opened[c]:
            c = last
        else:
            state, last = int(states.after[state, c]), c
            class_loads[c] += problem.overhead[reps[c]]
        class_loads[c] += problem.forward[i, reps[c]], problem.backward[i, reps[c]]
    counts = np.array([len(group) for group in classes.members])[:, None]
    device_loads = (class_loads / counts)[classes.of]
    loads = np.array([device_loads[list(group)].sum(axis=0) for group in problem.core_groups])
    return loads[:, 0], loads[:, 1]


def multipliers(
    problem: Problem, weights: Weights, classes: Classes, states: States, *, deadline: float, rounds: int = 60
) -> Completion:
    """The completion with the best multipliers found by ascent on the simplex, in one round at least.

    Each round makes the core groups dearer that the cheapest placement loads most (exponentiated gradient; source:
    Kivinen and Warmuth, Information and Computation 132, 1997).
    """
    n_groups = len(problem.core_groups)
    log_f, log_b = np.zeros(n_groups), np.zeros(n_groups)
    best: Completion | None = None
    for k in range(rounds):
        share_f, share_b = _softmax(log_f), _softmax(log_b)
        bound = completion(
            problem, weights, classes, states, weights.max_forward * share_f, weights.max_backward * share_b
        )
        if best is None or bound.root > best.root:
            best = bound
        if not np.isfinite(bound.root) or time.monotonic() > deadline:
            break
        load_f, load_b = cheapest_loads(problem, weights, classes, states, bound)
        step = 2.0 / np.sqrt(1.0 + k)
        log_f += step * load_f / max(load_f.max(), 1e-300)
        log_b += step * load_b / max(load_b.max(), 1e-300)
    assert best is not None
    return best


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max())
    share: Floats = e / e.sum()
    return share
