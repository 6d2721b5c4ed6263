"""Intel's wheel beside other drivers: what the loader is shown, and why it may be missing."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from hetero.backends import opencl as backend
from hetero.opencl import platforms, vendors

if TYPE_CHECKING:
    from collections.abc import Callable


class Wheel:
    """An installed distribution whose files lie two levels above its metadata, as pip puts them."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.files = [PurePosixPath("../..", name) for name in names]
        self._metadata = folder / "python" / "site-packages"

    def locate_file(self, file: PurePosixPath) -> Path:
        return self._metadata / file


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Pretend that the wheel is installed."""
    monkeypatch.delenv("OCL_ICD_VENDORS", raising=False)
    monkeypatch.setenv("OPENCL_VENDOR_PATH", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()

    def install(*, loads: bool = True) -> Path:
        library = tmp_path / "libintelocl.so"
        library.touch()
        monkeypatch.setattr(vendors, "distribution", lambda _: Wheel(tmp_path, "cl.cfg", "libintelocl.so"))

        def load(path: str) -> None:
            assert path == str(library)
            if not loads:
                raise OSError("libimf.so: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", load)
        return library

    return install


def test_without_the_wheel_the_loader_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise vendors.PackageNotFoundError(name)

    monkeypatch.setattr(vendors, "distribution", missing)
    before = dict(os.environ)
    with vendors.shown_to_the_loader() as is_added:
        assert not is_added
        assert dict(os.environ) == before
    assert vendors.intel_absence() is None


def test_the_loader_sees_intels_library_beside_the_systems_drivers(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    library = install()
    (tmp_path / "system" / "nvidia.icd").write_text("libnvidia-opencl.so.1\n")
    (tmp_path / "system" / "broken.icd").write_text("/opt/nowhere/libnowhere.so\n")
    (tmp_path / "system" / "intel64.icd").write_text("/opt/intel/libintelocl.so\n")
    with vendors.shown_to_the_loader() as is_added:
        assert is_added
        folder = Path(os.environ["OCL_ICD_VENDORS"])
        shown = {file.name: file.read_text().strip() for file in folder.glob("*.icd")}
    assert shown == {"nvidia.icd": "libnvidia-opencl.so.1", "heteroq-intel-cpu.icd": str(library)}
    assert "OCL_ICD_VENDORS" not in os.environ
    assert not folder.exists()


def test_what_the_user_has_chosen_stays(
    install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = install()
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path / "system"))
    with vendors.shown_to_the_loader() as is_added:
        assert not is_added
        assert os.environ["OCL_ICD_VENDORS"] == str(tmp_path / "system")
    absence = vendors.intel_absence()
    assert absence is not None
    assert "leaves it out" in absence.reason
    (tmp_path / "system" / "mine.icd").write_text(f"{library}\n")
    assert vendors.intel_absence() is None


def test_a_wheel_without_its_libraries_is_an_absence_with_a_reason(install: Callable[..., Path]) -> None:
    install(loads=False)
    with vendors.shown_to_the_loader() as is_added:
        assert not is_added
    absence = vendors.intel_absence()
    assert absence is not None
    assert "libimf.so" in absence.reason
    assert "heteroq[intel-opencl]" in absence.remedy
    listed = backend.absence()
    assert listed is not None
    assert listed["reason"] == absence.reason or "no OpenCL" in listed["reason"]


class Platform:
    def __init__(self, name: str) -> None:
        self.name = name


class Loader:
    """pyopencl, with platforms in the order of the loader."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def get_platforms(self) -> list[Platform]:
        return [Platform(name) for name in self._names]


def _order(*names: str) -> list[str]:
    return [platform.name for platform in platforms._platforms(Loader(*names))]


def test_an_added_driver_renumbers_no_other(install: Callable[..., Path]) -> None:
    install()
    assert _order("Intel(R) OpenCL", "Portable Computing Language") == [
        "Portable Computing Language", "Intel(R) OpenCL",
    ]  # fmt: skip


def test_the_checker_is_a_device_only_where_it_is_alone(install: Callable[..., Path]) -> None:
    assert _order("Oclgrind", "Portable Computing Language") == ["Portable Computing Language"]
    assert _order("Oclgrind") == ["Oclgrind"]
