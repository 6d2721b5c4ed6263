"""Configuration -> devices, text and, for each arm, a plan. `heteroq plan` and `heteroq run` both come through here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import hetero
import lm
import quantum
from experiments import arms, record
from experiments.config import layer_names
from experiments.errors import RunFolderError
from hetero.history import with_history

if TYPE_CHECKING:
    from pathlib import Path

    from experiments.config import Config
    from experiments.config_file import Loaded
    from experiments.errors import ConfigError
    from hetero.planner.fleet import FleetPlan

MOST_DEVICES = 512
"""Devices on which one pipeline is searched; more are a fleet, on which many replicas of it are."""

_MOST_BATCHES = 32  # of a comparison: it is the sizes that take time, not the tokens


@dataclass(frozen=True)
class Setting:
    """What all arms and seeds of a run share.

    Attributes:
        loaded: the configuration with its source.
        topology: the devices that plans may use.
        corpus: the text.
    """

    loaded: Loaded
    topology: hetero.Topology
    corpus: lm.Corpus

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.loaded.config


def prepare(loaded: Loaded, *, topology_file: Path | None = None) -> Setting:
    """Find the devices and read the text that a configuration names.

    Args:
        loaded: the configuration with its source.
        topology_file: devices to plan for, instead of the configuration's.

    Raises:
        ConfigError: a device is absent, the text is missing, empty or not UTF-8, the circuit doesn't fit into memory;
            with the place of the setting.
    """
    topology = _topology(loaded, topology_file)
    corpus = _corpus(loaded)
    _check_circuit(loaded)
    return Setting(loaded, topology, corpus)


def build_arm(setting: Setting, arm: str) -> lm.Transformer:
    """An arm's model with its initial weights of the first seed."""
    config = setting.config
    return arms.build(config, arm, config.seeds[0], setting.corpus.tokenizer.vocab_size)


def costs_of(setting: Setting, arm: str) -> hetero.Costs:
    """What an arm's layers cost on the devices, from the cache where they were measured before."""
    layers, m = build_arm(setting, arm).layers(), setting.config.plan.n_microbatches
    return hetero.profile(layers, example_batch(setting), setting.topology, n_microbatches=m, loss=lm.loss)


def plan_arm(setting: Setting, arm: str, costs: hetero.Costs | None = None) -> hetero.Plan:
    """Place an arm's layers, with the interval that the history of predictions gives, where it is long enough.

    Args:
        setting: of the run.
        arm: whose layers.
        costs: of them; None: profiled now.

    Raises:
        PlacementError: no placement is possible; the message names the limit.
    """
    costs = costs_of(setting, arm) if costs is None else costs
    return with_history(_find_plan(setting, costs), costs, setting.topology)


def _find_plan(setting: Setting, costs: hetero.Costs) -> hetero.Plan:
    config = setting.config.plan
    settings: dict[str, Any] = {
        "n_microbatches": config.n_microbatches,
        "schedule": config.schedule,
        **constraints(setting),
    }
    try:
        return hetero.plan(
            costs,
            setting.topology,
            objective=config.objective,
            contiguous=config.contiguous is not False,
            **settings,
        )
    except hetero.PlacementError:
        # A circuit amid layers that only one other device can run: that device needs a stage before and one after it.
        if config.contiguous is not None or config.schedule != "gpipe":
            raise
        return hetero.plan(costs, setting.topology, objective=config.objective, contiguous=False, **settings)


def constraints(setting: Setting) -> dict[str, Any]:
    """What a configuration asks of every plan, as arguments of `hetero.plan`."""
    plan = setting.config.plan
    return {"pins": plan.pins, "colocate": plan.colocate, "recompute": plan.recompute}


def fleet_plan_arm(setting: Setting, arm: str) -> FleetPlan:
    """The most forward throughput of an arm's replicas on more devices than one pipeline is searched on.

    Raises:
        ConfigError: the configuration asks for what only a plan of one pipeline heeds.
        PlacementError: no pipeline is possible.
    """
    from hetero.planner.fleet import plan_fleet

    plan = setting.config.plan
    n = len(setting.topology.devices)
    heeded = {"objective": "throughput", "pins": {}, "colocate": (), "recompute": "never"}
    if ignored := [name for name, value in heeded.items() if getattr(plan, name) != value]:
        raise setting.loaded.source.error(
            ("plan", ignored[0]),
            f"{n} devices are planned as a fleet of replicas, for throughput and without constraints",
            remedy=f"plan.objective=throughput and no pins, colocate or recompute, or at most {MOST_DEVICES} devices",
        )
    costs = costs_of(setting, arm)
    first = {group.members[0] for group in setting.topology.classes()}
    layers = (
        dataclasses.replace(layer, times={name: time for name, time in layer.times.items() if name in first})
        for layer in costs.layers
    )
    return plan_fleet(dataclasses.replace(costs, layers=tuple(layers)), setting.topology)


def read_plan(setting: Setting, file: Path) -> hetero.Plan:
    """A plan that was made before, for the model, micro-batches, objective, pins and devices of this configuration.

    Raises:
        RunFolderError: missing, damaged, or made for something else; names what differs.
    """
    config = setting.config
    try:
        plan = hetero.Plan.from_json(record.read_json(file))
        placed = {layer: stage.device for stage in plan.stages for layer in stage.layers}
        used = sorted({str(device) for device in placed.values()})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{file} is no plan: {type(error).__name__}: {error}") from None
    here = {device.name for device in setting.topology.devices}
    found = {
        "layers": list(placed),
        "n_microbatches": plan.n_microbatches,
        "objective": plan.objective,
        "schedule": plan.schedule,
        "pins": {layer: placed.get(layer) for layer in config.plan.pins},
        "devices": used,
    }
    expected = {
        "layers": layer_names(config.model),
        "n_microbatches": config.plan.n_microbatches,
        "objective": config.plan.objective,
        "schedule": config.plan.schedule,
        "pins": config.plan.pins,
        "devices": [device for device in used if device in here],
    }
    remedy = "let a new run make its own plans, or set what differs as it was"
    record.refuse_other(file, found, expected, remedy=remedy)
    return plan


def example_batch(setting: Setting, step: int = 0) -> lm.Batch:
    """A batch of the size that training uses, of a seed that no training uses."""
    config = setting.config
    return setting.corpus.batch(
        "train",
        step,
        config.train.batch_size,
        config.model.seq_len,
        seed=2**31 + 1,
        dropout=config.model.dropout > 0,
    )


def validation_batches(setting: Setting, steps: int) -> list[lm.Batch]:
    """Batches to measure with: others than the one that was profiled, a few where many steps are wanted."""
    return [example_batch(setting, step) for step in range(1, 1 + min(max(steps, 1), _MOST_BATCHES))]


def require_real(setting: Setting) -> None:
    """Refuse to run on devices that are known from a file only.

    Raises:
        ConfigError: names them.
    """
    simulated = [device.name for device in setting.topology.devices if device.simulated]
    if simulated:
        path = ("plan", "topology") if setting.config.plan.topology else ("plan", "devices")
        raise setting.loaded.source.error(
            path,
            f"nothing can run on simulated devices: {', '.join(simulated[:4])}",
            remedy="look at the plan with: heteroq plan CONFIG",
        )


def _topology(loaded: Loaded, topology_file: Path | None) -> hetero.Topology:
    plan = loaded.config.plan
    try:
        if topology_file is not None:
            return hetero.Topology.from_yaml(topology_file)
        if plan.topology is not None:
            topology = hetero.Topology.from_yaml(plan.topology)
            return topology if plan.devices is None else topology.only(plan.devices)
        return hetero.discover(plan.devices)
    except hetero.HeteroError as error:
        if topology_file is not None:
            raise
        raise _at_device(loaded, error) from error


def _at_device(loaded: Loaded, error: hetero.HeteroError) -> ConfigError:
    """The same error with the place of the device's name in the configuration."""
    plan = loaded.config.plan
    path: tuple[str | int, ...] = ("plan", "devices" if plan.topology is None else "topology")
    for i, name in enumerate(plan.devices or ()):
        if repr(name) in error.message:
            path = ("plan", "devices", i)
    return placed_error(loaded, path, error)


def _corpus(loaded: Loaded) -> lm.Corpus:
    data, model = loaded.config.data, loaded.config.model
    key = "name" if data.path is None else "path"
    try:
        corpus = lm.load_corpus(name=data.name, path=data.path, tokenizer=data.tokenizer, split=data.split)
    except lm.DataError as error:
        raise placed_error(loaded, ("data", key), error) from error
    for split in ("train", "val", "test"):
        needed = model.seq_len + 1 if split == "train" else 2
        found = len(corpus.tokens(split))
        if found < needed:
            raise loaded.source.error(
                ("data", key),
                f"the {split} split has {found} tokens",
                expected=f"at least {needed} (model.seq_len + 1)" if split == "train" else f"at least {needed}",
                remedy="use a longer text, a smaller model.seq_len, or another data.split",
            )
    return corpus


def _check_circuit(loaded: Loaded) -> None:
    """Refuse a circuit whose state doesn't fit into memory, before anything is built."""
    config = loaded.config
    if config.quantum is None or not {"hybrid", "frozen"} & set(config.arms):
        return
    circuit = config.quantum
    try:
        quantum.check_circuit(circuit.n_qubits, circuit.n_circuit_layers, ansatz=circuit.ansatz, shots=circuit.shots)
    except quantum.QuantumError as error:
        raise placed_error(loaded, ("quantum", "n_qubits"), error) from error


def placed_error(
    loaded: Loaded, path: tuple[str | int, ...], error: hetero.HeteroError | lm.LMError | quantum.QuantumError
) -> ConfigError:
    """The same error with the place of the setting that it concerns."""
    return loaded.source.error(path, error.message, found=error.found, expected=error.expected, remedy=error.remedy)


def stages_of(plan: hetero.Plan) -> tuple[tuple[str, int, int], ...]:
    """The plan's stages as (device, first layer, last layer)."""
    return tuple((stage.device, stage.first, stage.last) for stage in plan.stages)
