"""Recomputation instead of storage in a joint graph: the results of layer norms.

The backward pass of what follows a layer norm needs the norm's result, and the norm's own backward pass needs its
input, mean and 1 / deviation. So the result can be had from these by four elementwise operations that fuse into one
kernel, and its memory is free from its last reader in the forward pass to its first one in the backward pass.

Source: Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174, with only those operations
recomputed whose operands are kept anyway.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node

from hetero.opencl.steps import VIEW_OPS

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_aten = torch.ops.aten


def recompute_layer_norms(graph: Graph, loss: Node, values: MutableMapping[Node, Any]) -> None:
    """Let nodes after `loss` read layer norms that are computed again.

    Args:
        graph: joint graph, changed in place.
        loss: last node of the forward pass.
        values: what each node yields; those of new nodes are added.
    """
    nodes = list(graph.nodes)
    forward = set(nodes[: nodes.index(loss) + 1])
    again: dict[Node, Node] = {}
    for node in nodes[len(forward) :]:
        if node.op != "call_function" or node.target is _aten.native_layer_norm_backward.default:
            continue
        for argument in node.all_input_nodes:
            if argument in forward and _starts_at_norm(argument):
                with graph.inserting_before(node):
                    node.replace_input_with(argument, _remake(graph, argument, again, values))


def _starts_at_norm(node: Node) -> bool:
    while node.target in VIEW_OPS:
        first = node.args[0]
        assert isinstance(first, Node)
        node = first
    return node.target is operator.getitem and bool(node.args[1] == 0) and _is_norm(node.args[0])


def _is_norm(node: Any) -> bool:
    return isinstance(node, Node) and node.target is _aten.native_layer_norm.default


def _remake(graph: Graph, node: Node, again: dict[Node, Node], values: MutableMapping[Node, Any]) -> Node:
    if node in again:
        return again[node]
    if node.target in VIEW_OPS:
        source, *rest = node.args
        assert isinstance(source, Node)
        new = graph.call_function(node.target, (_remake(graph, source, again, values), *rest), dict(node.kwargs))
        values[new] = values[node]
    else:
        new = _norm(graph, node, values)
    new.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    again[node] = new
    return new


def _norm(graph: Graph, result: Node, values: MutableMapping[Node, Any]) -> Node:
    """(x - mean) * rstd * weight + bias."""
    norm = result.args[0]
    assert isinstance(norm, Node)
    x, _, weight, bias, _ = norm.args
    statistics = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
    like = values[result]

    def step(target: Any, *arguments: Any) -> Node:
        node = graph.call_function(target, arguments)
        values[node] = like
        return node

    new = step(_aten.sub.Tensor, x, statistics[1])
    new = step(_aten.mul.Tensor, new, statistics[2])
    new = new if weight is None else step(_aten.mul.Tensor, new, weight)
    return new if bias is None else step(_aten.add.Tensor, new, bias)
