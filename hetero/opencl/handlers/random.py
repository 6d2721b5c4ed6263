"""Random numbers, as elementwise operations: a dropout is one launch with its neighbours.

Each has a stream of its own below the seed of the call (seeds.py); random_source.py says what it takes from there.
Where the backward pass computes a random operation again, under activation checkpointing, PyTorch wraps it in operators
that save and restore the state of a generator; `with_saved_states` makes this a seed and a stream of ours.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch._guards import detect_fake_mode
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.fx import Node
from torch.utils import _pytree as pytree

from hetero.opencl import operators
from hetero.opencl.c_source import literal
from hetero.opencl.errors import Unsupported
from hetero.opencl.handlers.registry import as_node, handles
from hetero.opencl.ir import Root, View
from hetero.opencl.kernels import drop_threshold
from hetero.opencl.pointwise import Index, Operand
from hetero.opencl.steps import bound_arguments, operation_name

if TYPE_CHECKING:
    from torch.fx import Graph

    from hetero.opencl.lower import Lowering

aten = torch.ops.aten

# Of every template below the first three operands: element, key, stream; {0}, {1}, {2} + {3}.
_PLACE = "{0}, {1}, {2} + {3}"
_PLACE_TYPES = (torch.int64,) * 4


def _place(lowering: Lowering, node: Node) -> tuple[Operand, ...]:
    """Operands of `_PLACE`. The number of the stream is memory, not text, so that operations share kernels."""
    seed, stream = lowering.random_stream(node)
    number = Root("constant", 8, f"{node} stream", tensor=torch.tensor([stream]))
    key, first = (View(seed.root, seed.offset + i, (), (), seed.dtype) for i in (0, 1))
    return Index(0, 1), key, first, View(number, 0, (), (), torch.int64)


def _draw(
    lowering: Lowering, node: Node, template: str, *more: Operand, types: tuple[torch.dtype, ...], result: torch.dtype
) -> None:
    """A node whose elements are an expression of random numbers; `more` are the operands from {4} on."""
    operands = (*_place(lowering, node), *more)
    lowering.pointwise(node, template, operands, (*_PLACE_TYPES, *types), result)


def _precision(lowering: Lowering, node: Node) -> tuple[torch.dtype, int]:
    """Type of a node's elements, and the number that its functions' names end in."""
    dtype = lowering.value(node).dtype
    if dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"random numbers of {dtype}")
    return dtype, 1 if dtype == torch.float32 else 2


# --- dropout ----------------------------------------------------------------------------------------------------------


@handles(aten.native_dropout.default)
def _dropout(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    out, mask = lowering.value(node)
    p = float(bound["p"]) if bound["train"] is None or bound["train"] else 0.0
    x = lowering.peek(as_node(bound["input"]))
    readers = _readers(lowering, node)
    operands, types = _kept_operands(lowering, node, p)
    name = operation_name(node)
    kept = lowering.expression(
        name, mask, _kept(p), operands, types, torch.bool, readers=readers[1] | {node}, key=(node, 1)
    )
    scale = literal(0.0 if p == 1 else 1 / (1 - p), out.dtype)
    template = f"{{0}} * {{1}} * {scale}"  # not ?: NaN and infinities stay NaN where they are dropped, as in torch
    dropped = lowering.expression(
        name, out, template, (x, kept), (out.dtype, out.dtype), out.dtype, readers=readers[0], key=node
    )
    lowering.define(node, (dropped, kept))


def _readers(lowering: Lowering, node: Node) -> list[frozenset[Node]]:
    """What reads each of a node's two results."""
    results = [[user for user in node.users if user.args[1] == i] for i in (0, 1)]
    return [frozenset(reader for user in users for reader in lowering.readers(user)) for users in results]


def _kept(p: float) -> str:
    """Whether an element is kept, with probability 1 - p."""
    return "0" if p == 1 else "1" if p == 0 else f"bits1({_PLACE}) >= {drop_threshold(p)}u"


def _kept_operands(lowering: Lowering, node: Node, p: float) -> tuple[tuple[Operand, ...], tuple[torch.dtype, ...]]:
    return (_place(lowering, node), _PLACE_TYPES) if 0 < p < 1 else ((), ())


@handles(aten.bernoulli.p)
def _bernoulli(lowering: Lowering, node: Node) -> None:
    p = 1 - float(bound_arguments(node)["p"])
    operands, types = _kept_operands(lowering, node, p)
    lowering.pointwise(node, _kept(p), operands, types, torch.bool)


@handles(aten.bernoulli.Tensor)
def _bernoulli_of(lowering: Lowering, node: Node) -> None:
    p = lowering.peek(as_node(bound_arguments(node)["p"]))
    _draw(lowering, node, f"uniform1({_PLACE}) < {{4}}", p, types=(torch.float32,), result=torch.bool)


# --- distributions ----------------------------------------------------------------------------------------------------


@handles(aten.rand.default, aten.rand_like.default, aten.uniform.default)
def _uniform(lowering: Lowering, node: Node) -> None:
    bound, (dtype, digit) = bound_arguments(node), _precision(lowering, node)
    low, high = (float(lowering.value(bound.get(name, default))) for name, default in (("from", 0.0), ("to", 1.0)))
    number = f"uniform{digit}({_PLACE})"
    if (low, high) == (0, 1):
        _draw(lowering, node, number, types=(), result=dtype)
    else:
        types = (dtype, dtype)
        _draw(lowering, node, f"{{4}} + {number} * {{5}}", low, high - low, types=types, result=dtype)


@handles(
    aten.randn.default,
    aten.randn_like.default,
    aten.normal_functional.default,
    aten.normal.float_float,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor,
)
def _normal(lowering: Lowering, node: Node) -> None:
    bound, (dtype, digit) = bound_arguments(node), _precision(lowering, node)
    mean, std = bound.get("mean", 0.0), bound.get("std", 1.0)
    is_tensor = [isinstance(lowering.value(x), torch.Tensor) for x in (mean, std)]
    operands = [lowering.peek(x) if t else lowering.value(x) for x, t in zip((mean, std), is_tensor, strict=True)]
    number = f"normal{digit}({_PLACE})"
    if (mean, std) == (0.0, 1.0):
        _draw(lowering, node, number, types=(), result=dtype)
    else:
        _draw(lowering, node, f"{{4}} + {number} * {{5}}", *operands, types=(dtype, dtype), result=dtype)


@handles(aten.exponential.default)
def _exponential(lowering: Lowering, node: Node) -> None:
    dtype = lowering.value(node).dtype
    if dtype != torch.float32:
        raise Unsupported(f"random numbers of {dtype}")
    word = f"((float)bits1({_PLACE}) + 0.5f) * 2.3283064365386963e-10f"
    rate = float(bound_arguments(node)["lambd"])
    _draw(lowering, node, f"log1({word}) * {{4}}", -1 / rate, types=(dtype,), result=dtype)


@handles(aten.randint.default, aten.randint.low, aten.randint_like.default, aten.randint_like.low_dtype)
def _integers(lowering: Lowering, node: Node) -> None:
    """64 random bits modulo the range, whose bias is below the range over 2^64."""
    bound = bound_arguments(node)
    low, high = int(lowering.value(bound.get("low", 0))), int(lowering.value(bound["high"]))
    template = f"(long)((ulong){literal(low, torch.int64)} + bits2({_PLACE}) % {high - low}ul)"
    _draw(lowering, node, template, types=(), result=torch.int64)


# --- randomised leaky ReLU --------------------------------------------------------------------------------------------


@handles(aten.rrelu_with_noise_functional.default)
def _rrelu(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    x = lowering.peek(as_node(bound["self"]))
    out, noise = lowering.value(node)
    if out.dtype != torch.float32:
        raise Unsupported(f"random numbers of {out.dtype}")
    lower, upper = float(bound["lower"]), float(bound["upper"])
    name, types = operation_name(node), (out.dtype, out.dtype)
    readers = _readers(lowering, node)
    all_types: tuple[torch.dtype, ...] = types
    if bound["training"]:
        slope = f"{{4}} <= 0 ? {{5}} + uniform1({_PLACE}) * {{6}} : 1"
        operands: tuple[Operand, ...] = (*_place(lowering, node), x, lower, upper - lower)
        all_types = (*_PLACE_TYPES, *(out.dtype,) * 3)
    else:
        slope, operands = "{0} <= 0 ? {1} : 1", (x, (lower + upper) / 2)
    slopes = lowering.expression(
        name, noise, slope, operands, all_types, out.dtype, readers=readers[1] | {node}, key=(node, 1)
    )
    result = lowering.expression(name, out, "{0} * {1}", (x, slopes), types, out.dtype, readers=readers[0], key=node)
    lowering.define(node, (result, slopes))


@handles(aten.rrelu_with_noise_backward.default)
def _rrelu_backward(lowering: Lowering, node: Node) -> None:
    bound = bound_arguments(node)
    dtype = lowering.value(node).dtype
    grad, x, noise = (lowering.peek(as_node(bound[name])) for name in ("grad_output", "self", "noise"))
    if bound["training"]:
        lowering.pointwise(node, "{0} * {1}", (grad, noise), (dtype, dtype), dtype)
    else:
        slope = (float(bound["lower"]) + float(bound["upper"])) / 2
        lowering.pointwise(node, "{1} > 0 ? {0} : {0} * {2}", (grad, x, slope), (dtype,) * 3, dtype)


# --- seeds in the graph -----------------------------------------------------------------------------------------------


@handles(operators.seed)
def _seed(lowering: Lowering, node: Node) -> None:
    """Key and number of a stream, for operations that get them as a tensor."""
    place = _place(lowering, node)
    lowering.pointwise(node, "{0} == 0 ? {1} : {2} + {3}", place, _PLACE_TYPES, torch.int64)


def with_saved_states(graph: Graph) -> None:
    """Take random operations out of PyTorch's wrappers, which save a generator's state or restore it.

    (state, result) = run_and_save_rng_state(operation, ...) becomes state = seed(); result = operation(...), drawn from
    this state; run_with_rng_state(state, operation, ...) becomes the operation drawn from a state that was saved.
    States are then seeds of ours, 16 bytes, instead of a generator's 5 KB.
    """
    for number, node in enumerate(list(graph.nodes)):
        if node.target is run_and_save_rng_state:
            with graph.inserting_before(node):
                state = graph.call_function(operators.seed, (None, number))
                result = graph.call_function(node.args[0], node.args[1:], node.kwargs)
            for user in list(node.users):
                assert user.target is operator.getitem
                if user.args[1] == 1:
                    result.meta = dict(user.meta)
                user.replace_all_uses_with((state, result)[user.args[1]])
                graph.erase_node(user)
        elif node.target is run_with_rng_state:
            state = as_node(node.args[0])
            with graph.inserting_before(node):
                result = graph.call_function(node.args[1], node.args[2:], node.kwargs)
            result.meta = {**node.meta, "val": _fake_result(result)}
            node.replace_all_uses_with(result)
        else:
            continue
        graph.erase_node(node)
        result.meta["rng_state"] = state
        state.meta["val"] = torch.empty(2, dtype=torch.int64, device="meta")


def _fake_result(node: Node) -> Any:
    """What a call yields for the fake tensors of its arguments."""
    values = pytree.tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    with detect_fake_mode(pytree.tree_leaves(values)) or nullcontext():
        return node.target(*values[0], **values[1])  # type: ignore[operator]
