"""What predictions were worth: pairs of a predicted and a measured step time, and the intervals that follow from them.

A pair belongs to a class: the machine, the devices that work, the objective and where the figures came from. Of a class
with pairs enough, the interval of the next prediction is a conformal one. Take as scores |log(measured / predicted)| of
n pairs. If those and the next one are exchangeable, the next score is equally likely to have each of the n + 1 ranks
among them; so with k = ⌈(n + 1)·c⌉ it is at most the k-th smallest with probability at least c, whatever the
distribution. That needs k <= n, for c = 0.9 nine pairs; before, the spread of the measured layers is all there is.

What exchangeability asks for: other models count as other draws, pairs of one afternoon are more alike than those of
different weeks, and old software says little about new. So only the latest pairs count, and the promise is one of the
long run over validations, not one for the next model.

Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, chapter 2; Lei et al.,
"Distribution-Free Predictive Inference for Regression", JASA 113(523) 2018, theorem 2.2 (split conformal).
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hetero import cache
from hetero.backends import cpu
from hetero.planner.plans import FROM_COSTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from hetero.cost import Costs
    from hetero.planner.plans import Plan
    from hetero.topology import Topology

_log = logging.getLogger(__name__)

FORM = 1
"""Version of a line's form; lines of another are passed over."""

COVERAGE = 0.9
"""Share of measured values that intervals from the history hold in the long run."""

WINDOW = 100
"""So many of a class's latest pairs count: enough for a 90 % quantile, few enough to forget old software."""

_MOST_SOURCES = 2  # to be named in a basis


@dataclass(frozen=True)
class Kind:
    """What pairs have to share for the error of one to say something about that of another.

    Attributes:
        machine: processor and number of cores of the host.
        devices: (name, description, driver, number of host cores) of each device that works, sorted.
        objective: of the prediction.
        figures: where the layers' times came from: `profiled`, `roofline`, `given`, or several of them joined by `+`.
    """

    machine: str
    devices: tuple[tuple[str, str, str, int], ...]
    objective: str
    figures: str


@dataclass(frozen=True)
class Pair:
    """A prediction and what came true.

    Attributes:
        kind: its class.
        predicted_s: [s].
        interval_s: (low, high) that was predicted [s].
        measured_s: median [s].
        n_steps: steps that were measured.
        date: when, UTC, ISO 8601.
        versions: of the packages that a time depends on.
    """

    kind: Kind
    predicted_s: float
    interval_s: tuple[float, float]
    measured_s: float
    n_steps: int
    date: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def score(self) -> float:
        """|log(measured / predicted)|: the same for twice as long and for half as long."""
        return abs(math.log(self.measured_s / self.predicted_s))


def kind_of(devices: Iterable[str], costs: Costs, topology: Topology, objective: str = "train_step") -> Kind:
    """The class of a prediction for these devices of a topology."""
    used = {name: topology.device(name) for name in sorted(set(devices))}
    sources = _sources(used, costs)
    figures = sorted({source.split(",")[0] for source in sources})
    named = tuple((device.name, device.description, device.driver, len(device.cores)) for device in used.values())
    return Kind(_machine(), named, objective, "+".join(figures))


def file() -> Path:
    """Where the pairs are kept: one JSON object a line, in the folder of `hetero.cache`."""
    return cache.folder() / "predictions" / "history.jsonl"


def append(pairs: Sequence[Pair]) -> None:
    """Add pairs with date and versions, one write each, so that several processes may do so at once.

    A failure (full disk, read-only folder) is logged and otherwise harmless.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {name: version(name) for name in ("heteroq", "torch")}
    stamped = [dataclasses.replace(pair, date=now, versions=versions) for pair in pairs]
    cache.append_lines(file(), [{"form": FORM, **dataclasses.asdict(pair)} for pair in stamped])


def read() -> list[Pair]:
    """All pairs, in the order in which they were added; a line that is none is passed over with a warning."""
    return [pair for line in cache.read_lines(file()) if (pair := _pair(line)) is not None]


def interval_s(
    predicted_s: float, own: tuple[float, float], kind: Kind, pairs: Sequence[Pair]
) -> tuple[tuple[float, float], str]:
    """The interval of a prediction, and what it rests on, in words.

    Args:
        predicted_s: [s].
        own: (low, high) from the errors of its costs [s].
        kind: its class.
        pairs: of the history, all classes.

    Returns:
        (low, high) [s], from the latest pairs of the class where there are enough; else `own`.
    """
    scores = [pair.score for pair in pairs if pair.kind == kind][-WINDOW:]
    half = conformal(scores)
    if half is None:
        return own, FROM_COSTS
    basis = f"{len(scores)} earlier predictions for these devices ({COVERAGE:.0%} of such intervals hold)"
    return (predicted_s * math.exp(-half), predicted_s * math.exp(half)), basis


def with_history(plan: Plan, costs: Costs, topology: Topology) -> Plan:
    """The plan with the interval that earlier predictions for its devices give, where there are enough."""
    devices = dict.fromkeys(stage.device for stage in plan.stages)
    kind = kind_of(devices, costs, topology, plan.objective)
    interval, basis = interval_s(plan.value, plan.interval_s, kind, read())
    if basis == FROM_COSTS and (estimated := sorted(_sources(devices, costs) - {"profiled"})):
        basis += f" ({'; '.join(estimated[:_MOST_SOURCES])}{'; ...' if len(estimated) > _MOST_SOURCES else ''})"
    return dataclasses.replace(plan, interval_s=interval, interval_basis=basis)


def conformal(scores: Sequence[float], coverage: float = COVERAGE) -> float | None:
    """What the next score stays below with that probability; None: too few scores to say."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)  # 0.9 · 10 in floating point is a little above 9
    return sorted(scores)[rank - 1] if 0 < rank <= len(scores) else None


def _sources(devices: Iterable[str], costs: Costs) -> set[str]:
    return {layer.times[name].source for layer in costs.layers for name in devices if name in layer.times}


def _pair(line: dict[str, Any]) -> Pair | None:
    try:
        if line["form"] != FORM:
            raise ValueError(f"its form is {line['form']}, not {FORM}")
        kind = line["kind"]
        devices = tuple((str(name), str(text), str(driver), int(n)) for name, text, driver, n in kind["devices"])
        low, high = line["interval_s"]
        pair = Pair(
            Kind(str(kind["machine"]), devices, str(kind["objective"]), str(kind["figures"])),
            float(line["predicted_s"]),
            (float(low), float(high)),
            float(line["measured_s"]),
            int(line["n_steps"]),
            str(line["date"]),
            dict(line["versions"]),
        )
        if not (0 < pair.predicted_s < math.inf and 0 < pair.measured_s < math.inf):
            raise ValueError("a time is not positive and finite")
        return pair
    except (LookupError, TypeError, ValueError) as error:
        _log.warning("%s is no pair and passed over: %s: %s", line["line"], type(error).__name__, error)
        return None


def _machine() -> str:
    (host,) = cpu.devices(subdevices=False)
    return f"{host['description']}, {os.cpu_count()} cores"
