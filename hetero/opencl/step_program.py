"""A captured training step as launches, with their memory: a forward and backward pass, clipping, the optimizer.

With one micro-batch all of it is one sequence, and everything temporary, gradients included, lies in one arena, each
piece as long as it is needed. With more of them the pass runs for each, ends by adding loss and gradients to sums that
are kept until the update, and reads weights that were packed once, before the first one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.errors import CompileError
from hetero.opencl.ir import Root
from hetero.opencl.joint_lowering import lower_joint
from hetero.opencl.memory import assign, lifetimes, piece_bytes_of, require_fit
from hetero.opencl.optimizers import accumulate
from hetero.opencl.outputs import in_layout
from hetero.opencl.packing import split_packing
from hetero.opencl.resident import Layout, Region, alignment_of
from hetero.opencl.seeds import Seed
from hetero.opencl.steps import roots_of
from hetero.opencl.update import Update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero.opencl.capture import Joint
    from hetero.opencl.ir import Launch, View
    from hetero.opencl.joint_lowering import Pass
    from hetero.opencl.program import Device, PreparedLaunches
    from hetero.opencl.weights import Weights

_MAX_PIECES = 8  # of all gradients: each has memory from its first gradient until the update


class StepProgram:
    """The step for one geometry of its micro-batches.

    Attributes:
        arena_bytes: memory of everything temporary [B].
        kept_bytes: memory of what is kept between micro-batches [B].
    """

    def __init__(
        self,
        joint: Joint,
        device: Device,
        weights: Weights,
        arena: Arena,
        *,
        n_microbatches: int,
        clip_norm: float | None,
        generator: torch.Generator | None,
    ) -> None:
        self._device, self._weights, self._arena = device, weights, arena
        self._n_microbatches, self._generator, self._clip_norm = n_microbatches, generator, clip_norm
        names = {id(tensor): name for name, tensor in weights.tensors.items()}
        _require_known(joint, names)
        self._names = {i: names[id(tensor)] for i, tensor in enumerate(joint.inputs) if id(tensor) in names}
        # The module holds the graph's constants. Tensors of the batch needn't live longer than the batch.
        nothing = torch.empty(0)
        kept = (tensor if i in self._names else nothing for i, tensor in enumerate(joint.inputs))
        self._joint = dataclasses.replace(joint, inputs=tuple(kept))
        self._build()

    def _build(self) -> None:
        joint, device, weights = self._joint, self._device, self._weights
        trained = {id(weights.tensors[name]) for name in weights.trained}
        part = lower_joint(joint, device, trained)
        owners = {self._names[i]: view.root for i, view in part.gradients.items()}
        total = sum(root.nbytes for root in owners.values())
        self._runs = list(weights.runs(owners, largest=total // _MAX_PIECES))
        update = Update(self._runs, weights, self._clip_norm, device)
        self._places: dict[Root, Any] = {}
        self._batch = self._classify(part)
        packing, launches = split_packing(part.launches, self._places)
        self._places |= update.places(weights)
        self._kept: Region | None = None
        if self._n_microbatches == 1:
            self._loss, pieces = part.loss.root, update.gradients
            sequences = [[*part.launches, *update.launches]]
        else:
            self._loss = Root("kept", part.loss.root.nbytes, "loss")
            pieces = [Root("scratch", root.nbytes, root.name) for root in update.gradients]
            added = zip((self._loss, *update.gradients), (part.loss.root, *pieces), strict=True)
            sums = [accumulate(target, source, device.capabilities) for target, source in added]
            sequences = [packing, [*launches, *sums], update.launches]
            self._kept = self._keep([self._loss, *update.gradients, *(launch.writes[0].root for launch in packing)])
        self.kept_bytes = 0 if self._kept is None else self._kept.nbytes
        gradients = {owners[name]: (pieces[k], offset) for name, (k, offset) in update.inside(weights).items()}
        self._temporary, self.arena_bytes = self._lay_out(sequences, part, gradients)
        self._updates = [(self._names[i], view.root) for i, view in part.updates.items()]
        self._seed = Seed() if part.seed else None
        if self._seed is not None and part.seed is not None:
            self._seed_place = Region(device, part.seed.nbytes, is_shared=weights.is_shared)
            self._places[part.seed] = self._seed_place.part(0, part.seed.nbytes)
        self._prepared = [device.prepare(sequence) for sequence in sequences]
        self._bind(self._places)
        self._region: Region | None = None
        self._pointers: dict[View, int] = {}

    # --- one step -----------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Any], i: int) -> torch.Tensor:
        """The i-th micro-batch; after the last one the update. Returns the mean loss then, nothing of value before.

        Args:
            inputs: of the function that was captured.
            i: number of the micro-batch.

        Raises:
            CompileError: a parameter or buffer has been replaced.
        """
        for k, name in self._names.items():
            self._weights.require_own(name, inputs[k])
        with self._device.lock, torch.inference_mode(mode=False), torch.no_grad():
            if i == 0:
                self._begin()
            tensors = {view: in_layout(inputs[k].detach(), view) for view, k in self._batch.items()}
            try:
                self._enqueue(tensors, is_first=i == 0, is_last=i + 1 == self._n_microbatches)
            finally:
                self._device.finish()  # before the batch's tensors may go, whatever happened
            if i + 1 < self._n_microbatches:
                return torch.empty(())
            for run in self._runs:
                self._weights.advance(run)
            place = self._region if self._kept is None else self._kept
            assert place is not None
            return place.read(self._loss.offset, torch.empty(())).clone() / self._n_microbatches

    def _begin(self) -> None:
        """Follow what has changed since the last step: numbers of steps, the arena, hyperparameters."""
        if not all(self._weights.is_even(run) for run in self._runs):  # another program has trained some of a run
            self._build()
        if self._region is not self._arena.of(self.arena_bytes):
            self._region = region = self._arena.of(self.arena_bytes)
            places = {root: region.part(offset, root.nbytes) for root, offset in self._temporary.items()}
            self._places |= places
            self._bind(places)
        for k, run in enumerate(self._runs):
            numbers = self._weights.scalars(run)
            self._prepared[-1].set({f"{k}.{name}": value for name, value in numbers.items()})

    def _enqueue(self, tensors: dict[View, torch.Tensor], *, is_first: bool, is_last: bool) -> None:
        """Enqueue the pass, with what comes before the first and after the last."""
        middle = self._prepared[len(self._prepared) // 2]
        for view, tensor in tensors.items():
            self._give(middle, view, tensor)
        if self._seed is not None:
            self._seed.draw(self._generator)
            self._seed_place.write(0, self._seed.tensor)
        if is_first and self._kept is not None:
            self._prepared[0].enqueue()
        middle.set({"keep": 0.0 if is_first else 1.0})
        middle.enqueue()
        weights = self._weights
        for name, root in self._updates:
            self._device.copy(weights.region.part(weights.offsets[name], root.nbytes), self._places[root])
        if is_last and self._kept is not None:
            self._prepared[-1].enqueue()

    def _give(self, prepared: PreparedLaunches, view: View, tensor: torch.Tensor) -> None:
        """Let the kernels read a tensor of the batch: where it lies, or copied."""
        if not view.numel:
            return
        memory = tensor.as_strided((view.root.nbytes // tensor.itemsize,), (1,))
        if not self._weights.is_shared:
            if view.root in self._places:  # else nothing reads it
                self._device.upload(self._places[view.root], memory)
        elif tensor.data_ptr() != self._pointers.get(view):
            self._pointers[view] = tensor.data_ptr()
            prepared.bind(view.root, self._device.buffer(tensor.data_ptr(), view.root.nbytes))

    # --- memory -------------------------------------------------------------------------------------------------------

    def _bind(self, places: dict[Root, Any]) -> None:
        for prepared in self._prepared:
            for root in prepared.roots:
                if root in places:
                    prepared.bind(root, places[root])

    def _classify(self, part: Pass) -> dict[View, int]:
        """Views of the batch's tensors and their positions among the inputs; marks weights and gives them places."""
        weights, batch = self._weights, {}
        *views, dloss = part.inputs
        for i, view in enumerate(views):
            if view is None:
                continue
            if i not in self._names:
                batch[view] = i
                continue
            view.root.kind = "resident"
            self._places[view.root] = weights.region.part(weights.offsets[self._names[i]], view.root.nbytes)
        if dloss is not None:
            dloss.root.kind, dloss.root.tensor = "constant", torch.full((), 1.0 / self._n_microbatches)
        return batch

    def _keep(self, roots: Sequence[Root]) -> Region:
        """A region of what is kept between micro-batches."""
        layout = Layout(self._device)
        for i, root in enumerate(roots):
            root.kind, root.offset = "kept", layout.nbytes
            layout.add(str(i), root.nbytes)
        region = Region(self._device, layout.nbytes, is_shared=self._weights.is_shared, is_zero=False)
        self._places |= {root: region.part(root.offset, root.nbytes) for root in roots}
        return region

    def _lay_out(
        self, sequences: Sequence[Sequence[Launch]], part: Pass, gradients: dict[Root, tuple[Root, int]]
    ) -> tuple[dict[Root, int], int]:
        """Offsets of everything temporary in the arena, and its size [B]; sequences use it one after the other.

        Args:
            sequences: all launches.
            part: the pass; what it yields is read after its sequence.
            gradients: of each gradient the root that it lies in, and where [B].
        """
        weights, middle, limits = self._weights, len(sequences) // 2, self._device.capabilities
        alignment = alignment_of(self._device)
        piece_bytes = piece_bytes_of(limits, alignment)
        in_arena = ("scratch",) if weights.is_shared else ("scratch", "input")
        results = [part.loss.root, *(view.root for view in part.updates.values())]
        for root in results:
            root.kind = "scratch"
        places: dict[Root, int] = {}
        nbytes = 0
        for k, launches in enumerate(sequences):
            ends = ([view.root for view in self._batch], results) if k == middle else ([], [])
            uses = [ends[0], *(roots_of(launch) for launch in launches), ends[1]]
            spans = lifetimes([[gradients.get(root, (root, 0))[0] for root in roots] for roots in uses])
            plan = assign(spans, alignment=alignment, in_arena=in_arena, piece_bytes=piece_bytes)
            needed = weights.region.nbytes + weights.state_bytes + self.kept_bytes + plan.arena_bytes
            require_fit(plan, spans, needed, self._device.name, limits)
            nbytes = max(nbytes, plan.arena_bytes)
            places |= {root: root.offset for root in spans if root.kind in in_arena}
        return places | {root: owner.offset + at for root, (owner, at) in gradients.items()}, nbytes


class Arena:
    """Memory of everything temporary, for all programs of a training step: as much as the largest needs."""

    def __init__(self, device: Device, *, is_shared: bool) -> None:
        self._device, self._is_shared = device, is_shared
        self._region: Region | None = None

    def of(self, nbytes: int) -> Region:
        """The region, at least of a size [B]; a larger one replaces it."""
        if self._region is None or self._region.nbytes < nbytes:
            self._region = None  # given up before the new one is made
            self._region = Region(self._device, nbytes, is_shared=self._is_shared, is_zero=False)
        return self._region


def _require_known(joint: Joint, names: dict[int, str]) -> None:
    """Raise CompileError where the step would train or change something that isn't the module's."""
    for i, tensor in enumerate(joint.inputs):
        if id(tensor) in names:
            continue
        if i in joint.updates:
            raise CompileError(
                "the module changes a tensor that is not its own", found=f"an input of shape {tuple(tensor.shape)}"
            )
        if isinstance(tensor, torch.nn.Parameter) and joint.gradients[i] is not None:
            raise CompileError(
                "the loss trains a parameter that is not the module's",
                found=f"one of shape {tuple(tensor.shape)}",
                remedy="make it part of the module, and give it to the optimizer",
            )
