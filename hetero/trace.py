"""Schedules as Chrome trace-event files, which Perfetto and `chrome://tracing` open.

One process shows the predicted schedule and one the measured; in each, one thread a device in the order of the stages,
and beside it the transfers that it sends. Arrows lead from each pass over its transfer to the pass that needed it.
Counters show what each device keeps for backward passes.

Source: "Trace Event Format" of the Chromium project: complete events (`ph` X), metadata (M), flows (s, t, f) and
counters (C). Slices of one thread must not overlap, so transfers under way at once get threads of their own. Times are
whole nanoseconds, as in Perfetto, so that rounding makes no overlaps.
"""

from __future__ import annotations

import heapq
import itertools
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero import cache
from hetero.schedule import BACKWARD, FORWARD, TRANSFER, held_over_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hetero.schedule import Event

_Json = dict[str, Any]


def chrome_trace(
    *, predicted: Sequence[Event] = (), measured: Sequence[Event] = (), saved_bytes: Sequence[int] | None = None
) -> _Json:
    """Predicted and measured schedule beside each other.

    Args:
        predicted: from `hetero.schedule.simulate`.
        measured: of a placed model's last step (`last_events`).
        saved_bytes: what each stage keeps of a micro-batch [B] (`PlanStage.saved_bytes`), for the counters; None: they
            count micro-batches.

    Returns:
        A JSON object: one process for each schedule that has events, times in microseconds.
    """
    flow_ids = itertools.count(1)
    events: list[_Json] = []
    for pid, (name, schedule) in enumerate((("predicted", predicted), ("measured", measured)), 1):
        if schedule:
            events += _process(pid, name, schedule, saved_bytes, flow_ids)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write(
    path: str | Path,
    *,
    predicted: Sequence[Event] = (),
    measured: Sequence[Event] = (),
    saved_bytes: Sequence[int] | None = None,
) -> None:
    """Write `chrome_trace` to a file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = chrome_trace(predicted=predicted, measured=measured, saved_bytes=saved_bytes)
    cache.write_json(path, trace, indent=None)


def _process(
    pid: int, name: str, schedule: Sequence[Event], saved_bytes: Sequence[int] | None, flow_ids: Iterator[int]
) -> list[_Json]:
    schedule = sorted(schedule, key=lambda event: (event.start_s, event.end_s, event.stage, event.microbatch))
    threads, slices = _slices(pid, schedule)
    metadata = [
        _metadata(pid, 0, "process_name", {"name": name}),
        _metadata(pid, 0, "process_sort_index", {"sort_index": pid}),
    ]
    for tid, thread in enumerate(threads, 1):
        metadata.append(_metadata(pid, tid, "thread_name", {"name": thread}))
        metadata.append(_metadata(pid, tid, "thread_sort_index", {"sort_index": tid}))
    flows = _flows(schedule, slices, flow_ids)
    return [*metadata, *slices, *flows, *_counters(pid, schedule, saved_bytes)]


def _slices(pid: int, schedule: Sequence[Event]) -> tuple[list[str], list[_Json]]:
    """Names of the threads in their order, and a complete event for each of the schedule's on one of them."""
    free_from: dict[tuple[str, int], int] = {}  # thread and lane -> nanoseconds
    order: dict[tuple[str, int], tuple[int, bool, str, int]] = {}
    placed, slices = [], []
    for event in schedule:
        start, end = round(event.start_s * 1e9), round(event.end_s * 1e9)
        lane = 0
        if event.phase == TRANSFER:
            lane = next(k for k in itertools.count() if free_from.get((event.device, k), 0) <= start)
        thread = (event.device, lane)
        start = max(start, free_from.get(thread, 0))  # a device does one thing at a time: only rounding is in the way
        free_from[thread] = end = max(start, end)
        order.setdefault(thread, (event.stage, event.phase == TRANSFER, event.device, lane))
        placed.append(thread)
        slices.append(_slice(pid, event, start, end))
    threads = sorted(order, key=lambda thread: order[thread])
    for thread, one in zip(placed, slices, strict=True):
        one["tid"] = threads.index(thread) + 1
    return [f"{device} ({lane + 1})" if lane else device for device, lane in threads], slices


def _slice(pid: int, event: Event, start_ns: int, end_ns: int) -> _Json:
    return {
        "name": f"{event.phase} {event.microbatch}",
        "cat": event.phase,
        "ph": "X",
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "pid": pid,
        "tid": 0,
        "args": {"stage": event.stage, "microbatch": event.microbatch},
    }


def _flows(schedule: Sequence[Event], slices: Sequence[_Json], ids: Iterator[int]) -> list[_Json]:
    """An arrow from each pass to the one on another stage that waits for it, over the transfer if there is one."""
    passes = {(e.stage, e.phase, e.microbatch): one for e, one in zip(schedule, slices, strict=True)}
    backward_end = {(e.stage, e.microbatch): e.end_s for e in schedule if e.phase == BACKWARD}
    transfers = {}
    for event, one in zip(schedule, slices, strict=True):
        if event.phase == TRANSFER:  # an activation has arrived before its sender's backward pass can end
            is_gradient = event.start_s >= backward_end.get((event.stage, event.microbatch), inf)
            transfers[event.stage, BACKWARD if is_gradient else FORWARD, event.microbatch] = one
    arrows = []
    for (stage, phase, microbatch), one in passes.items():
        target = passes.get((stage + (1 if phase == FORWARD else -1), phase, microbatch))
        if phase == TRANSFER or target is None:
            continue
        over = transfers.get((stage, phase, microbatch))
        arrow_id = next(ids)
        arrows.append(_flow_event("s", arrow_id, phase, one))
        if over is not None:
            arrows.append(_flow_event("t", arrow_id, phase, over))
        arrows.append(_flow_event("f", arrow_id, phase, target))
    return arrows


def _flow_event(ph: str, arrow_id: int, phase: str, slice_: _Json) -> _Json:
    """The start, middle or end of an arrow, tied to the slice under way on its thread at its time."""
    return {
        "name": "activation" if phase == FORWARD else "gradient",
        "cat": "hand-over",
        "ph": ph,
        "id": arrow_id,
        "ts": slice_["ts"] + (slice_["dur"] / 2 if ph == "s" else 0.0),
        "pid": slice_["pid"],
        "tid": slice_["tid"],
    } | ({"bp": "e"} if ph == "f" else {})


def _counters(pid: int, schedule: Sequence[Event], saved_bytes: Sequence[int] | None) -> list[_Json]:
    """What each device holds for its backward passes, whenever that changes."""
    n_stages = 1 + max(event.stage for event in schedule)
    device_of = {event.stage: event.device for event in schedule if event.phase != TRANSFER}
    unit = "micro-batches" if saved_bytes is None else "bytes"
    counters = []
    curves = held_over_time(schedule, n_stages)
    for device in dict.fromkeys(device_of[k] for k in sorted(device_of)):
        own = [k for k in device_of if device_of[k] == device]
        level, held = dict.fromkeys(own, 0), 0
        for when, stage, n in heapq.merge(*([(when, k, n) for when, n in curves[k]] for k in own), key=_moment):
            held += (n - level[stage]) * (1 if saved_bytes is None else saved_bytes[stage])
            level[stage] = n
            counters.append(
                {
                    "name": f"in flight on {device}",
                    "cat": "memory",
                    "ph": "C",
                    "ts": round(when * 1e9) / 1000,
                    "pid": pid,
                    "args": {unit: held},
                }
            )
    return counters


def _moment(change: tuple[float, int, int]) -> float:
    return change[0]


def _metadata(pid: int, tid: int, kind: str, args: _Json) -> _Json:
    return {"name": kind, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}
