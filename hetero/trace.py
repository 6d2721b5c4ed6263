"""Schedules as Chrome trace-event files, which `chrome://tracing` and Perfetto open."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hetero.schedule import Event


def chrome_trace(*, predicted: Sequence[Event] = (), measured: Sequence[Event] = ()) -> dict[str, Any]:
    """Predicted and measured schedule beside each other.

    Args:
        predicted: from `hetero.schedule.simulate`.
        measured: of a placed model's last step (`last_events`).

    Returns:
        A JSON object: one process for each schedule that has events, one thread for each device, times in
        microseconds.

    Source: "Trace Event Format" of the Chromium project: complete events (`ph` X) and metadata events (`ph` M).
    """
    schedules = (("predicted", predicted), ("measured", measured))
    events: list[dict[str, Any]] = []
    for pid, (name, schedule) in enumerate(schedules, 1):
        if schedule:
            events += _process(pid, name, schedule)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write(path: str | Path, *, predicted: Sequence[Event] = (), measured: Sequence[Event] = ()) -> None:
    """Write `chrome_trace` to a file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(chrome_trace(predicted=predicted, measured=measured), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _process(pid: int, name: str, schedule: Iterable[Event]) -> list[dict[str, Any]]:
    schedule = sorted(schedule, key=lambda event: (event.start_s, event.stage, event.microbatch))
    devices = sorted({event.device for event in schedule}, key=lambda device: ("->" in device, device))
    tids = {device: tid for tid, device in enumerate(devices, 1)}
    metadata = [_metadata(pid, 0, "process_name", name)]
    metadata += [_metadata(pid, tid, "thread_name", device) for device, tid in tids.items()]
    return metadata + [
        {
            "name": f"{event.phase} {event.microbatch}",
            "cat": event.phase,
            "ph": "X",
            "ts": event.start_s * 1e6,
            "dur": (event.end_s - event.start_s) * 1e6,
            "pid": pid,
            "tid": tids[event.device],
            "args": {"stage": event.stage, "microbatch": event.microbatch},
        }
        for event in schedule
    ]


def _metadata(pid: int, tid: int, kind: str, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}
