"""Configuration -> devices, text and, for each arm, a plan. `heteroq plan` and `heteroq run` both come through here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import hetero
import lm
import quantum
from experiments import arms, record
from experiments.config import layer_names
from experiments.errors import RunFolderError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from experiments.config import Config
    from experiments.config_file import Loaded
    from experiments.errors import ConfigError


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


def plan_arm(setting: Setting, arm: str) -> hetero.Plan:
    """Profile an arm's layers (from the cache where they were measured before) and place them.

    Raises:
        PlacementError: no placement is possible; the message names the limit.
    """
    config = setting.config
    model = arms.build(config, arm, config.seeds[0], setting.corpus.tokenizer.vocab_size)
    batch = example_batch(setting)
    n_microbatches = config.plan.n_microbatches
    costs = hetero.profile(model.layers(), batch, setting.topology, n_microbatches=n_microbatches, loss=lm.loss)
    find = cast("Callable[..., hetero.Plan]", hetero.plan)  # mypy takes it for the module hetero.planner.plan
    settings = {"objective": config.plan.objective, "n_microbatches": n_microbatches, "pins": config.plan.pins}
    try:
        return find(costs, setting.topology, contiguous=config.plan.contiguous is not False, **settings)
    except hetero.PlacementError:
        # A circuit amid layers that only one other device can run: that device needs a stage before and one after it.
        if config.plan.contiguous is not None:
            raise
        return find(costs, setting.topology, contiguous=False, **settings)


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
        "pins": {layer: placed.get(layer) for layer in config.plan.pins},
        "devices": used,
    }
    expected = {
        "layers": layer_names(config.model),
        "n_microbatches": config.plan.n_microbatches,
        "objective": config.plan.objective,
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
