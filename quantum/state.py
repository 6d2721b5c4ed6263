"""Amplitudes in Aer's hands: the one place that opens, uses and closes a native Aer state.

Row b of a `(R, 2**n)` array is one circuit's state; Aer sees one register of n + log2 R qubits, the row index being its
high qubits. A gate with the same angles for all rows is one Aer call for all of them. Wire i (the most significant
bit first, as in PennyLane) is Aer's qubit n-1-i.

Aer works in the array's own memory (no copy). It would free that memory itself if the state were left open, which ends
the process with a corrupted heap; therefore nothing outside `AerRows` touches the native object's lifetime.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from types import FrameType, TracebackType

Complex = npt.NDArray[np.complex128]

# Aer 0.17.2 crashes in flush with fusion and diagonals; one thread a state, since the caller owns the cores.
_OPTIONS = {"method": "statevector", "fusion_enable": "False", "max_parallel_threads": "1"}
_DEFERRED = (signal.SIGINT, signal.SIGTERM)

_pool = threading.local()  # a native object costs 70 us to construct: each thread keeps its last one
_counts: Counter[str] = Counter()
_counts_lock = threading.Lock()


def operation_counts() -> dict[str, int]:
    """Operations that Aer has executed in this process so far, by name; `prepare` counts states handed to it."""
    with _counts_lock:
        return dict(_counts)


class AerRows:
    """Context manager that lends a `(R, 2**n)` complex128 array, R a power of two, to Aer.

    Inside, `unitary`, `diagonal` and `gate` queue operations and `flush` executes them in place. On exit everything
    queued is executed (not after an exception) and the array is the caller's again. SIGINT and SIGTERM that arrive
    inside are handled after the exit, where the process is in the main thread; other threads don't get them.
    """

    def __init__(self, rows: Complex) -> None:
        # Aer converts any other array without a word, and then works on the copy
        assert rows.dtype == np.complex128
        assert rows.flags.c_contiguous
        assert rows.size & (rows.size - 1) == 0
        self._flat = rows.reshape(-1)
        self.n_row_qubits = rows.shape[0].bit_length() - 1
        self.n_wires = rows.shape[1].bit_length() - 1
        self._signals = _SignalGate()
        self._calls: Counter[str] = Counter(prepare=1)
        self._pending = False

    def __enter__(self) -> AerRows:
        self._signals.close()
        try:
            self._native: Any = _take_native()
            self._native.initialize_statevector(self.n_wires + self.n_row_qubits, self._flat, False)
        except BaseException:
            self._signals.open()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._native.move_to_buffer()  # ends Aer's ownership of our memory
            self._native.clear()
            if kind is None:
                _pool.native = self._native
            with _counts_lock:
                _counts.update(self._calls)
            self._signals.open()

    def unitary(self, wires: tuple[int, ...], matrix: Complex) -> None:
        """Queue a `(2**k, 2**k)` matrix on k wires, the first wire being the most significant bit."""
        self._native.apply_unitary([self.n_wires - 1 - wire for wire in reversed(wires)], matrix)
        self._calls["unitary"] += 1
        self._pending = True

    def gate(self, name: str, wires: tuple[int, ...]) -> None:
        """Queue a named gate without parameters: `cx`, `cy`, `cz`, `mcx`, `mcswap`."""
        getattr(self._native, "apply_" + name)([self.n_wires - 1 - wire for wire in wires])
        self._calls[name] += 1
        self._pending = True

    def row_phases(self, wire: int, diagonal: Complex) -> None:
        """Queue a diagonal of its own for every row, `(R, 2)`, on one wire."""
        qubits = [self.n_wires - 1 - wire, *range(self.n_wires, self.n_wires + self.n_row_qubits)]
        self._native.apply_diagonal(qubits, diagonal.reshape(-1).tolist())
        self._calls["diagonal"] += 1
        self._pending = True

    def flush(self) -> None:
        """Execute what is queued."""
        if self._pending:
            self._native.flush()
            self._pending = False


class _SignalGate:
    """Holds back signals whose Python handlers could raise; the main thread only."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._handlers: dict[int, Any] = {}

    def close(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _DEFERRED:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:  # the one that isn't held back yet has raised: don't keep the other
            self.open()
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append(number)

    def open(self) -> None:
        error = self._restore()
        while error is not None and (again := self._restore()) is not None:
            error = again
        for number in dict.fromkeys(self._arrived):
            self._handlers[number](number, None)
        if error is not None:
            raise error

    def _restore(self) -> BaseException | None:
        """Puts the handlers back; what a signal raised through one of them before the others were back, or None."""
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        except BaseException as error:
            return error
        return None


def _take_native() -> Any:
    native, _pool.native = getattr(_pool, "native", None), None
    if native is None:
        from qiskit_aer.backends.controller_wrappers import AerStateWrapper

        native = AerStateWrapper()
        for option, value in _OPTIONS.items():
            native.configure(option, value)
    return native
