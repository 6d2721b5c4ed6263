"""From sources to programs: assemble, build, keep the binary on disk, explain failures."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero import cache
from hetero.opencl.errors import KernelBuildError
from hetero.opencl.platforms import opencl

if TYPE_CHECKING:
    from collections.abc import Mapping

_FOLDER = Path(__file__).parent / "kernels"
_GENERATED = "generated.cl"
_PLATFORM_OPTIONS = {
    # The library's sqrt is a call, the compiler's is one instruction.
    "Portable Computing Language": ("-DHAS_BUILTIN_SQRT=1",),
    # Oclgrind 21.10 dies of shuffles with undefined elements, which its optimizer makes of sums over vectors,
    # and takes what comes from a shuffle's second vector for uninitialised at random.
    "Oclgrind": ("-cl-opt-disable", "-DNO_SHUFFLES=1"),
}
# Platforms whose own cache on disk is enough. Asked for a binary, PoCL compiles every kernel for work-groups of any
# size, and at its first launch once more for the size that it has.
_CACHING_PLATFORMS = frozenset({"Portable Computing Language"})
_log = logging.getLogger(__name__)


def assemble(source: str, *, is_generated: bool, epilogue: str = "") -> tuple[str, str]:
    """The complete source text and the name it has in messages.

    common.cl stands in front of every source, before a gpu_*.cl gpu_common.cl; `#line` makes the compiler name the real
    file and line.

    Args:
        source: a file of `kernels/`, or the text itself.
        is_generated: whether it is the text.
        epilogue: generated code that the source calls.
    """
    name = _GENERATED if is_generated else source
    text = source if is_generated else (_FOLDER / source).read_text(encoding="utf-8")
    first = "gpu_common.cl" if name.startswith("gpu_") else "common.cl"
    common = (_FOLDER / first).read_text(encoding="utf-8")
    if epilogue:
        common += f'\n#line 1 "{_GENERATED}"\n{epilogue}'
    return f'#line 1 "{first}"\n{common}\n#line 1 "{name}"\n{text}\n', name


def build(context: Any, device: Any, text: str, name: str, defines: Mapping[str, int | float | str]) -> tuple[Any, str]:
    """A built program, and where it came from: `cache` if its binary was on disk, else `source`.

    Platforms with a cache of their own always get the source, and look there.

    Args:
        context: a context of the device.
        device: pyopencl device.
        text: complete source text.
        name: file name for messages.
        defines: build-time constants.

    Raises:
        KernelBuildError: the compiler refuses it.
    """
    cl = opencl()
    options = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    options += _PLATFORM_OPTIONS.get(device.platform.name, ())
    has_cache = device.platform.name in _CACHING_PLATFORMS
    path = _cache_path(device, text, options)
    binary = None if has_cache else _read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cl.CompilerWarning)
        try:
            if binary is not None:
                return cl.Program(context, [device], [binary]).build(cache_dir=False), "cache"
        except cl.Error as error:
            _log.info("the cached binary of %s is refused, building it again: %s", name, error)
        program = cl.Program(context, text)
        try:
            program.build(options, cache_dir=False)
        except cl.Error as error:
            raise _build_error(device, text, name, options, str(error)) from None
    if not has_cache:
        _write(path, program.get_info(cl.program_info.BINARIES)[0])
    return program, "source"


def _build_error(device: Any, text: str, name: str, options: list[str], log: str) -> KernelBuildError:
    """The error with the first place that the log names; a generated source comes with its lines numbered."""
    log = re.sub(r"([^\s:]+):(\d+)(?=:\d+:)", lambda place: _own_place(text, place[1], int(place[2])), log)
    lines = list(dict.fromkeys(line for line in log.splitlines() if re.search(r"\b(error|warning|note)\b", line)))
    place = re.search(r"([\w.]+\.cl):(\d+)", "\n".join(line for line in lines if "error" in line))
    file, line = (place[1], int(place[2])) if place else (name, 0)
    found = "\n".join(lines) or log
    if file == _GENERATED:
        own = text.split(f'#line 1 "{_GENERATED}"\n', 1)[1].split("#line 1 ", 1)[0]
        found += "\n" + "\n".join(f"{i:4d} {s}" for i, s in enumerate(own.splitlines(), 1))
    error = KernelBuildError(
        f"{file}:{line}: the kernel does not build for {device.name} (options: {' '.join(options) or 'none'})",
        found=found,
        remedy="a driver's compiler that refuses OpenCL C 1.2, or a fault of ours: report it with this message",
    )
    error.device, error.options, error.file, error.line = device.name, tuple(options), file, line
    return error


def _own_place(text: str, file: str, line: int) -> str:
    """`file:line` as our files have it; compilers that ignore `#line` count through, in a file of their own."""
    heads = re.findall(r'^#line 1 "(.+)"$', text, re.MULTILINE)
    if Path(file).name in heads:
        return f"{Path(file).name}:{line}"
    own, own_line = file, line
    for number, content in enumerate(text.splitlines()[: line - 1], 1):
        if content.startswith("#line 1 "):
            own, own_line = content.split('"')[1], line - number
    return f"{own}:{own_line}"


def _cache_path(device: Any, text: str, options: list[str]) -> Path:
    """Where the binary is kept: everything that it depends on is in the name."""
    driver = f"{device.platform.name}|{device.platform.version}|{device.version}|{device.driver_version}"
    key = "\0".join([text, *options, device.name, driver])
    return cache.folder() / "opencl" / f"{hashlib.sha256(key.encode()).hexdigest()}.bin"


def _read(path: Path) -> bytes | None:
    """A binary that is whole, else None. A driver may die of a truncated one, so the file begins with its SHA-256."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _write(path: Path, binary: bytes) -> None:
    """Written beside and renamed, so that a reader never sees half of it. A cache that can't be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(binary).digest() + binary)
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("no cache of OpenCL programs in %s: %s", path.parent, error)
