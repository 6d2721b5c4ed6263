"""Drivers that the OpenCL loader doesn't find by itself: Intel's CPU runtime from its wheel.

The loader reads a folder of .icd files, each with the path of a driver's library, when platforms are first asked for.
The wheel `intel-opencl-rt` has such a file, but in a folder that no loader reads, and with the path of a machine of
Intel's. So the loader is shown a folder made for that moment: links to the system's .icd files, and one with the path
where pip has put the library. What wheels of drivers place beside pyopencl (PoCL's does) the loader adds itself.

A user who sets OCL_ICD_VENDORS has chosen the drivers: then nothing is added.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from hetero.device import Absence

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHOICE = "OCL_ICD_VENDORS"
_WHEEL, _LIBRARY = "intel-opencl-rt", "libintelocl.so"
_REMEDY = "pip install 'heteroq[intel-opencl]': it brings intel-cmplr-lib-rt, which Intel's wheel doesn't ask for"


def intel_library() -> Path | None:
    """The library of Intel's CPU runtime, where pip installed it; None where it didn't."""
    try:
        wheel = distribution(_WHEEL)
    except PackageNotFoundError:
        return None
    return _file(wheel, _LIBRARY)


def _file(wheel: Distribution, name: str) -> Path | None:
    found = next((file for file in wheel.files or () if file.name == name), None)
    return None if found is None else Path(str(wheel.locate_file(found))).resolve()


def intel_absence() -> Absence | None:
    """Why Intel's runtime can't be used although its wheel is installed; None if it can, or isn't."""
    library = intel_library()
    if library is None:
        return None
    if os.environ.get(_CHOICE) and not _is_listed(library):
        reason = f"Intel's CPU runtime is installed, but {_CHOICE}={os.environ[_CHOICE]} leaves it out"
        return Absence("opencl", reason, f"unset {_CHOICE}, or let it name a folder with an .icd file for {library}")
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return Absence("opencl", f"Intel's CPU runtime is installed, but does not load: {error}", _REMEDY)
    return None


def _is_listed(library: Path) -> bool:
    """Whether the user's own choice of drivers has the library."""
    chosen = Path(os.environ[_CHOICE])
    files = [file for file in (chosen.iterdir() if chosen.is_dir() else [chosen]) if file.suffix == ".icd"]
    return library in (chosen.resolve(), *(Path(_content(file)).resolve() for file in files))


@contextmanager
def shown_to_the_loader() -> Iterator[bool]:
    """Let the loader see Intel's library while platforms are first asked for; yields whether that was necessary.

    Raises:
        OSError: there is no place for temporary files.
    """
    library = intel_library()
    if library is None or os.environ.get(_CHOICE) or intel_absence() is not None:
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="heteroq-vendors-") as folder:
        for file in _system_files():
            (Path(folder) / file.name).symlink_to(file)
        (Path(folder) / "heteroq-intel-cpu.icd").write_text(str(library), encoding="utf-8")
        os.environ[_CHOICE] = folder
        try:
            yield True
        finally:
            del os.environ[_CHOICE]  # unset, or empty, which is the same to the loader


def _system_files() -> list[Path]:
    """The .icd files that the loader reads without our doing, and conda's; without those that name no library."""
    system = Path(os.environ.get("OPENCL_VENDOR_PATH") or "/etc/OpenCL/vendors")
    files: dict[str, Path] = {}
    for folder in (system, Path(sys.prefix) / "etc/OpenCL/vendors"):
        for file in sorted(folder.glob("*.icd")):
            content = _content(file)
            if Path(content).name != _LIBRARY and (not content.startswith("/") or Path(content).exists()):
                files.setdefault(file.name, file.resolve())
    return list(files.values())


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
