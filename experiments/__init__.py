"""Experiments: configuration, runs, comparison, report, command line. The one package that knows the other three.

result = experiments.run("experiments/configs/quickstart.yaml")     # or a dict with the same keys
print(result.summary["verdict"], result.out / "report.html")
"""

from __future__ import annotations

from experiments.errors import ConfigError, RunFailedError, RunFolderBusyError, RunFolderError, RunInterruptedError

# The function takes the name of its module on purpose: `experiments.run(...)` is the package's one way in.
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
