"""Experiments: configuration, runs, comparison, report, command line. The one package that knows the other three.

result = experiments.run("experiments/configs/quickstart.yaml")     # or a dict with the same keys
print(result.summary["verdict"], result.out / "report.html")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from experiments.errors import ConfigError, RunFailedError, RunFolderBusyError, RunFolderError, RunInterruptedError

if TYPE_CHECKING:
    from experiments.run import RunResult, resume, run

__all__ = [
    "ConfigError",
    "RunFailedError",
    "RunFolderBusyError",
    "RunFolderError",
    "RunInterruptedError",
    "RunResult",
    "resume",
    "run",
]


class _Package(ModuleType):
    """The function `run` takes the name of its module on purpose: `experiments.run(...)` is the package's one way in.

    Python binds a submodule to its name when it's loaded; here the function is bound in its place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.run if name == "run" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Loaded when asked for: half of the commands need no configuration."""
    if name not in ("RunResult", "resume", "run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("experiments.run"), name)
