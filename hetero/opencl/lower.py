"""ATen graph -> plan: launches over views of roots, with every layout decided.

Nodes are taken in order. A view operation only makes a new `View`. An elementwise operation is remembered (`Pointwise`)
and computed when something else needs it stored, with all that it reads and nobody has stored yet: `fuse.build`. A hot
operation maps to a hand-written kernel (handlers/); those that can add a residual are remembered as well
(`Deferred`), so that a following addition goes into the kernel. Whether a kernel takes an operation is asked before
anything is remembered, so nothing ever has to be undone.

What can't be lowered is an error, or with `fallback="cpu"` a step that runs on the host, in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from hetero.opencl.c_source import require_stored_types
from hetero.opencl.errors import Unsupported, UnsupportedOperationError
from hetero.opencl.expressions import expression
from hetero.opencl.fuse import MAX_OPERATIONS, Misfit, build, is_dense_cover
from hetero.opencl.fuse_epilogue import build_epilogue
from hetero.opencl.fuse_reduction import Reduction, build_reduction
from hetero.opencl.ir import Launch, Root, View, vector
from hetero.opencl.pointwise import Operand, Pointwise
from hetero.opencl.rules import RULES
from hetero.opencl.seeds import seed_root
from hetero.opencl.steps import (
    VIEW_OPS,
    Deferred,
    HostStep,
    Lowered,
    Step,
    Target,
    bound_arguments,
    module_path,
    operation_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

aten = torch.ops.aten

Builder = Callable[..., tuple[list[Launch], list[Root]]]
"""(what is pending, ...) -> launches, and the roots that are not pending any more."""


class Lowering:
    """State of lowering one graph.

    Args:
        graph: functional ATen graph.
        values: what each node yields: (fake) tensors with concrete sizes, numbers, tuples of these.
        n_user_outputs: that many first outputs go to the caller; the others are saved for the backward pass.
        is_backward: outputs are gradients, which must not share memory.
        target: of the device.
        fallback: None or "cpu".
    """

    def __init__(
        self,
        graph: Graph,
        values: Mapping[Node, Any],
        *,
        n_user_outputs: int,
        is_backward: bool,
        target: Target,
        fallback: str | None,
    ) -> None:
        self.values = values
        self.steps: list[Step] = []
        self._graph, self.target, self._fallback = graph, target, fallback
        self._n_user_outputs, self._is_backward = n_user_outputs, is_backward
        self._views: dict[Node, Any] = {}
        self._pointwise: dict[Root, Pointwise] = {}
        self._deferred: dict[Root, Deferred] = {}
        self._inputs: dict[Node, View | None] = {}
        self._seed: Root | None = None
        self._n_streams = 0

    # --- for the handlers of operations -------------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        """The (fake) tensor or number of an argument."""
        return self.values[node] if isinstance(node, Node) else node

    def read(self, node: Node) -> View:
        """The view of a node, computed and stored."""
        view: View = self._views[node]
        self.store(view.root)
        return view

    def peek(self, node: Node) -> View:
        """The view of a node, whether it is stored yet or not."""
        view: View = self._views[node]
        return view

    def new(self, like: torch.Tensor, name: str) -> View:
        """A view of a new root with the layout of a (fake) tensor."""
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        root = Root("scratch", extent * like.dtype.itemsize, name)
        return View(root, 0, tuple(like.shape), tuple(like.stride()), like.dtype)

    def scratch(self, nbytes: int, name: str) -> View:
        """A new float32 vector for a kernel's own use."""
        return vector(Root("scratch", nbytes, name))

    def define(self, node: Node, views: Any) -> None:
        """Set what a node yields."""
        self._views[node] = views

    def emit(self, launches: Iterable[Launch]) -> None:
        """Append launches."""
        self.steps.extend(launches)

    def contiguous(self, view: View) -> View:
        """A contiguous copy of a view."""
        out = self._dense(view)
        self.copy(view, out, op="clone")
        return out

    def defer(self, deferred: Deferred) -> None:
        """Remember a kernel until one of its outputs is needed."""
        deferred.emit(deferred.outputs, None, None)  # raises Unsupported now rather than later
        deferred.stored = list(deferred.outputs)
        for view in deferred.outputs:
            self._deferred[view.root] = deferred

    def deferred(self, root: Root) -> Deferred | None:
        """The kernel that will write a root, if it is not emitted yet."""
        return self._deferred.get(root)

    def is_expression(self, root: Root) -> bool:
        """Whether a root is elementwise and not stored yet: what reads it can compute it."""
        return root in self._pointwise

    def readers(self, node: Node) -> set[Node]:
        """All nodes that read what a node yields, looking through views."""
        found: set[Node] = set()
        for user in node.users:
            if user.target in VIEW_OPS or user.target is operator.getitem:
                found |= self.readers(user)
            else:
                found.add(user)
        return found

    def copy(self, source: View, stored: View, *, op: str, reader: Node | None = None) -> None:
        """Write a view (broadcast) into another place, on behalf of a node; fuses with what computes the source."""
        require_stored_types(source.dtype, stored.dtype, fp16=self.target.fp16)
        if stored.numel:
            out = self._dense(stored)
            self._remember(Pointwise(op, out, "{0}", (source,), (source.dtype,), source.dtype, stored, key=reader))
            self.store(out.root)

    def fill(self, stored: View, value: float | int, *, op: str) -> None:
        """Write one number into a view."""
        require_stored_types(stored.dtype, fp16=self.target.fp16)
        if stored.numel:
            out = self._dense(stored)
            self._remember(Pointwise(op, out, "{0}", (value,), (stored.dtype,), stored.dtype, stored))
            self.store(out.root)

    def random_stream(self, node: Node) -> tuple[View, int]:
        """Where a random operation finds its seed, (2,) int64, and what it adds to the seed's stream.

        A call draws one seed for all, and each operation has a stream of its own. One that is computed again in the
        backward pass (handlers/random.py) has the state of the first time, and adds nothing.
        """
        state = node.meta.get("rng_state")
        if state is not None:
            return self.read(state), 0
        self._seed = self._seed or seed_root()
        self._n_streams += 1
        return View(self._seed, 0, (2,), (1,), torch.int64), self._n_streams

    def pointwise(
        self, node: Node, template: str, operands: Sequence[Operand], types: Sequence[torch.dtype], result: torch.dtype
    ) -> None:
        """Remember an elementwise operation as what a node yields."""
        readers, name = frozenset(self.readers(node)), operation_name(node)
        out = self.expression(name, self.values[node], template, operands, types, result, readers=readers, key=node)
        self._views[node] = out
        pending = self._pointwise.get(out.root)
        if pending is not None and pending.reads & self._deferred.keys() and all(r.op == "output" for r in readers):
            self.store(out.root)  # as `defer` in handlers/registry.py: what the product reads can be given up

    def expression(
        self,
        name: str,
        like: torch.Tensor,
        template: str,
        operands: Sequence[Operand],
        types: Sequence[torch.dtype],
        result: torch.dtype,
        *,
        readers: frozenset[Any],
        key: Any,
    ) -> View:
        """Remember an elementwise operation that is a part of what a node yields: see `Pointwise`."""
        dtypes = [operand.dtype for operand in operands if isinstance(operand, View)]
        require_stored_types(like.dtype, *dtypes, fp16=self.target.fp16)
        if like.numel() and not is_dense_cover(like.shape, like.stride(), like.numel()):
            raise Unsupported("an elementwise result with gaps")
        out = self.new(like, name)
        if like.numel():
            self._remember(Pointwise(name, out, template, tuple(operands), tuple(types), result, out, readers, key))
        return out

    def store(self, root: Root) -> None:
        """Emit what computes a root, if that has not been done."""
        deferred = self._deferred.get(root)
        if deferred is not None:
            for view in deferred.outputs:
                self._deferred.pop(view.root, None)
            self.emit(deferred.emit(deferred.stored, None, None))
            return
        primary = self._pointwise.get(root)
        if primary is None:
            return
        self._emit_fused(lambda: self._builder(primary))

    def _builder(self, primary: Pointwise) -> Builder:
        """What stores an expression: a kernel that was put off for it, or a kernel of its own."""
        products = [root for root in self._deferred if root in primary.reads]
        for root in products[:-1]:
            self.store(root)
        if not products:
            return partial(build, primary)
        return partial(build_epilogue, primary, self._deferred[products[-1]])

    def reduce(self, reduction: Reduction) -> None:
        """Emit a reduction, with everything pending that it reads."""
        source = reduction.source.operands[0]
        assert isinstance(source, View)
        pending = self._pointwise.get(source.root)
        reads = {source.root} if pending is None else pending.reads
        if pending is not None and len(pending.readers) > 1 and reads & self._deferred.keys():
            self.store(source.root)  # it is stored anyway: better with the product that it reads
        for root in [root for root in self._deferred if root in reads]:
            self.store(root)
        self._emit_fused(lambda: partial(build_reduction, reduction))

    def _emit_fused(self, choose: Callable[[], Builder]) -> None:
        while True:
            try:
                launches, done = choose()(
                    self._pointwise, is_gpu=self.target.kind == "gpu", compute_units=self.target.compute_units
                )
                break
            except Misfit as misfit:
                self.store(misfit.root)  # never the expression's own: it fits its own layout
        for root in done:
            self._pointwise.pop(root, None)
            self._deferred.pop(root, None)
        self.emit(launches)

    # --- the walk -----------------------------------------------------------------------------------------------------

    def run(self, handlers: Mapping[Any, Callable[[Lowering, Node], None]]) -> Lowered:
        """Lower the graph.

        Args:
            handlers: of operations that are neither views nor elementwise.

        Raises:
            UnsupportedOperationError: an operation that can't be lowered, without fallback.
        """
        outputs: tuple[Any, ...] = ()
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._constant(node, _attribute(self._graph.owning_module, str(node.target)))
            elif node.op == "output":
                outputs = tuple(node.args[0])
            elif not isinstance(self.values[node], (int, float, bool)) and (node.users or not _is_pure(node)):
                self._call(node, handlers)
        views, is_input = self._finish(outputs)
        return Lowered(tuple(self.steps), tuple(self._inputs.values()), views, is_input, self._seed)

    def _placeholder(self, node: Node) -> None:
        value, index = self.values[node], len(self._inputs)
        if not isinstance(value, torch.Tensor):
            self._inputs[node] = None
            return
        view = self.new(value, str(node))
        view.root.kind, view.root.index = "input", index
        self._views[node] = self._inputs[node] = view

    def _constant(self, node: Node, tensor: torch.Tensor) -> None:
        like = self.values[node]  # views of it have its strides
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype).copy_(tensor.detach())
        root = Root("constant", tensor.numel() * tensor.itemsize, str(node), tensor=tensor)
        self._views[node] = View(root, 0, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def _call(self, node: Node, handlers: Mapping[Any, Callable[[Lowering, Node], None]]) -> None:
        if node.target is operator.getitem:
            self._views[node] = self._views[node.args[0]][node.args[1]]  # type: ignore[index]
        elif node.target in VIEW_OPS:
            self._view(node)
        else:
            try:
                self._compute(node, handlers)
            except Unsupported as reason:
                self._host(node, reason)

    def _view(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        base, like = self._views[source], self.values[source]

        def moved(value: torch.Tensor) -> View:
            offset = base.offset + int(value.storage_offset()) - int(like.storage_offset())
            return View(base.root, offset, tuple(value.shape), tuple(value.stride()), base.dtype)

        self._views[node] = pytree.tree_map(moved, self.values[node])

    def _compute(self, node: Node, handlers: Mapping[Any, Callable[[Lowering, Node], None]]) -> None:
        rule = RULES.get(node.target)
        if rule is not None:
            if not self._add_to_deferred(node):
                arguments = bound_arguments(node)
                self._elementwise(node, arguments, {k: self.value(v) for k, v in arguments.items()})
            return
        handler = handlers.get(node.target)
        if handler is None:
            raise Unsupported("there is no kernel for it")
        leaves = [v for v in pytree.tree_leaves(self.values[node]) if isinstance(v, torch.Tensor)]
        if leaves and all(v.numel() == 0 for v in leaves):
            self._views[node] = pytree.tree_map_only(torch.Tensor, lambda v: self.new(v, str(node)), self.values[node])
            return
        handler(self, node)

    def _elementwise(self, node: Node, arguments: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        result = expression(RULES[node.target], arguments, values)
        operands = [
            self._views[o] if isinstance(o, Node) and o in self._views else self.value(o) for o in result.operands
        ]
        self.pointwise(node, result.template, operands, result.types, result.result_type)

    def _remember(self, pointwise: Pointwise) -> None:
        """Make it pending; what it reads is stored first if that isn't an expression or the whole gets too long."""
        views = [operand for operand in pointwise.operands if isinstance(operand, View)]
        for view in views:
            deferred = self._deferred.get(view.root)
            if deferred is not None and not deferred.takes_epilogue:
                self.store(view.root)
        pending = [self._pointwise[view.root] for view in views if view.root in self._pointwise]
        roots = {view.root for view in views}.union(*(p.reads for p in pending))
        roots &= self._pointwise.keys() | self._deferred.keys()
        if len(roots) >= MAX_OPERATIONS:
            for p in pending:
                self.store(p.out.root)
            roots = {view.root for view in views} & self._deferred.keys()
        pointwise.reads = frozenset(roots)
        self._pointwise[pointwise.out.root] = pointwise

    def _add_to_deferred(self, node: Node) -> bool:
        """Whether an addition became the residual of the kernel that computes one of its operands."""
        if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            return False
        value = self.values[node]
        if value.dtype != torch.float32 or not value.is_contiguous():
            return False
        for own, other in (node.args, node.args[::-1]):
            if not (isinstance(own, Node) and isinstance(other, Node)) or own is other:
                continue
            if own not in self._views or other not in self._views:
                continue
            view = self._views[own]
            deferred = self._deferred.get(view.root)
            if deferred is None or deferred.residual < 0 or len(self.readers_of(own)) != 1:
                continue
            target = deferred.outputs[deferred.residual]
            rest = self._views[other]
            is_alike = all(
                v.is_contiguous and v.numel == value.numel() and v.dtype == value.dtype for v in (view, rest)
            )
            if target.root is not view.root or not is_alike or not target.is_contiguous or rest.root is view.root:
                continue
            return self._with_residual(node, deferred, self.read(other))
        return False

    def readers_of(self, node: Node) -> set[Node]:
        """Readers of everything that shares memory with a node: of the node that its views start from."""
        while node.target in VIEW_OPS:
            assert isinstance(node.args[0], Node)
            node = node.args[0]
        return self.readers(node)

    def _with_residual(self, node: Node, deferred: Deferred, rest: View) -> bool:
        at, emit = deferred.residual, deferred.emit
        target = deferred.outputs[at]
        residual = View(rest.root, rest.offset, target.shape, target.strides, rest.dtype)
        out = self.new(self.values[node], str(node))
        place = View(out.root, 0, target.shape, target.strides, out.dtype)
        outputs = [*deferred.outputs[:at], place, *deferred.outputs[at + 1 :]]
        try:
            emit(outputs, residual, None)
        except Unsupported:
            return False
        del self._deferred[target.root]
        self._views[node] = out
        self.defer(
            Deferred(
                outputs,
                lambda stored, _, epilogue: emit(stored, residual, epilogue),
                takes_epilogue=deferred.takes_epilogue,
                readers=frozenset(self.readers(node)),
            )
        )
        return True

    def _dense(self, view: View) -> View:
        """A new root's contiguous view of the same shape."""
        strides: list[int] = []
        expected = 1
        for n in reversed(view.shape):
            strides.insert(0, expected)
            expected *= n
        root = Root("scratch", expected * view.dtype.itemsize, view.root.name)
        return View(root, 0, view.shape, tuple(strides), view.dtype)

    def _host(self, node: Node, reason: Unsupported) -> None:
        module = module_path(node)
        if self._fallback != "cpu" or "rng_state" in node.meta:  # the host can't repeat what it drew
            raise UnsupportedOperationError(operation_name(node), module, str(reason.message))
        results = [v for v in pytree.tree_leaves(self.values[node]) if isinstance(v, torch.Tensor)]
        if any(result.layout != torch.strided for result in results):
            message = "it yields a sparse tensor, for which there is no fallback either"
            raise UnsupportedOperationError(operation_name(node), module, message)
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Node) and leaf in self._views]
        numbers = [self.value(leaf) for leaf in leaves]
        is_multiple = not isinstance(self.values[node], torch.Tensor)
        outputs = pytree.tree_map_only(torch.Tensor, lambda v: self.new(v, str(node)), self.values[node])

        def call(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            it = iter(tensors)
            filled = [next(it) if leaf in self._views else number for leaf, number in places]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            return [r for r in result if isinstance(r, torch.Tensor)] if is_multiple else [result]

        places = [
            (leaf if isinstance(leaf, Node) else None, number) for leaf, number in zip(leaves, numbers, strict=True)
        ]
        views = tuple(self.read(leaf) for leaf in inputs)
        written = tuple(v for v in pytree.tree_leaves(outputs) if isinstance(v, View))
        self._views[node] = outputs
        self.steps.append(HostStep(operation_name(node), module, call, views, written))

    # --- outputs ------------------------------------------------------------------------------------------------------

    def _finish(self, outputs: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Views of the outputs, their roots marked `output` or `saved`."""
        views: list[Any] = []
        is_input: list[int] = []
        gradients: dict[Root, Node] = {}
        positions = {node: i for i, node in enumerate(self._inputs)}
        for i, node in enumerate(outputs):
            is_input.append(positions.get(node, -1))
            if not isinstance(node, Node) or node not in self._views:
                views.append(self.value(node))
                continue
            view = self.read(node)
            if self._is_backward and view.root.kind != "input" and gradients.setdefault(view.root, node) is not node:
                view = self.contiguous(view)  # in-place accumulation into one must not change the other
            if view.root.kind == "scratch":
                view.root.kind = "output" if i < self._n_user_outputs else "saved"
            views.append(view)
        return tuple(views), tuple(is_input)


def _is_pure(node: Node) -> bool:
    return not node.is_impure()


def _attribute(module: Any, path: str) -> torch.Tensor:
    for part in path.split("."):
        module = getattr(module, part)
    assert isinstance(module, torch.Tensor)
    return module
