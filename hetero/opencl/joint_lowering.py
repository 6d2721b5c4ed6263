"""Lowering of a captured step: every gradient and new value lies whole and alone, laid out as what it belongs to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.buffer_names import name_roots
from hetero.opencl.handlers import HANDLERS
from hetero.opencl.ir import Launch, Root, View
from hetero.opencl.lower import Lowering
from hetero.opencl.recompute import recompute_layer_norms

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from torch.fx import Graph, Node

    from hetero.opencl.capture import Joint
    from hetero.opencl.program import Device
    from hetero.opencl.steps import Lowered

_ALL = 1 << 30
_aten = torch.ops.aten


@dataclass(frozen=True)
class Pass:
    """Launches of one forward and backward pass.

    Attributes:
        launches: in order.
        inputs: views of the tensors that the step was captured with; None for those that aren't read.
        loss: view of the loss.
        gradients: by input.
        updates: new values, by input.
        seed: root of the seed, if anything is random.
    """

    launches: list[Launch]
    inputs: tuple[View | None, ...]
    loss: View
    gradients: dict[int, View]
    updates: dict[int, View]
    seed: Root | None


def lower_joint(joint: Joint, device: Device, trained: Container[int]) -> Pass:
    """Lower a joint graph, which is changed in place.

    Args:
        joint: the graph.
        device: where it will run.
        trained: ids of the inputs whose gradients are wanted.
    """
    graph = joint.module.graph
    values = {node: node.meta.get("val") for node in graph.nodes}
    recompute_layer_norms(graph, joint.loss, values)
    wanted = {i for i, tensor in enumerate(joint.inputs) if id(tensor) in trained}
    gradients = {i: node for i, node in enumerate(joint.gradients) if node is not None and i in wanted}
    nodes = [joint.loss, *gradients.values(), *joint.updates.values()]
    owners = [values[joint.loss], *(joint.inputs[i] for i in (*gradients, *joint.updates))]
    likes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in owners]
    lowered = _lower(graph, values, nodes, likes, device)
    name_roots(lowered.steps, graph)
    loss, *others = (view for view in lowered.outputs if isinstance(view, View))
    return Pass(
        launches=[step for step in lowered.steps if isinstance(step, Launch)],
        inputs=lowered.inputs,
        loss=loss,
        gradients=dict(zip(gradients, others, strict=False)),
        updates=dict(zip(joint.updates, others[len(gradients) :], strict=True)),
        seed=lowered.seed,
    )


def _lower(
    graph: Graph, values: dict[Node, Any], nodes: list[Node], likes: Sequence[torch.Tensor], device: Device
) -> Lowered:
    """Lower a graph that yields these nodes; results that share memory or lie otherwise are copied, in a second try."""
    output = next(iter(graph.find_nodes(op="output")))
    for _ in range(2):
        output.args = (tuple(nodes),)
        graph.eliminate_dead_code()
        lowering = Lowering(
            graph, values, n_user_outputs=_ALL, is_backward=True, target=device.capabilities, fallback=None
        )
        lowered = lowering.run(HANDLERS)
        views = [view for view in lowered.outputs if isinstance(view, View)]
        assert len(views) == len(nodes), "losses, gradients and new values are tensors"
        users = Counter(view.root for view in views)
        wrong = [k for k, view in enumerate(views) if not _is_like(view, likes[k]) or users[view.root] > 1]
        if not wrong:
            return lowered
        for k in wrong:
            with graph.inserting_before(output):
                nodes[k] = graph.call_function(_aten.clone.default, (nodes[k],))
            values[nodes[k]] = likes[k]
    raise AssertionError("a copy lies whole and alone")


def _is_like(view: View, like: torch.Tensor) -> bool:
    """Whether a view is the whole of an output with the layout of a dense tensor."""
    if view.root.kind != "output" or view.offset:
        return False
    strides = zip(view.shape, view.strides, like.stride(), strict=True)
    return view.root.nbytes == like.numel() * like.itemsize and all(n == 1 or s == t for n, s, t in strides)
