"""Small results on disk: measurements and tuning, as JSON files in one folder, and what is collected line by line.

The cache only saves time: an entry that is missing, broken or unwritable is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def folder() -> Path:
    """`$HETEROQ_CACHE`, or `heteroq` in the user's cache folder of the platform; not created."""
    if explicit := os.environ.get("HETEROQ_CACHE"):
        return Path(explicit)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "heteroq"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "heteroq" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heteroq"


def key(*parts: Any) -> str:
    """SHA-256 of the parts' JSON form (what JSON lacks enters by its `repr`); a file name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def read(kind: str, name: str, parse: Callable[[Any], _T]) -> _T | None:
    """What `parse` makes of the JSON value stored as `name` in the subfolder `kind`.

    None where there is no readable one, or one of another form: for which `parse` raises.
    """
    path = folder() / kind / f"{name}.json"
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        _log.warning("cache entry %s is unreadable and will be made anew: %s", path, error)
        return None


def read_all(kind: str, parse: Callable[[Any], _T]) -> list[_T]:
    """What `parse` makes of each value of a subfolder, by name; those that it raises for are left out."""
    names = sorted(path.stem for path in (folder() / kind).glob("*.json"))
    found = (read(kind, name, parse) for name in names)
    return [value for value in found if value is not None]


def write(kind: str, name: str, value: Any) -> None:
    """Store a JSON value; a failure (full disk, read-only folder) is logged and otherwise harmless."""
    path = folder() / kind / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as error:
        _log.warning("cache entry %s could not be written: %s", path, error)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Replace a file by a JSON value as a whole: a reader, or a crash, sees the old one or the new one.

    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # unlike one of `tempfile`, as readable as others
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(value, file, indent=indent)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add JSON objects to a file of lines, one write each; a failure is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            for record in records:
                # A line that a crash cut off must not swallow the next one.
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
                line = ("\n" if torn else "") + json.dumps(record, ensure_ascii=False) + "\n"
                os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as error:
        _log.warning("%s could not be added to: %s", path, error)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a file of lines; a broken line is passed over with a warning. A missing file is empty."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        _log.warning("%s can't be read: %s", path, error)
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
            records.append(record | {"line": f"{path}:{number}"})
        except ValueError as error:
            _log.warning("%s:%d is unreadable and passed over: %s", path, number, error)
    return records
