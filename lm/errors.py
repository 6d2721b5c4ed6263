"""Errors of the package: models, data and training."""

from __future__ import annotations


class LMError(Exception):
    """Root of every error that `lm` raises on purpose.

    Attributes:
        found: what was there.
        expected: what should have been there.
        remedy: what to do next.
    """

    def __init__(self, message: str, *, found: str = "", expected: str = "", remedy: str = "") -> None:
        self.message, self.found, self.expected, self.remedy = message, found, expected, remedy
        fields = (("found", found), ("expected", expected), ("remedy", remedy))
        super().__init__("\n".join([message, *(f"  {name}: {text}" for name, text in fields if text)]))


class SettingError(LMError):
    """A model, a training run or a generation was asked for in a way that can't be followed."""


class DataError(LMError):
    """Text or tokens can't be used: missing, empty, not UTF-8, too short."""


class NonFiniteError(LMError):
    """A loss or gradient became NaN or infinite.

    Attributes:
        step: the step whose update did not take place, or after which the validation failed.
        parameter: name of the parameter with the worst gradient, or "" where the loss itself is not finite.
    """

    def __init__(self, message: str, *, step: int, parameter: str = "", found: str = "", remedy: str = "") -> None:
        self.step, self.parameter = step, parameter
        super().__init__(message, found=found, expected="finite numbers", remedy=remedy)


class CheckpointError(LMError):
    """A checkpoint can't be written, read, or belongs to another configuration."""
