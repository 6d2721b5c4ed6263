"""What `heteroq plan` is asked beside the plan: what would change it, why not, other programs' formats, traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import hetero
import lm
from experiments import planning
from experiments.errors import ConfigError
from hetero import export, trace
from hetero.planner.sensitivity_text import answer_text
from hetero.schedule import simulate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from experiments.config import Arm
    from experiments.planning import Setting
    from hetero.planner.sensitivity import Sensitivity
    from hetero.schedule import Event

_WARM_UP = 3  # steps before the one that is drawn: caches, and the devices' first launches


def sensitivity_of(setting: Setting, plan: hetero.Plan, costs: hetero.Costs) -> Sensitivity:
    """What would change an arm's plan, with the configuration's constraints."""
    return hetero.sensitivity(costs, setting.topology, plan, **planning.constraints(setting))


def split_question(text: str) -> tuple[str, str]:
    """`LAYER=DEVICE` as a pair.

    Raises:
        ConfigError: it is none.
    """
    layer, is_pair, device = text.partition("=")
    if not (layer and is_pair and device):
        raise ConfigError(f"--why {text}: no question", expected="LAYER=DEVICE, for example head=cpu")
    return layer, device


def why_not(setting: Setting, plan: hetero.Plan, costs: hetero.Costs, layer: str, device: str) -> str:
    """Why a layer is not on a device, in a sentence.

    Raises:
        HeteroError: there is no such layer or device.
    """
    answer = hetero.why(costs, setting.topology, plan, layer, device, **planning.constraints(setting))
    return answer_text(plan, answer)


def split_export(text: str) -> tuple[str, Path]:
    """`FORMAT=FILE` as a pair.

    Raises:
        ConfigError: it is none, or there is no such format.
    """
    kind, _, file = text.partition("=")
    if kind not in export.FORMATS or not file:
        raise ConfigError(
            f"--export {text}: no format and file", expected=f"FORMAT=FILE, of {', '.join(export.FORMATS)}"
        )
    return kind, Path(file)


def write_exports(
    exports: Sequence[tuple[str, Path]], plans: Mapping[Arm, hetero.Plan], topology: hetero.Topology
) -> None:
    """Write each arm's plan in each format.

    Raises:
        ConfigError: a file can't be written.
        PlacementError: a plan can't be put in a format.
    """
    for kind, file in exports:
        for target, plan in _files(file, plans):
            try:
                export.write(kind, target, plan, topology)
            except OSError as error:
                raise ConfigError(f"can't write {target}: {error.strerror}") from None


def write_traces(
    file: Path,
    plans: Mapping[Arm, hetero.Plan],
    topology: hetero.Topology,
    measured: Mapping[Arm, Sequence[Event]] | None = None,
) -> None:
    """Write each arm's predicted schedule, and the measured one beside it.

    Raises:
        ConfigError: a file can't be written.
    """
    for arm, (target, plan) in zip(plans, _files(file, plans), strict=True):
        events = {"predicted": simulate(plan, topology).events, "measured": (measured or {}).get(arm, ())}
        try:
            trace.write(target, **events, saved_bytes=[stage.saved_bytes for stage in plan.stages])
        except OSError as error:
            raise ConfigError(f"can't write {target}: {error.strerror}") from None


def measured_events(setting: Setting, arm: Arm, plan: hetero.Plan) -> Sequence[Event]:
    """The schedule of one real step of an arm's plan."""
    model = planning.build_arm(setting, arm)
    with hetero.place(model, plan, loss=lm.loss) as placed:
        for step in range(1 + _WARM_UP):
            placed.step(planning.example_batch(setting, 1 + step))
        return placed.last_events


def _files(file: Path, plans: Mapping[Arm, hetero.Plan]) -> list[tuple[Path, hetero.Plan]]:
    """One file an arm: the first arm's is the one named, another's `trace.hybrid.json` beside `trace.json`."""
    return [
        (file if i == 0 else file.with_name(f"{file.stem}.{arm}{file.suffix}"), plan)
        for i, (arm, plan) in enumerate(plans.items())
    ]
