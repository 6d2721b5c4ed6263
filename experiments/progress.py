"""What a run says while it works: one moving line on a terminal, plain lines in a log; always to stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

_BAR = 24


class Progress:
    """Reports of a run.

    Args:
        stream: where to write; None: stderr. A terminal gets a bar that moves, everything else whole lines.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._moving = self._stream.isatty()
        self._open = False
        self._drawn = 0.0

    def say(self, text: str) -> None:
        """One lasting line."""
        self._clear()
        self._write(text + "\n")

    def training(self, title: str, floors: Mapping[str, float]) -> None:
        """A training begins; `floors` stand beside every loss from now on [nat/token]."""
        self._title = title
        self._floors = ", ".join(f"{name} {value:.3f}" for name, value in floors.items())

    def step(self, step: int, steps: int, loss: float) -> None:
        """A step has ended; drawn on a terminal, ten times a second at most."""
        if not self._moving or (time.monotonic() - self._drawn < 0.1 and step < steps):
            return
        self._drawn = time.monotonic()
        bar = ("#" * (_BAR * step // steps)).ljust(_BAR, ".")
        self._write(f"\r\x1b[2K{self._title} [{bar}] {step}/{steps}  loss {loss:.3f} (floors: {self._floors})")
        self._open = True

    def evaluated(self, step: int, steps: int, split: str, loss: float) -> None:
        """A whole split was evaluated; a lasting line in a log, and for the test split on a terminal too."""
        if self._moving and split != "test":
            return
        self.say(f"{self._title} step {step}/{steps}  {split} loss {loss:.4f} nat/token (floors: {self._floors})")

    def close(self) -> None:
        """End the moving line."""
        self._clear()

    def _clear(self) -> None:
        if self._open:
            self._write("\r\x1b[2K")
            self._open = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._moving = False  # the terminal has gone; the run goes on
