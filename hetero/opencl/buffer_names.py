"""What buffers hold, in the user's words: operation and module instead of a node's name; for messages on memory."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from hetero.opencl.ir import Launch
from hetero.opencl.steps import VIEW_OPS, module_path, operation_name, roots_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Graph, Node

    from hetero.opencl.steps import Step


def name_roots(steps: Iterable[Step], graph: Graph) -> None:
    """Rename the roots that steps use.

    Those named after a node become `addmm of L['self'].fc` or, for inputs, `input of addmm of L['self'].fc`; what a
    kernel needs for itself becomes `packed b for addmm`.

    Args:
        steps: of the lowered graph.
        graph: that they were lowered from.
    """
    nodes = {node.name: node for node in graph.nodes}
    done = set()
    for step in steps:
        for root in roots_of(step):
            if root in done:
                continue
            done.add(root)
            node = nodes.get(root.name)
            if node is not None:
                root.name = _describe(node)
            elif isinstance(step, Launch):
                root.name = f"{root.name or root.kind} for {step.op}"


def _describe(node: Node) -> str:
    if node.op == "call_function":
        operation = node.all_input_nodes[0] if node.target is operator.getitem else node
        path, name = module_path(operation), operation_name(operation)
        return f"{name} of {path}" if path else name
    reader = _reader(node)
    return f"input of {_describe(reader)}" if reader is not None else "input"


def _reader(node: Node) -> Node | None:
    """The first operation that reads an input, looking through views."""
    for user in node.users:
        if user.op == "call_function":
            found = _reader(user) if user.target in VIEW_OPS else user
            if found is not None:
                return found
    return None
