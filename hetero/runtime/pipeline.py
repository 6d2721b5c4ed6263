"""Run a placed model: micro-batches through stages, one thread a device.

Each device's worker knows beforehand what it will do in which order (`hetero.schedule.work_order`) and waits for its
inputs. Under both schedules a stage's backward passes run in the order of the micro-batches; so gradients always add up
in the same order, whatever the timing: two equal steps are equal bit by bit, and so are the two schedules.

Source: Huang et al., "GPipe", NeurIPS 2019, section 2.2; Narayanan et al., "PipeDream", SOSP 2019, section 3.2.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hetero.device import RECOMPUTING_APIS
from hetero.errors import PlacementError, StageError
from hetero.modules import apis_of, can_run
from hetero.runtime.stage import IGNORED, TARGETS, Cache, Loss, Stage, token_cross_entropy
from hetero.runtime.worker import Worker
from hetero.schedule import FORWARD, GPIPE, Event, Work, work_order

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from hetero.backends import Context
    from hetero.planner.plans import Plan
    from hetero.topology import Topology


class Batch(Protocol):
    """Rows to train on or to evaluate.

    Attributes:
        inputs: (B, ...).
        targets: (B, ...); -100 takes no part in the loss.
        context: tensors beside the activations, each with B as first dimension.
    """

    @property
    def inputs(self) -> Tensor: ...  # noqa: D102
    @property
    def targets(self) -> Tensor: ...  # noqa: D102
    @property
    def context(self) -> Context: ...  # noqa: D102


class MicroBatch(NamedTuple):
    """A part of a batch.

    Attributes:
        inputs: rows of the inputs.
        context: rows of the context, with the targets among them.
        n_targets: number of targets that count.
    """

    inputs: Tensor
    context: dict[str, Tensor]
    n_targets: int


def split(batch: Batch, n_microbatches: int) -> list[MicroBatch]:
    """Cut B rows into n_microbatches parts, as even as `torch.tensor_split` makes them: the first ones have a row more.

    A part without a target that counts is left out; with it those that are empty since there are too few rows.

    Raises:
        ValueError: no target counts, or fewer than one micro-batch is asked for.
    """
    if n_microbatches < 1:
        raise ValueError(f"n_microbatches has to be at least 1, not {n_microbatches}")
    inputs, targets = (torch.tensor_split(x, n_microbatches) for x in (batch.inputs, batch.targets))
    contexts = {key: torch.tensor_split(value, n_microbatches) for key, value in batch.context.items()}
    parts = []
    for i in range(n_microbatches):
        if n_targets := int((targets[i] != IGNORED).sum()):
            context = {key: value[i] for key, value in contexts.items()}
            parts.append(MicroBatch(inputs[i], {**context, TARGETS: targets[i]}, n_targets))
    if not parts:
        raise ValueError(f"the batch has no target: it is empty, or every one of its targets is {IGNORED}")
    return parts


class _Abandoned(Exception):  # noqa: N818 - never seen outside: another stage failed
    """The step was given up."""


class _Run:
    """One step under way: what the workers hand each other, and what came out."""

    def __init__(
        self, stages: Sequence[Stage], parts: Sequence[MicroBatch], *, backward_from: int | None, schedule: str = GPIPE
    ) -> None:
        """A step that is ready to start.

        Args:
            stages: all of them.
            parts: the micro-batches.
            backward_from: index of the first stage with a backward pass; None: forward passes only.
            schedule: `gpipe` or `1f1b`.
        """
        self.stages, self.parts, self.backward_from = stages, parts, backward_from
        devices = [stage.device.name for stage in stages]
        self.order = work_order(devices, len(parts), schedule=schedule, backward=backward_from is not None)
        self.inputs: list[SimpleQueue[Any]] = [SimpleQueue() for _ in range(len(stages) + 1)]  # [-1]: the losses
        self.grads: list[SimpleQueue[Any]] = [
            SimpleQueue() for _ in range(len(stages) + 1)
        ]  # [k]: of stage k-1's output
        self.finished: SimpleQueue[StageError | None] = SimpleQueue()
        self.is_abandoned = False
        self.events: list[Event] = []
        self.start = time.perf_counter()
        total = sum(part.n_targets for part in parts)
        self.weights = [part.n_targets / total for part in parts]
        for part, weight in zip(parts, self.weights, strict=True):
            self.inputs[0].put(part.inputs)
            self.grads[-1].put(torch.tensor(weight, dtype=torch.float64))

    def work(self, device: str) -> None:
        """One device's share; runs in its worker."""
        try:
            for work in self.order[device]:
                if work.phase == FORWARD or work.stage >= (self.backward_from or 0):
                    self._do(work)
            self.finished.put(None)
        except _Abandoned:
            self.finished.put(None)
        except StageError as error:
            self.abandon()
            self.finished.put(error)

    def _do(self, work: Work) -> None:
        stage, i, is_forward = self.stages[work.stage], work.microbatch, work.phase == FORWARD
        before, after = work.stage, work.stage + 1
        x = (self.inputs[before] if is_forward else self.grads[after]).get()
        if self.is_abandoned:
            raise _Abandoned
        start = time.perf_counter()
        try:
            if not is_forward:
                y = stage.backward(i, x)
            elif self.backward_from is not None and work.stage >= self.backward_from:
                y = stage.forward(i, x, self.parts[i].context)
            else:
                y = stage.infer(x, self.parts[i].context)
            stage.sync()  # what a device was told to do is not done yet; nothing to wait for but on cuda
        except BaseException as error:  # whatever it is: others wait for this worker, and it gets no Ctrl-C
            raise _stage_error(stage, work.phase, i, error) from error
        end = time.perf_counter()
        (self.inputs[after] if is_forward else self.grads[before]).put(y)
        self.events.append(Event(stage.device.name, work.stage, i, work.phase, start - self.start, end - self.start))

    def abandon(self) -> None:
        """Let every worker stop before its next micro-batch."""
        self.is_abandoned = True
        for edge in (*self.inputs, *self.grads):
            edge.put(None)  # wakes who waits there; nobody reads more than one after the flag is set

    def loss(self) -> float:
        """Mean loss over all targets, once all forward passes are done."""
        return sum(weight * float(self.inputs[-1].get()) for weight in self.weights)


def _stage_error(stage: Stage, phase: str, microbatch: int, error: BaseException) -> StageError:
    layers = stage.names[0] if len(stage.names) == 1 else f"{stage.names[0]} to {stage.names[-1]}"
    return StageError(
        f"stage {stage.index} ({layers}) on {stage.device.name} failed in the {phase} pass of micro-batch {microbatch}",
        found=f"{type(error).__name__}: {error}",
        remedy=str(getattr(error, "remedy", "")),
    )


class Placed:
    """A model whose layers run on the devices of a plan. Close it when done, or use it as a context manager.

    The parameters remain the model's own: optimizers, checkpoints and `state_dict` work as before, and the model itself
    can still be called where all of it lives in host memory.

    Attributes:
        stages: in execution order.
        n_microbatches: of a step, unless it is told otherwise.
        schedule: `gpipe` or `1f1b`.
        last_events: the measured schedule of the last step, by start.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        workers: Mapping[str, Worker],
        n_microbatches: int,
        schedule: str = GPIPE,
    ) -> None:
        self.stages, self.n_microbatches, self.schedule = tuple(stages), n_microbatches, schedule
        self.last_events: list[Event] = []
        self._model = model
        self._workers = dict(workers)
        self._by_device = {name: [s for s in stages if s.device.name == name] for name in workers}
        self._lock = threading.Lock()  # steps of two callers must reach all workers in one order

    def step(self, batch: Batch, n_microbatches: int | None = None) -> float:
        """Forward and backward passes of a batch; gradients are added to `p.grad`.

        Args:
            batch: B rows.
            n_microbatches: parts it is cut into, whose sizes differ by at most one row; None: as planned.

        Returns:
            Mean loss over the targets that count.

        Raises:
            StageError: a stage failed, which the message names; gradients are incomplete, the next step may be tried.
            KeyboardInterrupt: Ctrl-C; the step was given up, no worker is in the middle of anything.
        """
        parts = split(batch, n_microbatches or self.n_microbatches)
        run = self._execute(_Run(self.stages, parts, backward_from=self._first_trainable(), schedule=self.schedule))
        self.last_events = sorted(run.events, key=lambda event: (event.start_s, event.stage))
        return run.loss()

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Loss without gradients.

        Returns:
            The sum of the loss over the targets that count, and their number.

        Raises:
            StageError: as `step`.
        """
        parts = split(batch, self.n_microbatches)
        run = self._execute(_Run(self.stages, parts, backward_from=None))
        n_targets = sum(part.n_targets for part in parts)
        return run.loss() * n_targets, n_targets

    def __call__(self, x: Tensor, context: Context | None = None) -> Tensor:
        """The model's output, differentiable by plain autograd: one stage after the other, in the caller's thread."""
        for stage in self.stages:
            x = stage(x, context or {})
        return x

    @property
    def config(self) -> Any:
        """The model's own; None where it has none."""
        return getattr(self._model, "config", None)

    def new_cache(self, batch_size: int) -> list[Cache]:
        """The caches of all stages, for `decode`."""
        return [stage.new_cache(batch_size) for stage in self.stages]

    def decode(self, tokens: Tensor, cache: list[Cache], position: Tensor) -> tuple[Tensor, list[Cache]]:
        """The model's output for the next tokens of sequences, each stage on its device, in the caller's thread.

        Args:
            tokens: (B, T) input of the first layer.
            cache: of `new_cache` or of the call before.
            position: () int64, number of tokens before these.
        """
        x, after = tokens, []
        for stage, part in zip(self.stages, cache, strict=True):
            x, part = stage.decode(x, part, position)
            after.append(part)
        return x, after

    def parameters(self) -> Iterable[nn.Parameter]:
        """The model's own parameters."""
        return self._model.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The model's: the same names, in the same order, as without placement."""
        return self._model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the model's parameters and buffers, in place."""
        self._model.load_state_dict(state)

    def launches(self) -> dict[str, dict[str, int]]:
        """Launches so far by device and op; a device that doesn't count is missing."""
        counted = {name: stages[0].launches() for name, stages in self._by_device.items()}
        return {name: ops for name, ops in counted.items() if ops}

    def close(self) -> None:
        """End the threads; a second call does nothing."""
        for worker in self._workers.values():
            worker.close()
        self._workers = {}

    def __enter__(self) -> Placed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _first_trainable(self) -> int:
        trainable = (s.index for s in self.stages if s.is_trainable())
        return next(trainable, len(self.stages))

    def _execute(self, run: _Run) -> _Run:
        if not self._workers:
            raise RuntimeError("the placed model is closed")
        try:
            with self._lock:
                for name, worker in self._workers.items():
                    worker.submit(functools.partial(run.work, name))
            # Waiting is interruptible: Ctrl-C raises here, never in a worker.
            reports = [run.finished.get() for _ in self._workers]
        except BaseException:
            run.abandon()
            self._drain()
            raise
        if errors := [report for report in reports if report is not None]:
            self._drain()
            raise errors[0]
        return run

    def _drain(self) -> None:
        for worker in self._workers.values():
            worker.call(int)  # a worker does one thing after the other: what was under way there has ended
        for stage in self.stages:
            stage.clear()


def place(
    model: nn.Module, plan: Plan, *, topology: Topology | None = None, loss: Loss = token_cross_entropy
) -> Placed:
    """Put a model's layers onto the devices of a plan, with the cores for which it was priced and its schedule.

    Args:
        model: has `layers() -> [(name, module)]`, each called `module(x, context) -> x`.
        plan: of these layers.
        topology: where the plan's devices are described; None: discovered now.
        loss: (output, targets) -> mean over the targets that are not -100.

    Raises:
        PlacementError: the plan is for other layers, or can't be executed here: a device lacks the plan's cores, or
            for one of the reasons of `place_stages`.
        DeviceError: one of its devices does not exist.
    """
    from hetero.discovery import discover

    names = [name for name, _ in _layers(model)]
    planned = [name for stage in plan.stages for name in stage.layers]
    if names != planned:
        raise PlacementError(
            "the plan is for another model", found=f"layers {', '.join(planned)}", expected=f"layers {', '.join(names)}"
        )
    if topology is None:
        chosen = discover(list(dict.fromkeys(stage.device for stage in plan.stages)))
        topology = _with_cores(chosen, discover(), plan)
    else:
        topology = _with_cores(topology, topology, plan)
    stages = [(stage.device, stage.first, stage.last) for stage in plan.stages]
    return place_stages(
        model,
        stages,
        topology,
        loss=loss,
        n_microbatches=plan.n_microbatches,
        schedule=plan.schedule,
        recomputed=plan.recomputed,
    )


def _with_cores(topology: Topology, whole: Topology, plan: Plan) -> Topology:
    """The topology with the plan's cores, which have to be among those that the whole devices have here."""
    planned = {stage.device: stage.cores for stage in plan.stages if stage.cores}
    for name, cores in planned.items():
        device = whole.device(name)
        # An OpenCL device's threads are its driver's: it computes on all of its cores, or it is another device.
        if not set(cores) <= set(device.cores) or (device.api == "opencl" and set(cores) != set(device.cores)):
            raise PlacementError(
                f"the plan was made for other cores of {name!r}",
                found=f"cores {', '.join(map(str, device.cores)) or 'unknown'}",
                expected=f"cores {', '.join(map(str, cores))}",
                remedy="make a new plan on this machine",
            )
    devices = tuple(dataclasses.replace(d, cores=planned.get(d.name, d.cores)) for d in topology.devices)
    return dataclasses.replace(topology, devices=devices)


def place_stages(
    model: nn.Module,
    stages: Sequence[tuple[str, int, int]],
    topology: Topology | None = None,
    loss: Loss = token_cross_entropy,
    n_microbatches: int = 1,
    schedule: str = GPIPE,
    recomputed: Collection[str] = (),
) -> Placed:
    """As `place`, with the stages given as (device, first layer, last layer), both inclusive.

    `recomputed` names layers that run again in their backward pass.

    Raises:
        PlacementError: the stages don't cover the layers one after the other, a device is simulated, two devices
            overlap, a layer can't run where it should, or not a second time, two stages share a parameter, or the
            schedule has no order for them.
        DeviceError: a device does not exist.
    """
    from hetero.discovery import discover

    devices_used = list(dict.fromkeys(device for device, _, _ in stages))
    topology = discover(devices_used) if topology is None else topology.only(devices_used)
    layers = list(_layers(model))
    _check(layers, stages, topology)
    work_order([device for device, _, _ in stages], n_microbatches, schedule=schedule)  # refused here, not in a step
    _check_recomputed(layers, stages, topology, recomputed)
    built = []
    for index, (device, first, last) in enumerate(stages):
        names, units = zip(*layers[first : last + 1], strict=True)
        is_last = index == len(stages) - 1
        built.append(
            Stage(
                names,
                units,
                topology.device(device),
                index=index,
                loss=loss if is_last else None,
                input_grad=index > 0,
                recomputed=recomputed,
            )
        )
    workers = {device.name: Worker(device) for device in topology.devices}
    return Placed(model, built, workers, n_microbatches, schedule)


def _layers(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    layers: Iterable[tuple[str, nn.Module]] = model.layers()  # type: ignore[operator]  # any module that has it
    return layers


def _check_recomputed(
    layers: Sequence[tuple[str, nn.Module]],
    stages: Sequence[tuple[str, int, int]],
    topology: Topology,
    recomputed: Collection[str],
) -> None:
    names = [name for name, _ in layers]
    if unknown := [name for name in recomputed if name not in names]:
        raise PlacementError(f"recomputed layer {unknown[0]!r} does not exist", found=", ".join(names))
    for device, first, last in stages:
        again = [name for name in names[first : last + 1] if name in recomputed]
        if again and (api := topology.device(device).api) not in RECOMPUTING_APIS:
            raise PlacementError(
                f"layer {again[0]!r} can't be recomputed on {device!r}",
                found=f"its runtime is {api}",
                expected=" or ".join(RECOMPUTING_APIS),
                remedy="make a new plan on this machine",
            )


def _check(layers: Sequence[tuple[str, nn.Module]], stages: Sequence[tuple[str, int, int]], topology: Topology) -> None:
    expected = 0
    owners: dict[int, int] = {}
    for index, (name, first, last) in enumerate(stages):
        device = topology.device(name)
        if device.simulated:
            raise PlacementError(
                f"nothing can run on {name!r}", found="a simulated device", remedy="such a plan can only be studied"
            )
        for other in topology.devices:
            if device.overlaps(other):
                raise PlacementError("two devices of the plan are the same hardware", found=f"{name} and {other.name}")
        if first != expected or last < first:
            raise PlacementError(
                "the stages have to cover the layers one after the other",
                found=f"stage {index} holds layers {first} to {last}",
                expected=f"its first layer to be {expected}",
            )
        for layer, module in layers[first : last + 1]:
            if not can_run(module, device):
                apis = apis_of(module)
                raise PlacementError(
                    f"layer {layer!r} can't run on {name!r}",
                    expected=f"a device of {', '.join(sorted(apis))}" if apis else "a device that runs any module",
                )
            if any(owners.setdefault(id(parameter), index) != index for parameter in module.parameters()):
                raise PlacementError(
                    f"layer {layer!r} shares a parameter with an earlier stage",
                    remedy="put both layers into one stage, or untie the parameter",
                )
        expected = last + 1
    if expected != len(layers):
        raise PlacementError(
            "the stages don't cover all layers", found=f"{expected} of them", expected=f"{len(layers)}"
        )
