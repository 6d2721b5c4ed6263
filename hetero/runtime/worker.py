"""One thread a device, pinned to the device's cores: all of a device's work happens there."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from hetero.device import Device

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Job = Callable[[], None]


class Worker:
    """A thread for the work of one device, in the order of submission.

    torch's number of threads is a property of the calling thread (of its OpenMP data environment), and the helper
    threads that a parallel region starts inherit the affinity of the thread that enters it: both are set in the
    worker itself. Setting it also changes the default of threads that have not asked yet; it is put back.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        n_threads = torch.get_num_threads()
        started = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, device.cores, started), name=f"heteroq-{device.name}", daemon=True
        )
        self._thread.start()
        started.wait()
        torch.set_num_threads(n_threads)
        self._finalizer = weakref.finalize(self, _stop, self._jobs, self._thread)

    def submit(self, job: _Job) -> None:
        """Queue work; it must not raise."""
        self._jobs.put(job)

    def begin(self, function: Callable[[], _T]) -> Callable[[], _T]:
        """Queue a function; what is returned waits for its result, or raises its exception."""
        results: SimpleQueue[tuple[_T | None, BaseException | None]] = SimpleQueue()

        def job() -> None:
            try:
                results.put((function(), None))
            except BaseException as error:  # handed over to who waits, whatever it is
                results.put((None, error))

        def result() -> _T:
            value, error = results.get()
            if error is not None:
                raise error
            return value  # type: ignore[return-value]  # None only if the function returns it

        self.submit(job)
        return result

    def call(self, function: Callable[[], _T]) -> _T:
        """What the function returns in the worker's thread; its exception is raised here."""
        return self.begin(function)()

    def close(self) -> None:
        """Finish what is queued and end the thread; a second call does nothing."""
        self._finalizer()


def _work(jobs: SimpleQueue[_Job | None], cores: tuple[int, ...], started: threading.Event) -> None:
    try:
        if cores:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cores)  # 0: the calling thread
            torch.get_num_threads()  # the first question in a thread applies the default: it must not come later
            torch.set_num_threads(len(cores))
    except OSError as error:
        _log.warning("a thread could not be pinned to cores %s: %s", cores, error)
    finally:
        started.set()
    while (job := jobs.get()) is not None:
        job()
        del job  # a queued job's tensors must not live until the next one arrives


def _stop(jobs: SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():  # the collector may run in the worker itself
        thread.join()
