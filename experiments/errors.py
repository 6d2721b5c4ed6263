"""Errors of the package: configurations, run folders and runs."""

from __future__ import annotations


class ConfigError(Exception):
    """Root of every error that `experiments` raises on purpose; by itself: a configuration that the user has to mend.

    Attributes:
        found: what was there.
        expected: what should have been there.
        remedy: what to do next.
        exit_code: what the command line ends with: 2 for the user's mistakes, 1 for a run that failed.
    """

    exit_code = 2

    def __init__(self, message: str, *, found: str = "", expected: str = "", remedy: str = "") -> None:
        self.message, self.found, self.expected, self.remedy = message, found, expected, remedy
        fields = (("found", found), ("expected", expected), ("remedy", remedy))
        super().__init__("\n".join([message, *(f"  {name}: {text}" for name, text in fields if text)]))


class RunFolderError(ConfigError):
    """A folder that can't take, or doesn't hold, the run that was asked for."""


class RunFolderBusyError(RunFolderError):
    """Another process is working in the run folder."""


class RunFailedError(ConfigError):
    """A run that started well and could not be finished; what it had reached is kept."""

    exit_code = 1


class RunInterruptedError(ConfigError):
    """A run that SIGINT or SIGTERM ended; it can be resumed."""

    def __init__(self, message: str, *, signal_number: int, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = 128 + signal_number
