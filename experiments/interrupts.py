"""SIGINT and SIGTERM: during training noted and obeyed between two steps, otherwise obeyed at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

from experiments.errors import RunInterruptedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The state of a run's signal handlers.

    Attributes:
        received: number of the signal that asked the run to end; None so far.
    """

    def __init__(self, remedy: str) -> None:
        self.received: int | None = None
        self._remedy = remedy
        self._deferred = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside; outside the main thread, where Python allows no handlers, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal is only noted; `check` obeys it. A second one is obeyed at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise if a signal has come.

        Raises:
            RunInterruptedError: with the exit code 128 + signal.
        """
        if self.received is not None:
            name = signal.Signals(self.received).name
            raise RunInterruptedError(f"interrupted by {name}", signal_number=self.received, remedy=self._remedy)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        if again or not self._deferred:
            self.check()
