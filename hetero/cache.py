"""Small results on disk: measurements and tuning, as JSON files in one folder.

The cache only saves time: an entry that is missing, broken or unwritable is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

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


def write(kind: str, name: str, value: Any) -> None:
    """Store a JSON value; a failure (full disk, read-only folder) is logged and otherwise harmless."""
    path = folder() / kind / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)
    except OSError as error:
        _log.warning("cache entry %s could not be written: %s", path, error)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a JSON value as a whole: a reader, or a crash, sees the old one or the new one.

    Raises:
        OSError: it could not be written; the old file is untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
