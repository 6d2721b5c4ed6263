"""The joint graph of a training step: forward, loss and all gradients in one, before anything is divided.

torch.compile captures the function and AOTAutograd makes it functional, as for the backend itself; the joint graph is
taken where AOTAutograd divides it into a forward and a backward graph; before it compiles them, all is called off.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from hetero.opencl.decompositions import decompositions
from hetero.opencl.errors import CompileError
from hetero.opencl.rewrites import keep_attention_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Joint:
    """A captured step.

    Attributes:
        module: holds the functional ATen graph and its constants; the placeholders are the tensors of `inputs`, then
            the gradient of the loss.
        inputs: parameters, buffers and tensors of the batch themselves.
        loss: node of the loss.
        gradients: node of the gradient by input; None for those without.
        updates: node of the new value of each input that the function changes, by input.
    """

    module: GraphModule
    inputs: tuple[torch.Tensor, ...]
    loss: Node
    gradients: tuple[Node | None, ...]
    updates: dict[int, Node]


class _Captured(Exception):  # noqa: N818 - control flow
    """The graph is known: nothing has to be compiled."""


def capture(gm: GraphModule, example: Sequence[Any]) -> Joint:
    """The joint graph of a function that TorchDynamo has captured; nothing is computed.

    Args:
        gm: TorchDynamo's graph of a function that yields the loss.
        example: its inputs.

    Raises:
        CompileError: the loss has no gradient, or isn't one number of float32.
    """
    found: list[tuple[GraphModule, int]] = []
    updated: list[int] = []

    def divide(joint: GraphModule, arguments: Sequence[Any], *, num_fwd_outputs: int, **options: Any) -> Any:
        copied: dict[Node, Node] = {}
        graph = Graph()
        graph.output(graph.graph_copy(joint.graph, copied))
        found.append((GraphModule(joint, graph), num_fwd_outputs))
        return default_partition(joint, arguments, num_fwd_outputs=num_fwd_outputs, **options)

    def stop(_: GraphModule, __: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
        context = TracingContext.try_get()
        if context is not None and context.fw_metadata is not None:
            updated.extend(context.fw_metadata.mutated_inp_runtime_indices)
        raise _Captured

    keep_attention_whole(gm)
    compile_ = aot_autograd(fw_compiler=stop, bw_compiler=stop, partition_fn=divide, decompositions=decompositions())
    with contextlib.suppress(_Captured):
        compile_(gm, example)
    if not found:
        raise CompileError("the loss has no gradient", remedy="train some parameter, outside of torch.no_grad()")
    joint, n_forward = found[0]
    return _interface(joint, example, n_forward, updated)


def _interface(gm: GraphModule, inputs: Sequence[Any], n_forward: int, updated: Sequence[int]) -> Joint:
    outputs = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args[0])
    results, gradients = outputs[:n_forward], outputs[n_forward:]
    if len(results) != 1 + len(updated):
        raise CompileError("the loss is not one number of float32", found=f"{len(results) - len(updated)} results")
    value = results[-1].meta["val"]
    if value.numel() != 1 or value.dtype != torch.float32:
        found = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
        raise CompileError("the loss is not one number of float32", found=found)
    updates = dict(zip(updated, results, strict=False))
    return Joint(gm, tuple(inputs), results[-1], tuple(gradients), updates)
