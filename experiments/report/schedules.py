"""Schedules of one step, predicted and measured, from Chrome trace-event files.

Format: "Trace Event Format", Google (chrome://tracing): complete events (`ph` = `X`, times in microseconds) and
metadata events that name processes and threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.report.units import is_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

MAX_BLOCKS = 2000  # of one drawn schedule

_PHASES = {"transfer": "transfer", "backward": "backward", "bwd": "backward", "forward": "forward", "fwd": "forward"}
_PREDICTED = ("predict", "plan", "simulat")


@dataclass(frozen=True)
class Block:
    """Something that a device did.

    Attributes:
        device: its name.
        phase: `forward`, `backward`, `transfer` (between devices) or `other`.
        label: micro-batch number where known, otherwise empty.
        start_s: since the start of the step [s].
        end_s: likewise.
        name: of the event.
    """

    device: str
    phase: str
    label: str
    start_s: float
    end_s: float
    name: str


@dataclass(frozen=True)
class Schedule:
    """What the devices did in one step.

    Attributes:
        blocks: by start.
    """

    blocks: tuple[Block, ...]

    @property
    def devices(self) -> list[str]:
        """In the order of their first block; a transfer's is `source->target`."""
        return list(dict.fromkeys(block.device for block in self.blocks))

    @property
    def length_s(self) -> float:
        """From the first start to the last end [s]."""
        return max((block.end_s for block in self.blocks), default=0.0)


def read_schedules(folders: Iterable[Path]) -> tuple[Schedule | None, Schedule | None]:
    """(predicted, measured) from the first `predicted_trace.json` and `trace.json` found in the folders.

    One `trace.json` may hold both: the names of its processes tell them apart.
    """
    predicted: Schedule | None = None
    measured: Schedule | None = None
    for folder in folders:
        alone = _parse(_events(folder / "predicted_trace.json"))
        both = _events(folder / "trace.json")
        processes = _names(both, "process_name")
        foreign = {pid for pid, name in processes.items() if any(word in name.lower() for word in _PREDICTED)}
        predicted = predicted or alone or _parse([e for e in both if e.get("pid") in foreign])
        measured = measured or _parse([e for e in both if e.get("pid") not in foreign])
    return predicted, measured


def _events(path: Path) -> list[Mapping[str, Any]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    events = data.get("traceEvents", []) if isinstance(data, dict) else data
    found = [e for e in events if isinstance(e, dict)] if isinstance(events, list) else []
    return [e for e in found if isinstance(e.get("pid", 0), int | str) and isinstance(e.get("tid", 0), int | str)]


def _names(events: Iterable[Mapping[str, Any]], kind: str) -> dict[Any, str]:
    """Pid -> process_name, or (pid, tid) -> thread_name."""
    names: dict[Any, str] = {}
    for event in events:
        args = event.get("args")
        if event.get("ph") == "M" and event.get("name") == kind and isinstance(args, dict) and args.get("name"):
            key = event.get("pid") if kind == "process_name" else (event.get("pid"), event.get("tid"))
            names[key] = str(args["name"])
    return names


def _parse(events: Sequence[Mapping[str, Any]]) -> Schedule | None:
    threads, processes = _names(events, "thread_name"), _names(events, "process_name")
    found = []
    for event in events:
        start, length = event.get("ts"), event.get("dur")
        if event.get("ph") != "X" or not is_number(start) or not is_number(length):
            continue
        pid, tid = event.get("pid"), event.get("tid")
        device = threads.get((pid, tid)) or processes.get(pid) or str(tid)
        found.append(_block(event, device, start * 1e-6, length * 1e-6))
    if not found:
        return None
    blocks = sorted(found, key=lambda block: (block.start_s, block.device, block.end_s))[:MAX_BLOCKS]
    first = blocks[0].start_s
    shifted = tuple(Block(b.device, b.phase, b.label, b.start_s - first, b.end_s - first, b.name) for b in blocks)
    return Schedule(shifted)


def _block(event: Mapping[str, Any], device: str, start_s: float, length_s: float) -> Block:
    args = event.get("args")
    args = args if isinstance(args, dict) else {}
    name = str(event.get("name", ""))
    words = f"{args.get('phase', '')} {event.get('cat', '')} {name}".lower()
    phase = next((phase for word, phase in _PHASES.items() if word in words), "other")
    microbatch = next((args[key] for key in ("microbatch", "micro_batch", "slot") if key in args), "")
    return Block(str(args.get("device", device)), phase, str(microbatch), start_s, start_s + length_s, name)
