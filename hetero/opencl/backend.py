"""torch.compile for OpenCL devices: `torch.compile(module, backend="opencl", options={"device": "opencl:0"})`.

Options:
    device: name of an OpenCL device; `opencl:0` unless given.
    fallback: None, the default: an operation without kernel is an error. "cpu": it runs on the host, is logged, and is
        listed by `fallbacks`.
    memory: None, the default: on a device that shares the host's memory tensors are used where they lie. "copy": they
        are copied there and back at each call, as on any other device.

Nothing runs anywhere else in silence. A graph break or a function that torch.compile gives up compiling after too many
recompilations would leave parts to eager PyTorch: both are errors. At a graph break in a loop or a `try` TorchDynamo
gives up the whole function without asking the backend, so importing this module wraps where it converts functions: for
this backend, as with `torch._dynamo.error_on_graph_break`; others never notice. For recompilations there is only a
switch of torch._dynamo for all backends of the process (`fail_on_recompile_limit_hit`); set when this backend first
compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
import types
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import convert_frame
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hetero.errors import HeteroError
from hetero.opencl.decompositions import decompositions
from hetero.opencl.errors import CompileError, UnsupportedOperationError
from hetero.opencl.graph import CompiledGraph, fallbacks, memory_plans
from hetero.opencl.program import open_device
from hetero.opencl.rewrites import keep_attention_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.fx import GraphModule

__all__ = ["CompiledModule", "Options", "compile_module", "fallbacks", "opencl"]

_ALL = 1 << 30


@dataclass(frozen=True)
class Options:
    """Options of the backend, checked."""

    device: str
    fallback: str | None
    memory: str | None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Check what the user passed.

        Raises:
            CompileError: an unknown option or value.
        """
        given = dict(options or {})
        device = given.pop("device", "opencl:0")
        fallback, memory = given.pop("fallback", None), given.pop("memory", None)
        if given:
            raise CompileError(
                "unknown options of the opencl backend",
                found=", ".join(map(repr, given)),
                expected="device, fallback, memory",
            )
        if not isinstance(device, str) or fallback not in (None, "cpu") or memory not in (None, "copy"):
            raise CompileError(
                "bad options of the opencl backend",
                found=f"device={device!r}, fallback={fallback!r}, memory={memory!r}",
                expected='a device name as in "opencl:0.1"; None or "cpu"; None or "copy"',
            )
        return cls(device, fallback, memory)


def opencl(
    gm: GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    owner: str = "",
) -> Callable[..., Any]:
    """The backend function: compiles one graph of TorchDynamo with AOTAutograd for an OpenCL device.

    `owner` names who the graph's fallbacks are listed for; torch.compile doesn't pass it.

    Raises:
        CompileError: unknown options, tensors on another device. A graph break is one too, before this is called.
        UnsupportedOperationError: an operation without kernel, and no fallback; for the backward pass at its first run.
        DeviceError: no such device.
    """
    checked = Options.parse(options)
    if mode not in (None, "default"):
        raise CompileError("the opencl backend has no modes", found=repr(mode), remedy="leave mode out")
    fail_on_recompile_limit()
    for tensor in inputs:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            raise CompileError("the opencl backend takes tensors of the host", found=f"a tensor on {tensor.device}")
    with unset_fake_temporarily():
        device = open_device(checked.device)

    settings: dict[str, Any] = {"fallback": checked.fallback, "copies": checked.memory == "copy", "owner": owner}

    def forward(graph: GraphModule, _: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
        context = TracingContext.try_get()
        metadata = context.fw_metadata if context is not None else None
        n_user = _ALL if metadata is None else metadata.num_forward
        if metadata is not None:
            metadata.bw_donated_idxs = []  # nothing is donated, see below; the unset value counts as something
        return CompiledGraph(graph, device, n_user_outputs=n_user, is_backward=False, **settings)

    def backward(graph: GraphModule, _: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
        return CompiledGraph(graph, device, n_user_outputs=_ALL, is_backward=True, **settings)

    def inference(graph: GraphModule, _: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
        return CompiledGraph(graph, device, n_user_outputs=_ALL, is_backward=False, **settings)

    keep_attention_whole(gm)
    # Donated buffers would save nothing here, saved tensors lie in the slab, and they forbid retain_graph.
    with torch._functorch.config.patch(donated_buffer=False):
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=forward, bw_compiler=backward, inference_compiler=inference, decompositions=decompositions()
        )(gm, inputs)
    return compiled


_OURS: list[Any] = [opencl]


def never_eager(backend: Any) -> Any:
    """Register a backend function for which TorchDynamo must leave nothing to eager PyTorch; used as a decorator."""
    _OURS.append(backend)
    return backend


def _is_ours(convert: Any) -> bool:
    """Whether an object that converts functions does it for this backend, behind any number of wrappers."""
    backend: Any = getattr(convert, "_torchdynamo_orig_backend", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    backend = getattr(backend, "compiler_fn", backend)
    backend = getattr(backend, "func", backend)
    return any(backend is ours for ours in _OURS)  # others' backends may be unhashable


def _forbid_graph_breaks() -> None:
    """Make TorchDynamo raise at graph breaks where it converts a function for this backend.

    Raises:
        CompileError: this version of torch converts functions elsewhere.
    """
    try:
        is_known = _is_ours(convert_frame.ConvertFrame(opencl, convert_frame.Hooks()))
        original, strict = convert_frame.ConvertFrame.__call__, torch._dynamo.error_on_graph_break
    except (AttributeError, TypeError):
        is_known = False
    if not is_known:
        raise CompileError(
            "with this version of torch, graph breaks can't be made errors",
            found=f"torch {torch.__version__}, without torch._dynamo.convert_frame.ConvertFrame as it was in 2.13",
            remedy="install the version in constraints.txt",
        )

    @functools.wraps(original)
    def convert(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, *args, **kwargs)
        try:
            with strict(True):
                return original(self, *args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            raise _broken(str(error).strip()) from None

    convert_frame.ConvertFrame.__call__ = convert


def _logging_functions() -> set[Any]:
    """Methods of loggers, with those that libraries add, as Hugging Face's `warning_once`."""
    names = ("debug", "info", "warning", "warning_advice", "warning_once", "error", "info_once")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


def _tell_plainly() -> None:
    """Raise this backend's errors as they are, and don't let warnings break its graphs.

    nn.TransformerEncoderLayer warns of masks of two types, for example. A warning of the compiled function is given
    after the call; TorchDynamo leaves out those of functions it inlines, and what is logged. Every conversion comes
    through here, with `fullgraph=True` and without.
    """
    original = convert_frame.ConvertFrameAssert.__call__
    config = torch._dynamo.config

    @functools.wraps(original)
    def convert(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, *args, **kwargs)
        warns = {*config.reorderable_logging_functions, warnings.warn}
        logs = {*config.ignore_logging_functions, *_logging_functions()}
        try:
            with config.patch(reorderable_logging_functions=warns, ignore_logging_functions=logs):
                return original(self, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, HeteroError):
                raise error.inner_exception from None
            raise

    convert_frame.ConvertFrameAssert.__call__ = convert


def _broken(found: str) -> HeteroError:
    """What a graph break is told as: of sparse tensors as of any operation without kernel."""
    if "sparse" in found.splitlines()[0].lower():
        return UnsupportedOperationError("sparse", "", f"TorchDynamo captures no sparse tensors: {found}")
    return CompileError(
        "torch.compile broke the graph; parts of it would run on the host",
        found=found,
        remedy="change the code there; where sizes depend on data, torch.where(x > 0, x, 0) instead of x[x > 0]",
    )


_forbid_graph_breaks()
_tell_plainly()


def fail_on_recompile_limit() -> None:
    """Make TorchDynamo raise at its recompile limit instead of running eagerly, in all threads.

    Setting the option as documented would hold for the calling thread only: its values are context variables, while its
    default is shared.
    """
    config = torch._dynamo.config
    config._config["fail_on_recompile_limit_hit"].default = True


# --- modules, compiled one by one -------------------------------------------------------------------------------------

_entries: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}
_entries_lock = threading.Lock()
_entry_numbers = itertools.count()


def compile_module(
    module: torch.nn.Module, device: str, fallback: str | None = None, memory: str | None = None
) -> CompiledModule:
    """A module compiled for a device; called like it: (x, context) -> y, differentiable, from any thread.

    TorchDynamo counts recompilations by code object. So every structure of module and geometry of call gets an entry
    function with a code object of its own: different modules never add up to the limit, and modules of equal structure
    share their compiled graphs, whatever their weights.

    Args:
        module: called module(x, context).
        device: name of an OpenCL device.
        fallback: see the backend's options.
        memory: see the backend's options.
    """
    return CompiledModule(module, Options.parse({"device": device, "fallback": fallback, "memory": memory}))


class CompiledModule:
    """What `compile_module` returns.

    Attributes:
        module: the module itself; its weights are used where they are, at every call.
        device: name of the device.
        structure: text that is equal for modules sharing compiled graphs.
    """

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        self.module = module
        self.device = options.device
        self._options = options
        self.structure = structure(module)

    def __call__(self, x: torch.Tensor, context: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """module(x, context) on the device.

        Raises:
            UnsupportedOperationError: see `opencl`.
            CompileError: see `opencl`.
        """
        extra = () if context is None else tuple((name, *_geometry(t)) for name, t in context.items())
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.module.training, context is None)
        key = (self.structure, self._options, mode, _geometry(x), extra)
        entry = _entries.get(key)
        if entry is None:
            entry = self._compile(key)
        return entry(self.module, x, context)

    def memory_bytes(self) -> tuple[int, int]:
        """What a call in flight keeps, and what all calls share in turn [B]: the most of all graphs so far.

        Known when a graph is compiled, before its first launch.
        """
        plans = memory_plans(self)
        call = max((plan.slab_bytes + plan.output_bytes for plan in plans), default=0)
        return call, max((plan.arena_bytes + plan.constant_bytes for plan in plans), default=0)

    def _compile(self, key: tuple[Any, ...]) -> Callable[..., torch.Tensor]:
        with _entries_lock:
            if key not in _entries:
                code = _entry.__code__.replace(co_name=f"opencl_entry_{next(_entry_numbers)}")
                function = types.FunctionType(code, globals())
                options = dataclasses.asdict(self._options)
                backend = functools.partial(opencl, owner=self.structure)
                _entries[key] = torch.compile(function, backend=backend, fullgraph=True, dynamic=False, options=options)
            return _entries[key]


def structure(module: torch.nn.Module) -> str:
    """A text that is equal for modules of equal structure: classes, settings, shapes; not the values of weights.

    It only has to tell apart what is often compiled in one process: TorchDynamo's guards check the rest.
    """
    lines = []
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str, tuple))}
        tensors = {**part._parameters, **part._buffers}
        shapes = {k: None if t is None else (tuple(t.shape), t.dtype, t.requires_grad) for k, t in tensors.items()}
        kind = type(part)
        lines.append(f"{name}: {kind.__module__}.{kind.__qualname__} {settings} {shapes}")
    return "\n".join(lines)


def _entry(module: torch.nn.Module, x: torch.Tensor, context: Any) -> torch.Tensor:
    result: torch.Tensor = module(x, context)
    return result


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
