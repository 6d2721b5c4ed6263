"""Runs cases on Oclgrind's device and prints what it reports: python -m tests.kernels_checked.runner KIND LANES.

To be started with OCL_ICD_VENDORS, OCLGRIND_LOG and HETEROQ_CACHE set: test_oclgrind.py does it. The output is JSON:

    reports   name of a case and shape -> what Oclgrind wrote meanwhile
    launched  file and kernel -> number of shapes at which a case launched it
    declared  files and kernels that there are for this kind of device
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from hetero.opencl import build, kernels
from hetero.opencl.copied import CopiedCalls
from hetero.opencl.errors import Unsupported
from hetero.opencl.ir import Launch, Root, Scalar, View
from hetero.opencl.program import PreparedLaunches, open_device
from tests.kernel_harness import Bench, layout
from tests.kernels_checked.cases import CASES, PLACES, Case

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Few work-items: an interpreter takes its time, and groups of 16 have all the barriers and idle items of larger ones.
KINDS: dict[str, dict[str, object]] = {"cpu": {}, "gpu": {"kind": "gpu", "max_work_group_size": 16}}
SHARED = {"optimizer.cl", "sort.cl", "product.cl"}  # the same kernels for both kinds


SHAPES = ((2, 3), (3, 5), (2, 17), (5, 4), (7, 9))  # of what the generated kernels are run with
ALIVE: list[object] = []
"""Buffers and launches. Nothing is freed: Oclgrind 21.10 takes a new buffer at the address of a freed one for
initialised as far as that one reached, and for not initialised beyond, whatever is written there."""


class Mixture(nn.Module):
    """Elementwise chains, broadcasting, types, reductions, views, concatenation and indices, around some products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)
        self.inner = nn.Linear(1, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) -> ()."""
        y = self.norm(functional.gelu(self.inner(x[..., None])) + torch.arange(6.0))
        y = torch.where(y > 0, y.exp().clamp(max=3.0), y * x[..., None].tanh())
        y = torch.cat([y, y.sin()[:, :1] * 2], dim=1).transpose(0, 1)
        scores = (y @ y.transpose(1, 2)).softmax(-1)
        logits = self.out(scores @ y) + y.mean(dim=(0, 1), keepdim=True)[..., :3]
        targets = (logits.detach().sum(-1).abs() * 10).to(torch.int64).flatten() % 3
        loss: torch.Tensor = functional.cross_entropy(logits.flatten(0, 1), targets) + logits.amax(1).square().sum()
        return loss


class CheckedBench(Bench):
    """Every tensor in a buffer of exactly its size; scratch without content, so that reading it first is an error."""

    def scratch(self, nbytes: int, name: str) -> View:
        return View(Root("scratch", nbytes, name), 0, (nbytes // 4,), (1,), torch.float32)

    def run(self, launches: list[Launch]) -> None:
        """As in the tests of kernels."""
        prepared = self.device.prepare(launches)
        for root in prepared.roots:
            if root.kind == "scratch":
                prepared.bind(root, self.device.allocate(root.nbytes))
        arguments = [argument for launch in launches for argument in launch.arguments]
        prepared.set({argument.name: 0.5 for argument in arguments if isinstance(argument, Scalar)})
        prepared.enqueue()
        self.device.finish()
        ALIVE.append(prepared)


def launches_of(case: Case, bench: Bench, shape: tuple[int, ...], kind: str) -> list[Launch]:
    """With inputs in the layout of that shape, or plain ones where no kernel takes it."""
    table = kernels.of(bench.device.capabilities)
    try:
        return case.build(bench, table, lambda tensor: layout(tensor, kind), *shape)
    except Unsupported:
        return case.build(bench, table, lambda tensor: tensor, *shape)


def declared(kind: str) -> list[str]:
    """Kernels of the files that devices of this kind use: `KERNEL name(` or another macro, or `__kernel ... name(`."""
    found = []
    for file in sorted(build._FOLDER.glob("*.cl")):
        is_of_kind = file.name in SHARED or file.name.startswith("gpu_") == (kind == "gpu")
        names = re.findall(r"^(?:[A-Z_]+|__kernel\b.*\bvoid)\s+(\w+)\(", file.read_text(), re.MULTILINE)
        found += [f"{file.name}: {name}" for name in names if is_of_kind]
    return found


def bind_apart(self: CopiedCalls, steps: Sequence[object], _: object) -> None:
    """Instead of `CopiedCalls._bind`: every root in a buffer of its own, so that its neighbour isn't its own memory."""
    for root in self.roots:
        part = self._parts[root] = self._device.allocate(root.nbytes)
        ALIVE.append(part)
        for step in steps:
            if isinstance(step, PreparedLaunches):
                step.bind(root, part)


def run_generated(kind: str, shape: tuple[int, ...], compiled: dict[str, Callable[..., torch.Tensor]]) -> None:
    """Forward and backward of a module whose operations are mostly generated kernels."""
    if not compiled:
        device = open_device("opencl:0")
        device.capabilities = dataclasses.replace(device.capabilities, **KINDS[kind])
        CopiedCalls._bind = bind_apart
        compiled["module"] = torch.compile(Mixture(), backend="opencl", dynamic=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    compiled["module"](x).backward()


def main(kind: str, lanes: int) -> None:
    """Run all cases."""
    bench = CheckedBench("opencl:0", lanes=lanes, **KINDS[kind])
    log = Path(os.environ["OCLGRIND_LOG"])
    log.touch()
    reports: dict[str, str] = {}
    launched: dict[str, int] = defaultdict(int)

    def watch(name: str, run: Callable[[], None]) -> None:
        before = log.stat().st_size
        run()
        if text := log.read_bytes()[before:].decode(errors="replace"):
            reports[name] = text

    for case in CASES:
        for shape, place in zip(case.shapes, PLACES, strict=True):
            launches = launches_of(case, bench, shape, place)
            watch(f"{case.name} {shape}", functools.partial(bench.run, launches))
            for name in {f"{'generated' if one.is_generated else one.source}: {one.kernel}" for one in launches}:
                launched[name] += 1
    compiled: dict[str, Callable[..., torch.Tensor]] = {}
    for shape in SHAPES:
        watch(f"generated {shape}", functools.partial(run_generated, kind, shape, compiled))
    print(json.dumps({"reports": reports, "launched": launched, "declared": declared(kind)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
