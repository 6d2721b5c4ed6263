"""Errors of the package: hardware, planning and execution."""

from __future__ import annotations


class HeteroError(Exception):
    """Root of every error that `hetero` raises on purpose.

    Attributes:
        found: what was there.
        expected: what should have been there.
        remedy: what to do next.
    """

    def __init__(self, message: str, *, found: str = "", expected: str = "", remedy: str = "") -> None:
        self.message, self.found, self.expected, self.remedy = message, found, expected, remedy
        fields = (("found", found), ("expected", expected), ("remedy", remedy))
        super().__init__("\n".join([message, *(f"  {name}: {text}" for name, text in fields if text)]))


class DeviceError(HeteroError):
    """A device or a link that does not exist, or a topology file that is wrong."""


class PlacementError(HeteroError):
    """A plan that can't be made, or a request to the planner that makes no sense."""


class StageError(HeteroError):
    """A stage of a running step failed; the cause is attached."""
