"""Good partitions by simulated annealing with moves of connected clusters.

Energy: sum_d (load_d / goal)^p. Its steepness makes the largest loads matter most, while the others still tell a good
move from a bad one, which the plain maximum doesn't. A single item rarely can leave a chain whose links are expensive,
so that a move takes a connected cluster of random size to another device, and in three cases of ten a cluster of that
device comes back in exchange (moves of clusters: Swendsen and Wang, Phys. Rev. Lett. 58, 1987). A move changes the
loads of its two devices alone: a third one that holds pins of a net pays for it before and after, since one of the two
holds another of its pins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numba
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero.planner.noncontiguous_hypergraph import Hypergraph
    from hetero.planner.workload import Floats, Ints

_EXCHANGE = 0.3
_NEIGHBOUR = 0.5
_COLDEST = 1e-3
_TRIES = 20


@dataclass(frozen=True)
class Schedule:
    """How one run of annealing goes.

    Attributes:
        moves: tried.
        power: p of the energy.
        hottest: first temperature, in units of the energy; the last is 1e-3.
        largest: items of a cluster at most.
        seed: of its random numbers.
    """

    moves: int
    power: float
    hottest: float
    largest: int
    seed: int


class _Parts(NamedTuple):
    """A hypergraph for compiled code: the nets of item i are nets[first_net[i] : first_net[i + 1]], pins alike."""

    times: Floats
    allowed: NDArray[np.bool_]
    nbytes: Floats
    room: Floats
    class_of: Ints
    first_net: Ints
    nets: Ints
    first_pin: Ints
    pins: Ints
    costs: Floats


class _State(NamedTuple):
    """A partition: device of each item, load and bytes of each device, (m, D) pins of each net on each device."""

    devices: Ints
    load: Floats
    memory: Floats
    inside: NDArray[np.int32]
    marks: Ints


class Annealer:
    """Annealing of one hypergraph; `run` may be called from several threads."""

    def __init__(self, graph: Hypergraph) -> None:
        first_net, nets = _flat(graph.nets_of)
        first_pin, pins = _flat([list(pins) for pins, _ in graph.nets])
        self._parts = _Parts(
            times=np.where(graph.allowed, graph.times, 0.0),
            allowed=graph.allowed,
            nbytes=graph.nbytes,
            room=graph.memory_bytes * (1 + 1e-12),
            class_of=graph.class_of,
            first_net=first_net,
            nets=nets,
            first_pin=first_pin,
            pins=pins,
            costs=np.array([cost for _, cost in graph.nets]).reshape(len(graph.nets), graph.times.shape[1]),
        )

    def run(self, start: Ints, goal: float, schedule: Schedule, stop: NDArray[np.bool_]) -> Ints:
        """The best partition seen: (n,) device of each item.

        Args:
            start: (n,) device of each item; keeps the rules of memory and of unsupported items.
            goal: a load that would be good; positive.
            schedule: of the run.
            stop: (1,) looked at now and then; true: end the run.
        """
        n_devices, n_nets = len(self._parts.class_of), len(self._parts.costs)
        state = _State(
            devices=start.copy(),
            load=np.zeros(n_devices),
            memory=np.zeros(n_devices),
            inside=np.zeros((n_nets, n_devices), np.int32),
            marks=np.zeros(len(start), np.int64),
        )
        best: Ints = _anneal(
            self._parts,
            state,
            goal,
            schedule.moves,
            schedule.power,
            schedule.hottest,
            schedule.largest,
            np.random.default_rng(schedule.seed),
            stop,
        )
        return best


def _flat(lists: list[list[int]]) -> tuple[Ints, Ints]:
    first = np.zeros(len(lists) + 1, np.int64)
    first[1:] = np.cumsum([len(one) for one in lists])
    return first, np.array([x for one in lists for x in one], np.int64)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill(parts: _Parts, state: _State) -> None:
    """Loads, bytes and counts of pins of the state's devices."""
    for item in range(len(state.devices)):
        device = state.devices[item]
        state.load[device] += parts.times[item, parts.class_of[device]]
        state.memory[device] += parts.nbytes[item]
        for k in range(parts.first_net[item], parts.first_net[item + 1]):
            state.inside[parts.nets[k], device] += 1
    for e in range(len(parts.costs)):
        for device in range(len(parts.class_of)):
            if 0 < state.inside[e, device] < parts.first_pin[e + 1] - parts.first_pin[e]:
                state.load[device] += parts.costs[e, parts.class_of[device]]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _shift(parts: _Parts, state: _State, item: int, target: int) -> None:
    """Move an item to a device."""
    source = state.devices[item]
    here, there = parts.class_of[source], parts.class_of[target]
    loses, gains = parts.times[item, here], parts.times[item, there]
    for k in range(parts.first_net[item], parts.first_net[item + 1]):
        e = parts.nets[k]
        size = parts.first_pin[e + 1] - parts.first_pin[e]
        if state.inside[e, source] == size:  # whole before, cut after
            loses -= parts.costs[e, here]
        elif state.inside[e, source] == 1:  # the last pin here
            loses += parts.costs[e, here]
        if state.inside[e, target] == 0:  # the first pin there
            gains += parts.costs[e, there]
        elif state.inside[e, target] + 1 == size:  # cut before, whole after
            gains -= parts.costs[e, there]
        state.inside[e, source] -= 1
        state.inside[e, target] += 1
    state.load[source] -= loses
    state.load[target] += gains
    state.memory[source] -= parts.nbytes[item]
    state.memory[target] += parts.nbytes[item]
    state.devices[item] = target


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _shift_all(parts: _Parts, state: _State, items: Ints, target: int) -> None:
    for k in range(len(items)):
        _shift(parts, state, items[k], target)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _energy(load: Floats, goal: float, power: float) -> float:
    total = 0.0
    for d in range(len(load)):
        total += (load[d] / goal) ** power
    return total


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _cluster(
    parts: _Parts, state: _State, first: int, largest: int, mark: int, room: Ints, rng: np.random.Generator
) -> Ints:
    """Items on the device of `first` connected by nets, a random number up to `largest`, small ones more often."""
    size = int(np.exp(rng.random() * np.log(largest + 0.999)))
    room[0] = first
    state.marks[first] = mark
    n = 1
    for _ in range(4 * size):
        if n == size:
            break
        item = room[rng.integers(max(0, n - 3), n)]
        if parts.first_net[item] == parts.first_net[item + 1]:
            continue
        e = parts.nets[rng.integers(parts.first_net[item], parts.first_net[item + 1])]
        other = parts.pins[rng.integers(parts.first_pin[e], parts.first_pin[e + 1])]
        if state.devices[other] == state.devices[first] and state.marks[other] != mark:
            state.marks[other] = mark
            room[n] = other
            n += 1
    return room[:n]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _are_allowed(parts: _Parts, items: Ints, device: int) -> bool:
    allowed = True
    for k in range(len(items)):
        allowed = allowed and parts.allowed[items[k], parts.class_of[device]]
    return allowed


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _some_item_on(state: _State, device: int, rng: np.random.Generator) -> int:
    """A random item on the device; -1 where some tries found none."""
    for _ in range(_TRIES):
        item = rng.integers(0, len(state.devices))
        if state.devices[item] == device:
            return int(item)
    return -1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _target(parts: _Parts, state: _State, item: int, rng: np.random.Generator) -> int:
    """A device: any, or as often one that holds a pin of one of the item's nets."""
    if rng.random() < _NEIGHBOUR and parts.first_net[item] < parts.first_net[item + 1]:
        e = parts.nets[rng.integers(parts.first_net[item], parts.first_net[item + 1])]
        return int(state.devices[parts.pins[rng.integers(parts.first_pin[e], parts.first_pin[e + 1])]])
    return int(rng.integers(0, len(parts.class_of)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _anneal(
    parts: _Parts,
    state: _State,
    goal: float,
    moves: int,
    power: float,
    hottest: float,
    largest: int,
    rng: np.random.Generator,
    stop: NDArray[np.bool_],
) -> Ints:
    _fill(parts, state)
    n = len(state.devices)
    best, least = state.devices.copy(), state.load.max()
    energy = _energy(state.load, goal, power)
    room, other_room, nothing = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(0, np.int64)
    for move in range(moves):
        if move % 1024 == 0 and stop[0]:
            break
        item = rng.integers(0, n)
        source, target = state.devices[item], _target(parts, state, item, rng)
        if source == target:
            continue
        going = _cluster(parts, state, item, largest, 2 * move + 1, room, rng)
        coming = nothing
        other = _some_item_on(state, target, rng) if rng.random() < _EXCHANGE else -1
        if other >= 0:
            coming = _cluster(parts, state, other, largest, 2 * move + 2, other_room, rng)
        if not (_are_allowed(parts, going, target) and _are_allowed(parts, coming, source)):
            continue
        _shift_all(parts, state, going, target)
        _shift_all(parts, state, coming, source)
        after = _energy(state.load, goal, power)
        temperature = hottest * (_COLDEST / hottest) ** (move / moves)
        if (
            state.memory[source] <= parts.room[parts.class_of[source]]
            and state.memory[target] <= parts.room[parts.class_of[target]]
            and (after <= energy or rng.random() < np.exp((energy - after) / temperature))
        ):
            energy = after
            if state.load.max() < least:
                least = state.load.max()
                best[:] = state.devices
        else:
            _shift_all(parts, state, going, source)
            _shift_all(parts, state, coming, target)
    return best
