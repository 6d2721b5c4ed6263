"""When each stage works on each micro-batch: a discrete-event simulation of a pipeline's step.

The step modelled is the one that `hetero.runtime` runs. Every device has one thread, which does its work in a fixed
order and waits for what isn't there yet. `gpipe`: all forward passes, stage by stage and micro-batch by micro-batch,
then all backward passes, the last stage first. `1f1b`: after a warm-up one forward and one backward pass in turn, for
devices of one stage each. A transfer delays the hand-over and occupies nobody. Threads whose devices share a core
share its time evenly, as the operating system's scheduler makes them.

Relation to the planner's formula, Σf + (m-1) max f + Σb + (m-1) max b + 2 Σc for `gpipe`:

- Where every stage has a device and cores of its own, simulation and formula are equal but for rounding. (A flow shop
  with one order of jobs and machine times that don't depend on the job: the slowest machine, once reached, is never
  idle.)
- Where stages share a device or cores, the formula adds their loads up: it is the time of the pipeline in which they
  are one machine. It is exact where the sharing stages are neighbours and each micro-batch passes them in one go. The
  even sharing simulated here can be slower (a micro-batch that is nearly done yields half the core to the next one, so
  that what follows waits) and it can be faster (where sharing stages lie apart, those between them work meanwhile and
  the formula counts their time as well). Over 1,600 random pipelines of 2 to 5 stages with two on one core, simulation
  over formula was 0.89 to 1.07 for neighbours (median 1.00) and 0.78 to 1.04 for stages apart (median 0.97). What
  holds always: not below the busiest core's work, not above the time without any overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from hetero.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hetero.planner.plan import Plan, PlanStage
    from hetero.topology import Topology

FORWARD, BACKWARD, TRANSFER = "forward", "backward", "transfer"
_Work = tuple[int, str, int]  # stage, phase, micro-batch


@dataclass(frozen=True)
class Event:
    """One piece of work in a schedule, predicted or measured.

    Attributes:
        device: name of the device; of a transfer `source->target`.
        stage: index of the stage (of the sending one for a transfer).
        microbatch: index of the micro-batch.
        phase: `forward`, `backward` or `transfer`.
        start_s: from the beginning of the step [s].
        end_s: likewise.
    """

    device: str
    stage: int
    microbatch: int
    phase: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Schedule:
    """The events of one step.

    Attributes:
        events: ordered by their start.
        makespan_s: end of the last one [s].
        in_flight: for each stage, the most micro-batches whose activations it holds at once.
    """

    events: tuple[Event, ...]
    makespan_s: float
    in_flight: tuple[int, ...]


def simulate(plan: Plan, topology: Topology | None = None, *, schedule: str | None = None) -> Schedule:
    """The predicted schedule of one step of a plan.

    Args:
        plan: its stages may also share devices.
        topology: says which devices share cores; None: those of the plan do, for which it was priced.
        schedule: `gpipe` or `1f1b`; None: the plan's. Objectives other than `train_step` have forward passes only, and
            `latency` has one micro-batch.

    Returns:
        Events in seconds from the start of the step.
    """
    return simulate_stages(
        plan.stages,
        [transfer.seconds for transfer in plan.transfers],
        {s.device: s.cores if topology is None else topology.device(s.device).cores for s in plan.stages},
        1 if plan.objective == "latency" else plan.n_microbatches,
        schedule=schedule or plan.schedule,
        backward=plan.objective == "train_step",
    )


def simulate_stages(
    stages: Sequence[PlanStage],
    transfers: Sequence[float],
    cores: Mapping[str, tuple[int, ...]],
    n_microbatches: int,
    *,
    schedule: str = "gpipe",
    backward: bool = True,
) -> Schedule:
    """The schedule of a chain of stages.

    Args:
        stages: device and times [s] of each; nothing else is read.
        transfers: time of the hand-over after each stage but the last [s]; the gradient's way back takes as long.
        cores: device -> cores it computes on; none: the device shares nothing.
        n_microbatches: of the step.
        schedule: `gpipe` or `1f1b`.
        backward: whether there are backward passes.
    """
    held = {device: [k for k, s in enumerate(stages) if s.device == device] for device in (s.device for s in stages)}
    if schedule == "1f1b":
        if len(held) < len(stages):
            raise PlacementError("1f1b has no order for a device that holds several stages", remedy="use gpipe")
        queues = {name: _one_forward_one_backward(own[0], len(stages), n_microbatches) for name, own in held.items()}
    else:
        queues = {name: _gpipe(own, n_microbatches) for name, own in held.items()}
    if not backward:
        queues = {name: [work for work in queue if work[1] == FORWARD] for name, queue in queues.items()}
    simulation = _Simulation(stages, transfers, cores, queues)
    simulation.run()
    events = tuple(sorted(simulation.events, key=lambda event: (event.start_s, event.stage, event.microbatch)))
    makespan = max((event.end_s for event in events), default=0.0)
    return Schedule(events, makespan, tuple(_in_flight(events, s) for s in range(len(stages))))


def _gpipe(stages: Sequence[int], m: int) -> list[_Work]:
    """Order of a device's work: all forward passes of its stages, then all backward passes from the last one on."""
    queue = [(s, FORWARD, k) for s in stages for k in range(m)]
    return queue + [(s, BACKWARD, k) for s in reversed(stages) for k in range(m)]


def _one_forward_one_backward(stage: int, n_stages: int, m: int) -> list[_Work]:
    """Order of a stage's work: source: Narayanan et al., "PipeDream", SOSP 2019, section 3.2."""
    warm_up = min(m, n_stages - 1 - stage)
    queue = [(stage, FORWARD, k) for k in range(warm_up)]
    for k in range(m - warm_up):
        queue += [(stage, FORWARD, warm_up + k), (stage, BACKWARD, k)]
    return queue + [(stage, BACKWARD, k) for k in range(m - warm_up, m)]


def _in_flight(events: Sequence[Event], stage: int) -> int:
    """Most micro-batches between the start of their forward and the end of their backward pass."""
    changes = [(e.start_s, 1) for e in events if e.stage == stage and e.phase == FORWARD]
    changes += [(e.end_s, -1) for e in events if e.stage == stage and e.phase == BACKWARD]
    level = peak = 0
    for _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak


@dataclass
class _Running:
    stage: int
    phase: str
    microbatch: int
    start: float
    since: float
    left: float
    rate: float = 0.0

    @property
    def end(self) -> float:
        return self.since + self.left / self.rate


@dataclass
class _Simulation:
    """State of the clock: what runs on each device, and when the inputs of waiting work arrive."""

    stages: Sequence[PlanStage]
    transfers: Sequence[float]
    cores: Mapping[str, tuple[int, ...]]
    queues: Mapping[str, list[_Work]]
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    running: dict[str, _Running] = field(default_factory=dict)
    arrival: dict[_Work, float] = field(default_factory=dict)

    def run(self) -> None:
        self.arrival = {work: 0.0 for queue in self.queues.values() for work in queue if work[:2] == (0, FORWARD)}
        while True:
            while self._start():
                pass
            ends = [work.end for work in self.running.values()]
            waiting = [self.arrival[queue[0]] for queue in self._waiting().values() if queue[0] in self.arrival]
            if not ends and not waiting:
                break
            self.now = min(ends + waiting)
            for device, work in list(self.running.items()):
                if work.end <= self.now:
                    self._finish(device, work)

    def _waiting(self) -> dict[str, list[_Work]]:
        """What idle devices have to do next."""
        return {device: queue for device, queue in self.queues.items() if queue and device not in self.running}

    def _start(self) -> bool:
        """Start what is ready on idle devices; whether there was anything."""
        ready = {
            device: queue for device, queue in self._waiting().items() if self.arrival.get(queue[0], inf) <= self.now
        }
        for device, queue in ready.items():
            stage, phase, microbatch = queue.pop(0)
            seconds = self.stages[stage].forward_s if phase == FORWARD else self.stages[stage].backward_s
            self.running[device] = _Running(stage, phase, microbatch, self.now, self.now, seconds)
        if ready:
            self._share()
        return bool(ready)

    def _finish(self, device: str, work: _Running) -> None:
        end = work.end
        del self.running[device]
        self.events.append(Event(device, work.stage, work.microbatch, work.phase, work.start, end))
        step = 1 if work.phase == FORWARD else -1
        target = work.stage + step
        if target == len(self.stages):
            self.arrival[work.stage, BACKWARD, work.microbatch] = end
        elif target >= 0:
            delay = self.transfers[min(work.stage, target)]
            self.arrival[target, work.phase, work.microbatch] = end + delay
            if delay:
                name = f"{device}->{self.stages[target].device}"
                self.events.append(Event(name, work.stage, work.microbatch, TRANSFER, end, end + delay))
        self._share()

    def _share(self) -> None:
        """Divide each core evenly among the devices at work on it; a device is as slow as its most crowded core."""
        crowd: dict[int, int] = {}
        for device in self.running:
            for core in self.cores.get(device, ()):
                crowd[core] = crowd.get(core, 0) + 1
        for device, work in self.running.items():
            rate = 1.0 / max((crowd[core] for core in self.cores.get(device, ())), default=1)
            if rate != work.rate:
                if work.rate:
                    work.left = max(0.0, work.left - (self.now - work.since) * work.rate)
                work.since, work.rate = self.now, rate
