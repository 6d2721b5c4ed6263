"""Token arrays on disk: a folder is written whole or not at all, and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Arrays = dict[str, NDArray[np.uint16]]

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$HETEROQ_CACHE`, or `heteroq` in the platform's folder for what programs may rebuild at any time."""
    if os.environ.get("HETEROQ_CACHE"):
        return Path(os.environ["HETEROQ_CACHE"])
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "heteroq"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "heteroq"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heteroq"


def load_or_build(folder: Path, build: Callable[[], tuple[Arrays, dict[str, Any]]]) -> tuple[Arrays, dict[str, Any]]:
    """Memory-mapped arrays and facts of a folder; a folder that is missing or damaged is made with `build`.

    Any number of processes may do this at once: each writes its own temporary folder, the first rename wins.

    Raises:
        DataError: the folder can't be written.
    """
    loaded = _load(folder)
    if loaded is None:
        arrays, facts = build()
        try:
            _write(folder, arrays, facts)
        except OSError as error:
            raise DataError(
                f"can't write tokens to {folder}",
                found=error.strerror or str(error),
                remedy="set HETEROQ_CACHE to a folder with space that you may write to",
            ) from error
        loaded = _load(folder)
    if loaded is None:
        raise DataError(f"the tokens in {folder} change while they are read", remedy="remove the folder and try again")
    return loaded


def _load(folder: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """What the folder holds; None where it is missing or doesn't match its checksums."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        arrays: Arrays = {}
        for name, sha256 in meta["sha256"].items():
            array = np.memmap(folder / f"{name}.bin", np.uint16, "r")
            if hashlib.sha256(array.data).hexdigest() != sha256:
                raise ValueError(f"{name}.bin doesn't match its SHA-256")
            arrays[name] = array
        facts = meta["facts"]
        if _digest(facts) != meta["facts_sha256"]:
            raise ValueError("meta.json doesn't match its SHA-256")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("tokens in %s are damaged (%s); making them again", folder, error)
        return None
    return arrays, facts


def _write(folder: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            (temporary / f"{name}.bin").write_bytes(array.tobytes())
        digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        meta = {"sha256": digests, "facts": facts, "facts_sha256": _digest(facts)}
        (temporary / "meta.json").write_text(json.dumps(meta), "utf-8")
        if folder.exists() and _load(folder) is None:  # damaged: move it aside, readers keep what they have mapped
            os.replace(folder, temporary / "damaged")
        try:
            os.rename(temporary, folder)
        except OSError:
            if _load(folder) is None:  # no other process was faster: a real failure
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
