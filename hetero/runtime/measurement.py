"""Timing of stages and of hand-overs between devices, in the threads that will do the work."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetero.backends import Context, backend
from hetero.backends.timing import median_s
from hetero.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hetero.device import Device
    from hetero.runtime.stage import Stage

_WARM_UP = 2  # rounds: the first compiles, the second fills the caches and the allocator's free lists
_LEAST_ROUNDS = 7
_MOST_ROUNDS = 50
_BUDGET_S = 1.5
_TURNS, _TURN_S = 4, 0.12  # of a comparison between alone and together; the first turn more is to warm up
_LEAST_ERROR = 0.02  # below it the spread of a few rounds says nothing about the next minutes

Rounds = tuple[list[float], list[float]]
"""Seconds of a forward and of a backward pass, the mean of each round."""


@dataclass(frozen=True)
class Sample:
    """Medians of one workload [s] and the half width of the relative interval around them; its memory [B].

    Memory is 0 where the backend doesn't plan it; `Stage.memory_bytes` says what the two are.
    """

    forward_s: float
    backward_s: float
    error: float
    call_bytes: int
    scratch_bytes: int

    def to_json(self) -> dict[str, float]:
        """The fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, float]) -> Sample:
        """The inverse of `to_json`."""
        forward_s, backward_s, error = (float(data[name]) for name in ("forward_s", "backward_s", "error"))
        return cls(forward_s, backward_s, error, int(data["call_bytes"]), int(data["scratch_bytes"]))


@dataclass
class Workload:
    """A stage with an input for it.

    Attributes:
        stage: what to time.
        x: input of one micro-batch, where the stage computes.
        context: its context, likewise.
        forward: seconds of a forward pass, the mean of each round so far.
        backward: seconds of a backward pass, likewise.
    """

    stage: Stage
    x: Tensor
    context: Context
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def round(self, n_slots: int) -> None:
        """All forward passes of a step, then all backward passes; notes the mean of each.

        Every slot has an input of its own, as in a step: otherwise it would always be in the processor's cache.
        """
        inputs = [self.x.clone() for _ in range(n_slots)]
        self.stage.zero_grad()
        self.stage.sync()
        start = time.perf_counter()
        outputs = [self.stage.forward(slot, x, self.context) for slot, x in enumerate(inputs)]
        self.stage.sync()
        self.forward.append((time.perf_counter() - start) / n_slots)
        grads = [torch.full_like(y, 1.0 / n_slots) for y in outputs]
        self.stage.sync()
        start = time.perf_counter()
        for slot, grad in enumerate(grads):
            self.stage.backward(slot, grad)
        self.stage.sync()
        self.backward.append((time.perf_counter() - start) / n_slots)

    def run(self, n_slots: int) -> Rounds:
        """Rounds for a fixed time: the means of the forward and of the backward passes."""
        self.forward, self.backward = [], []
        end = time.perf_counter() + _TURN_S
        while len(self.forward) < 2 or time.perf_counter() < end:
            self.round(n_slots)
        return self.forward, self.backward

    def sample(self) -> Sample:
        """Medians and spread of the rounds: a step's time is the sum of a round's passes, outliers included."""
        spreads = [_relative_spread(times) for times in (self.forward, self.backward)]
        medians = statistics.median(self.forward), statistics.median(self.backward)
        return Sample(*medians, max(_LEAST_ERROR, *spreads), *self.stage.memory_bytes())


def measure(workers: Sequence[Worker], workloads: Sequence[Sequence[Workload]], n_slots: int) -> list[list[Sample]]:
    """Time the workloads of all workers by turns, one worker at a time, so that a busy moment falls on all alike.

    Args:
        workers: one a device.
        workloads: what each of them times.
        n_slots: micro-batches of a round.

    Returns:
        For each worker, a sample of each of its workloads.
    """

    def round_of(own: Sequence[Workload]) -> None:
        for workload in own:
            workload.round(n_slots)

    jobs = [functools.partial(round_of, own) for own in workloads]
    for _ in range(_WARM_UP):
        for worker, job in zip(workers, jobs, strict=True):
            worker.call(job)
    for workload in itertools.chain.from_iterable(workloads):
        workload.forward.clear()
        workload.backward.clear()
    end = time.perf_counter() + _BUDGET_S * len(workers)
    for n in range(_MOST_ROUNDS):
        if n >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for worker, job in zip(workers, jobs, strict=True):
            worker.call(job)
    return [[workload.sample() for workload in own] for own in workloads]


def slowdown(workers: Sequence[Worker], workloads: Sequence[Workload], n_slots: int) -> list[tuple[float, float]]:
    """How much longer forward and backward passes take while all workers compute: ratios of at least 1.

    By turns each alone, then all at once, so that a busy moment of the machine falls on both.
    """
    jobs = [functools.partial(workload.run, n_slots) for workload in workloads]
    alone: list[list[Rounds]] = []
    together: list[list[Rounds]] = []
    for _ in range(1 + _TURNS):
        alone.append([worker.call(job) for worker, job in zip(workers, jobs, strict=True)])
        running = [worker.begin(job) for worker, job in zip(workers, jobs, strict=True)]
        together.append([result() for result in running])
    return [(_ratio(alone[1:], together[1:], k, 0), _ratio(alone[1:], together[1:], k, 1)) for k in range(len(workers))]


def _ratio(alone: list[list[Rounds]], together: list[list[Rounds]], worker: int, phase: int) -> float:
    """Of the lower quartiles: what other programs take meanwhile is not the devices' doing."""
    quartiles = [
        statistics.quantiles([time for turn in turns for time in turn[worker][phase]], n=4)[0]
        for turns in (together, alone)
    ]
    return max(1.0, quartiles[0] / quartiles[1])


def _relative_spread(times: list[float]) -> float:
    """Half of the range between the 10th and the 90th percentile, relative to the median."""
    deciles = statistics.quantiles(times, n=10)
    return (deciles[-1] - deciles[0]) / 2 / statistics.median(times)


def handover_s(source: Device, target: Device, nbytes: int) -> tuple[float, float | None]:
    """Latency [s] and bandwidth [B/s] from one device to the other; None: nothing is copied.

    On shared memory it is the time from a thread's `put` to the other thread's return from `get`: half of a
    ping-pong.
    """
    ping: SimpleQueue[Any] = SimpleQueue()
    pong: SimpleQueue[Any] = SimpleQueue()
    n = 200

    def echo() -> None:
        for _ in range(n):
            pong.put(ping.get())

    def send() -> list[float]:
        times = []
        for _ in range(n):
            start = time.perf_counter()
            ping.put(None)
            pong.get()
            times.append(time.perf_counter() - start)
        return times

    workers = Worker(source), Worker(target)
    try:
        echoed = workers[1].begin(echo)
        latency = statistics.median(workers[0].call(send)) / 2
        echoed()
        copied = workers[1].call(_copier(source, target, nbytes))
    finally:
        for worker in workers:
            worker.close()
    return latency + copied[0], copied[1]


def _copier(source: Device, target: Device, nbytes: int) -> Callable[[], tuple[float, float | None]]:
    """Latency and bandwidth of a copy between the devices' memories; (0, None) where they are the same."""
    places = [torch.device(backend(device.api).torch_device(device.name)) for device in (source, target)]

    def copy_s(size: int) -> float:
        x = torch.zeros(max(size // 4, 1), device=places[0])

        def call() -> None:
            x.to(places[1])
            for place in places:
                if place.type == "cuda":
                    torch.cuda.synchronize(place)

        return median_s(call, budget_s=0.05)

    def measured() -> tuple[float, float | None]:
        if places[0] == places[1]:
            return 0.0, None
        small, large = copy_s(4), copy_s(max(nbytes, 1 << 20))
        return small, max(nbytes, 1 << 20) / max(large - small, 1e-9)

    return measured
