"""What can go wrong with OpenCL, as errors of the package."""

from __future__ import annotations

from hetero.errors import HeteroError


class NoOpenCLError(HeteroError):
    """No OpenCL platform, or no device on any platform."""


class OutOfDeviceMemory(HeteroError):  # noqa: N818 - says what happened, as torch.OutOfMemoryError does
    """A compiled graph or an allocation needs more than the device has, or than it allows in one piece."""


class DeviceLost(HeteroError):  # noqa: N818 - says what happened
    """A device has stopped working; what it was computing is lost, and so is every later call in this process."""


class OpenCLError(HeteroError):
    """A call failed; the message has the status by its name."""


class KernelBuildError(HeteroError):
    """A kernel did not compile.

    Attributes:
        device: the driver's name of the device.
        options: the options of the build.
        file: the .cl file of the first error.
        line: its line, 0 if the log names none.
    """

    device: str = ""
    options: tuple[str, ...] = ()
    file: str = ""
    line: int = 0


class Unsupported(HeteroError):  # noqa: N818 - not a fault: the caller takes another way
    """No hand-written kernel does this; the message is the reason."""


class UnsupportedOperationError(HeteroError):
    """An operation of a compiled module has no OpenCL kernel, and no fallback was allowed.

    Attributes:
        op: the ATen operation.
        module: path of the module that it belongs to, as torch.compile names it; empty if unknown.
    """

    def __init__(self, op: str, module: str, reason: str) -> None:
        super().__init__(
            f"aten.{op} can't run on OpenCL" + (f" (in {module})" if module else ""),
            found=reason,
            remedy='options={"fallback": "cpu"} of torch.compile lets such operations run on the host, and lists them',
        )
        self.op, self.module = op, module


class CompileError(HeteroError):
    """The backend refuses what it is to compile: a function that breaks the graph, unknown options, another device."""
