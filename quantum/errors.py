"""Errors of the package: circuits and simulators."""

from __future__ import annotations


class QuantumError(Exception):
    """Root of every error that `quantum` raises on purpose.

    Attributes:
        found: what was there.
        expected: what should have been there.
        remedy: what to do next.
    """

    def __init__(self, message: str, *, found: str = "", expected: str = "", remedy: str = "") -> None:
        self.message, self.found, self.expected, self.remedy = message, found, expected, remedy
        fields = (("found", found), ("expected", expected), ("remedy", remedy))
        super().__init__("\n".join([message, *(f"  {name}: {text}" for name, text in fields if text)]))
