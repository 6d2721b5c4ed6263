"""When each stage works on each micro-batch: a discrete-event simulation of a pipeline's step.

The step modelled is the one that `hetero.runtime` runs. Every device does its work in a fixed order (`work_order`) and
waits for what isn't there yet. `gpipe`: all forward passes, stage by stage and micro-batch by micro-batch, then all
backward passes, the last stage first. `1f1b`: after a warm-up one forward and one backward pass in turn, for devices of
one stage each. Devices that share a core share its time evenly, as the operating system's scheduler makes them.

A transfer delays the hand-over. What else it does is up to the caller:

- `overlap=True`: it occupies nobody, as a copy engine's copy does.
- `overlap=False`: its sender does nothing else until it has arrived, as with a copy in an in-order command queue behind
  the kernel that made the data (OpenCL 1.2 specification, section 3.2.1). The receiver goes on with its own work, and
  the sender's cores are free for others.
- `take_turns=True`: a link carries one transfer at a time in each direction (full duplex) or in both together (half
  duplex), and links of one shared medium count as one; first ready, first sent.

How the simulation relates to the planner's formula of a GPipe step, Σf + (m-1) max f + Σb + (m-1) max b + 2 Σc:

- Where every stage has a device and cores of its own, simulation and formula are equal but for rounding. (A flow shop
  with one order of jobs and machine times that don't depend on the job: the slowest machine, once reached, is never
  idle.) A link that takes turns is one more machine, so with wires of their own the maxima are over f and c, and over b
  and c. A blocking transfer lengthens its sender's work: the maxima are over f + c, and over b + c.
- Where stages share a device or cores, the formula adds their loads up: it is the time of the pipeline in which they
  are one machine. It is exact where the sharing stages are neighbours and each micro-batch passes them in one go. The
  even sharing simulated here can be slower (a micro-batch that is nearly done yields half the core to the next one, so
  that what follows waits) and it can be faster (where sharing stages lie apart, those between them work meanwhile and
  the formula counts their time as well). Over 1,600 random pipelines of 2 to 5 stages with two on one core, simulation
  over formula was 0.89 to 1.07 for neighbours (median 1.00) and 0.78 to 1.04 for stages apart (median 0.97). What
  holds always: not below the busiest core's work, not above the time without any overlap.

1F1B has no such formula: `step_time` is its price.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hetero.errors import DeviceError, PlacementError
from hetero.schedule_clock import Floats, Ints, play

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from hetero.planner.plans import Plan, PlanStage
    from hetero.topology import Topology

FORWARD, BACKWARD, TRANSFER = "forward", "backward", "transfer"
GPIPE, ONE_F_ONE_B = "gpipe", "1f1b"
SCHEDULES = (GPIPE, ONE_F_ONE_B)


class Work(NamedTuple):
    """One pass of a stage for one micro-batch.

    Attributes:
        stage: index of the stage.
        phase: `forward` or `backward`.
        microbatch: index of the micro-batch.
    """

    stage: int
    phase: str
    microbatch: int


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
        events: ordered by start, then by end.
        makespan_s: end of the last pass [s].
        in_flight: for each stage, the most micro-batches whose activations it holds at once.
        peak_bytes: likewise in bytes: `in_flight` times what the stage keeps of one micro-batch for its backward pass.
    """

    events: tuple[Event, ...]
    makespan_s: float
    in_flight: tuple[int, ...]
    peak_bytes: tuple[int, ...]


def simulate(
    plan: Plan,
    topology: Topology | None = None,
    *,
    schedule: str | None = None,
    overlap: bool = True,
    take_turns: bool = False,
) -> Schedule:
    """The predicted schedule of one step of a plan.

    Args:
        plan: its stages may also share devices.
        topology: says which devices share cores; None: those of the plan do, for which it was priced.
        schedule: `gpipe` or `1f1b`; None: the plan's. `throughput` and `latency` have forward passes only, and
            `latency` has one micro-batch.
        overlap: whether a device goes on with its work while what it sends is under way.
        take_turns: whether a link carries one transfer at a time; its duplex and the medium it shares are the
            topology's, which has to be given.

    Returns:
        Events in seconds from the start of the step.

    Raises:
        PlacementError: `1f1b` for a device that holds several stages; `take_turns` without a topology.
    """
    if take_turns and topology is None:
        raise PlacementError("whose turn it is on a link depends on the links", remedy="give the topology")
    return simulate_stages(
        plan.stages,
        [transfer.seconds for transfer in plan.transfers],
        {s.device: s.cores if topology is None else topology.device(s.device).cores for s in plan.stages},
        1 if plan.objective == "latency" else plan.n_microbatches,
        schedule=schedule or plan.schedule,
        backward=plan.objective not in ("latency", "throughput"),
        overlap=overlap,
        channels=_channels(plan, topology) if take_turns and topology else None,
    )


def simulate_stages(
    stages: Sequence[PlanStage],
    transfers: Sequence[float],
    cores: Mapping[str, tuple[int, ...]],
    n_microbatches: int,
    *,
    schedule: str = GPIPE,
    backward: bool = True,
    overlap: bool = True,
    channels: Sequence[tuple[str, str]] | None = None,
) -> Schedule:
    """The schedule of a chain of stages.

    Args:
        stages: device, times [s] and saved bytes of each; nothing else is read.
        transfers: time of the hand-over after each stage but the last [s]; the gradient's way back takes as long.
        cores: device -> cores it computes on; none: the device shares nothing.
        n_microbatches: of the step.
        schedule: `gpipe` or `1f1b`.
        backward: whether there are backward passes.
        overlap: as for `simulate`.
        channels: names of the media that carry each hand-over's activations and its gradients; a medium carries one
            transfer at a time. None: no transfer waits for another.

    Raises:
        PlacementError: `1f1b` for a device that holds several stages.
    """
    devices = [stage.device for stage in stages]
    names = list(dict.fromkeys(devices))
    times = np.array([[s.forward_s for s in stages], [s.backward_s for s in stages]], float)
    numbers = np.full((2, len(stages) - 1), -1) if channels is None else _numbers(channels)
    start, end, sent = play(
        *_queues(tuple(map(names.index, devices)), n_microbatches, schedule, backward),
        times,
        np.array(transfers, float),
        numbers,
        _core_table([tuple(cores.get(name, ())) for name in names]),
        n_microbatches,
        not overlap,
    )
    events = sorted(_events(devices, n_microbatches, start, end, sent), key=_moment)
    in_flight = _in_flight(work_order(devices, n_microbatches, schedule=schedule, backward=backward), len(stages))
    peaks = tuple(n * stage.saved_bytes for n, stage in zip(in_flight, stages, strict=True))
    return Schedule(tuple(events), float(np.nanmax(end)), in_flight, peaks)


def step_time(
    forward: Sequence[float] | Floats,
    backward: Sequence[float] | Floats,
    transfers: Sequence[float] | Floats,
    n_microbatches: int,
    *,
    schedule: str = ONE_F_ONE_B,
    cores: Sequence[tuple[int, ...]] = (),
    overlap: bool = True,
) -> float:
    """Time of a step whose stages have a device each, without the events: what a solver calls often.

    Args:
        forward: (K,) of one micro-batch in each stage [s].
        backward: (K,) likewise.
        transfers: (K - 1,) of a hand-over [s].
        n_microbatches: of the step.
        schedule: `gpipe` or `1f1b`.
        cores: of each stage's device; empty: none is shared.
        overlap: as for `simulate`.

    Returns:
        Seconds; equal to `simulate_stages(...).makespan_s`.
    """
    n = len(forward)
    order, first = _queues(tuple(range(n)), n_microbatches, schedule, True)
    _, end, _ = play(
        order,
        first,
        np.array([forward, backward], float),
        np.asarray(transfers, float),
        np.full((2, n - 1), -1),
        _core_table(cores or [()] * n),
        n_microbatches,
        not overlap,
    )
    return float(end.max())


def work_order(
    devices: Sequence[str], n_microbatches: int, *, schedule: str = GPIPE, backward: bool = True
) -> dict[str, list[Work]]:
    """What each device does, in its order.

    Args:
        devices: of each stage, in execution order.
        n_microbatches: of a step.
        schedule: `gpipe` or `1f1b`.
        backward: whether there are backward passes.

    Raises:
        PlacementError: an unknown schedule; `1f1b` for a device that holds several stages.
    """
    held: dict[str, list[int]] = {}
    for stage, device in enumerate(devices):
        held.setdefault(device, []).append(stage)
    if schedule not in SCHEDULES:
        raise PlacementError(f"unknown schedule {schedule!r}", expected=" or ".join(SCHEDULES))
    if schedule == GPIPE or not backward:
        return {device: list(_gpipe(own, n_microbatches, backward)) for device, own in held.items()}
    if len(held) < len(devices):
        twice = next(device for device, own in held.items() if len(own) > 1)
        raise PlacementError(f"1f1b has no order for {twice!r}, which holds several stages", remedy="use gpipe")
    return {
        device: list(_one_forward_one_backward(own[0], len(devices), n_microbatches)) for device, own in held.items()
    }


def _gpipe(stages: Sequence[int], m: int, backward: bool) -> Iterator[Work]:
    """All forward passes of a device's stages, then all backward passes from the last stage on.

    Source: Huang et al., "GPipe", NeurIPS 2019, section 2.2.
    """
    yield from (Work(s, FORWARD, k) for s in stages for k in range(m))
    if backward:
        yield from (Work(s, BACKWARD, k) for s in reversed(stages) for k in range(m))


def _one_forward_one_backward(stage: int, n_stages: int, m: int) -> Iterator[Work]:
    """The later the stage the fewer forward passes before its first backward pass.

    Source: Narayanan et al., "PipeDream", SOSP 2019, section 3.2; with a flush at the end of the step, as in Narayanan
    et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021, section 2.2.1.
    """
    warm_up = min(m, n_stages - 1 - stage)
    yield from (Work(stage, FORWARD, k) for k in range(warm_up))
    for k in range(m - warm_up):
        yield Work(stage, FORWARD, warm_up + k)
        yield Work(stage, BACKWARD, k)
    yield from (Work(stage, BACKWARD, k) for k in range(m - warm_up, m))


def held_over_time(events: Sequence[Event], n_stages: int) -> list[list[tuple[float, int]]]:
    """How many micro-batches' activations each stage holds: from the start of the forward to the end of the backward.

    Args:
        events: predicted or measured.
        n_stages: of the pipeline.

    Returns:
        For each stage the changes, as (time [s], number held from then on). Without backward passes nothing is held.
    """
    changes: list[list[tuple[float, int]]] = [[] for _ in range(n_stages)]
    kept = {(e.stage, e.microbatch) for e in events if e.phase == BACKWARD}
    for event in sorted(events, key=_moment):  # a stage does one thing at a time, so this is the order of the changes
        if event.phase == FORWARD and (event.stage, event.microbatch) in kept:
            changes[event.stage].append((event.start_s, 1))
        elif event.phase == BACKWARD:
            changes[event.stage].append((event.end_s, -1))
    curves = []
    for stage in changes:
        level, curve = 0, []
        for when, change in stage:
            level += change
            curve.append((when, level))
        curves.append(curve)
    return curves


def _moment(event: Event) -> tuple[float, float, int, int]:
    return event.start_s, event.end_s, event.stage, event.microbatch


def _in_flight(order: Mapping[str, Sequence[Work]], n_stages: int) -> tuple[int, ...]:
    """Most micro-batches that a stage holds; its device does one thing at a time, so the order alone decides."""
    level, peak = [0] * n_stages, [0] * n_stages
    for work in (work for queue in order.values() if any(w.phase == BACKWARD for w in queue) for work in queue):
        level[work.stage] += 1 if work.phase == FORWARD else -1
        peak[work.stage] = max(peak[work.stage], level[work.stage])
    return tuple(peak)


@functools.lru_cache(maxsize=256)
def _queues(devices: tuple[int, ...], m: int, schedule: str, backward: bool) -> tuple[Ints, Ints]:
    """`work_order` as arrays, numbered as `hetero.schedule_clock` says; devices by number, in order of appearance."""
    queues = work_order([str(d) for d in devices], m, schedule=schedule, backward=backward).values()
    numbers = [[((w.phase == BACKWARD) * len(devices) + w.stage) * m + w.microbatch for w in queue] for queue in queues]
    first = np.cumsum([0, *map(len, numbers)])
    return np.array([n for queue in numbers for n in queue], np.int64), first.astype(np.int64)


def _core_table(cores: Sequence[tuple[int, ...]]) -> NDArray[np.bool_]:
    """(D, C) which device computes on which of the cores that several devices compute on."""
    shared = sorted({core for a, own in enumerate(cores) for core in own if any(core in o for o in cores[:a])})
    return np.array([[core in own for core in shared] for own in cores], bool).reshape(len(cores), len(shared))


def _events(devices: Sequence[str], m: int, start: Floats, end: Floats, sent: Floats) -> Iterator[Event]:
    n = len(devices)
    for w in np.flatnonzero(np.isfinite(end)).tolist():
        stage, microbatch = w // m % n, w % m
        phase = FORWARD if w < n * m else BACKWARD
        yield Event(devices[stage], stage, microbatch, phase, float(start[w]), float(end[w]))
        if np.isfinite(sent[w, 0]):
            target = devices[stage + (1 if phase == FORWARD else -1)]
            yield Event(
                f"{devices[stage]}->{target}", stage, microbatch, TRANSFER, float(sent[w, 0]), float(sent[w, 1])
            )


def _channels(plan: Plan, topology: Topology) -> list[tuple[str, str]]:
    """What carries each hand-over's activations and gradients, for `simulate_stages`.

    In half duplex both directions have one name. A pair whose times were given without a link has a full-duplex wire of
    its own.
    """
    return [
        (_channel(topology, one.source, one.target), _channel(topology, one.target, one.source))
        for one in plan.transfers
    ]


def _channel(topology: Topology, source: str, target: str) -> str:
    ends = " - ".join(sorted((source, target)))
    try:
        link = topology.link(source, target)
    except DeviceError:
        return f"{ends}, to {target}"
    if link.duplex == "half":
        return link.shared or ends
    # The directions of a shared medium are those of its link as written, e.g. away from `cpu` in `cpu - cuda:*`.
    return f"{link.shared}, {link.joins(source, target)}" if link.shared else f"{ends}, to {target}"


def _numbers(channels: Sequence[tuple[str, str]]) -> Ints:
    """(2, K - 1) of the media of activations and of gradients."""
    media = {name: i for i, name in enumerate(dict.fromkeys(name for pair in channels for name in pair))}
    return np.array([[media[pair[way]] for pair in channels] for way in (0, 1)], np.int64).reshape(2, -1)
