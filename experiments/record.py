"""A run's folder: one process at a time, JSON that is whole or absent, metrics appended a line a write.

OUT/  config.yaml  environment.json  tuning.json  summary.json  report.html
OUT/arms/<arm>/  plan.json  predicted_trace.json
OUT/arms/<arm>/seed-<k>/  metrics.jsonl  timings.jsonl  trace.json  checkpoints/  status.json
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import ConfigError, RunFailedError, RunFolderBusyError, RunFolderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_LOCK = ".lock"
_BEFORE_CONFIG = (_LOCK, "environment.json")  # a run begins with its config.yaml, written after these
_BEFORE_TRAINING = (*_BEFORE_CONFIG, "config.yaml", "sweep.json", "tuning.json", "arms")
_VERSIONS = (
    "heteroq",
    "torch",
    "numpy",
    "scipy",
    "pennylane",
    "qiskit",
    "qiskit-aer",
    "pyopencl",
    "pocl-binary-distribution",
)


def new_folder(name: str, root: Path) -> Path:
    """Make `root/<name>-<time>-<random>`; two runs of the same second get different folders."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = root / f"{name}-{stamp}-{secrets.token_hex(3)}"
    return make_folder(folder)


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it.

    Raises:
        RunFolderError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "choose another folder with --out DIR"
        raise RunFolderError(f"can't make the run folder {folder}: {error.strerror}", remedy=remedy) from None
    return folder


def refuse_used(folder: Path) -> None:
    """Raise unless nothing of a run, or of anything else, is in the folder.

    Raises:
        RunFolderError: says whether the run there is finished, and how to go on.
    """
    if any((folder / name).exists() for name in ("summary.json", "table.json")):
        raise RunFolderError(
            f"{folder} already holds a finished run",
            remedy=f"look at it with: heteroq report {folder}; or choose another folder with --out DIR",
        )
    if (folder / "config.yaml").exists():
        raise RunFolderError(
            f"{folder} already holds an unfinished run",
            remedy=f"go on with: heteroq run --resume {folder}; or choose another folder with --out DIR",
        )
    others = [entry.name for entry in folder.iterdir() if entry.name not in _BEFORE_CONFIG]
    given = folder / "arms"  # a run that was given plans and was killed before its config.yaml leaves these alone
    if others == ["arms"] and all(path.name == "plan.json" for path in given.rglob("*") if path.is_file()):
        shutil.rmtree(given)
    elif others:
        shown = ", ".join(sorted(others)[:3])
        raise RunFolderError(f"{folder} is not empty", found=shown, remedy="choose another folder with --out DIR")


def refuse_other(file: Path, found: Mapping[str, Any], expected: Mapping[str, Any], *, remedy: str) -> None:
    """Refuse a record that was made for other settings than those of now.

    Raises:
        RunFolderError: names the keys that differ, with both values.
    """
    keys = [key for key in dict.fromkeys([*expected, *found]) if found.get(key) != expected.get(key)]
    if keys:
        raise RunFolderError(
            f"{file} was made for another configuration: {', '.join(keys)}",
            found="; ".join(f"{key}={found.get(key)!r}" for key in keys),
            expected="; ".join(f"{key}={expected.get(key)!r}" for key in keys),
            remedy=remedy,
        )


@contextlib.contextmanager
def undone_if_refused(folder: Path) -> Iterator[None]:
    """Empty the folder when the user's mistake comes to light inside, so that the corrected command can use it.

    Nothing is removed once a training has begun, nor what no run writes.
    """
    try:
        yield
    except ConfigError as error:
        if error.exit_code == ConfigError.exit_code and not any(folder.glob("**/seed-*")):
            for path in (folder / name for name in _BEFORE_TRAINING):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not ours alone
                folder.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder; the lock ends with the process, however that ends.

    Raises:
        RunFolderBusyError: another process works there; says which.
    """
    path = folder / _LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunFolderError(f"can't write to {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise RunFolderBusyError(
                f"{folder} is in use by process {pid}",
                remedy="wait for it, stop it, or choose another folder with --out DIR",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Raises:
        RunFailedError: no space, no permission; an older file of that name is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    data = text.encode()
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFailedError(f"can't write {path} ({len(data)} bytes): {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Write JSON as `write_text` does; numbers have to be finite."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a file of a run folder.

    Raises:
        RunFolderError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RunFolderError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}", remedy="delete it, then resume the run") from None


def finished_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        RunFolderError: there is no run, or it isn't finished.
    """
    file = folder / "summary.json"
    if not file.exists():
        if (folder / "config.yaml").exists():
            raise RunFolderError(f"the run in {folder} isn't finished", remedy=f"heteroq run --resume {folder}")
        raise RunFolderError(f"{folder} holds no run", remedy="start one with: heteroq run CONFIG")
    summary: dict[str, Any] = read_json(file)
    return summary


class JsonLines:
    """A file to which lines are appended, one unbuffered write each: a kill leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RunFailedError(f"can't write {path}: {error.strerror}") from None

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            raise RunFailedError(f"can't write {self._path} ({len(data)} bytes): {error.strerror}") from None
        if written != len(data):
            raise RunFailedError(f"can't write {self._path}: {written} of {len(data)} bytes written; is the disk full?")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line is left out; empty where there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines from a JSON-lines file; those kept stay byte for byte."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    write_text(path, "".join(line.decode() + "\n" for line in lines if keep(json.loads(line))))


def environment(command: list[str], devices: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run takes place: versions, machine, source revision, devices, command.

    Args:
        command: the words of the command line.
        devices: the topology's JSON form.
    """
    versions = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "created": now(),
        "command": command,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions,
        "git": _revision(),
        "devices": devices,
    }


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def version() -> str:
    """The installed version of heteroq."""
    try:
        return importlib.metadata.version("heteroq")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def command_line() -> list[str]:
    """The words that started this process, without the interpreter's folder."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _revision() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has changes; None outside a repository or without git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", str(here)))}
    except (OSError, subprocess.SubprocessError):
        return None
