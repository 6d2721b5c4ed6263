"""The clock of the schedule simulation: arrays in, times out, compiled.

A piece of work has the number (phase · K + stage) · m + micro-batch, phase 0 for forward and 1 for backward passes, K
stages, m micro-batches. Apart from `hetero.schedule`, which explains the model, nobody needs to call this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def _share(now: float, cores: NDArray[np.bool_], running: Ints, since: Floats, left: Floats, rate: Floats) -> None:
    """Divide each core evenly among the devices at work on it; a device is as slow as its most crowded core."""
    for d in range(len(running)):
        if running[d] < 0:
            continue
        crowd = 1
        for c in range(cores.shape[1]):
            if cores[d, c]:
                on_core = 0
                for other in range(len(running)):
                    on_core += running[other] >= 0 and cores[other, c]
                crowd = max(crowd, on_core)
        fresh = 1.0 / crowd
        if fresh != rate[d]:
            if rate[d] > 0:
                left[d] = max(0.0, left[d] - (now - since[d]) * rate[d])
            since[d], rate[d] = now, fresh


_compiled_share = numba.njit(cache=True)(_share)


def _play(
    order: Ints,
    first: Ints,
    seconds: Floats,
    hops: Floats,
    channels: Ints,
    cores: NDArray[np.bool_],
    n_microbatches: int,
    is_blocking: bool,
) -> tuple[Floats, Floats, Floats]:
    """Start and end of all work and of the transfers after it.

    Args:
        order: (W,) numbers of the work, device after device, each device's in the order in which it does it.
        first: (D + 1,) where each device's work begins in `order`.
        seconds: (2, K) of a forward and of a backward pass of each stage on an idle machine [s].
        hops: (K - 1,) of a hand-over between neighbours [s].
        channels: (2, K - 1) number of the medium of activations and of gradients, which it carries one after the other
            in the order in which they are ready; -1: no turn to wait for.
        cores: (D, C) which device computes on which core.
        n_microbatches: m.
        is_blocking: whether a device does nothing else until what it sends has arrived.

    Returns:
        start (2Km,), end (2Km,), and (2Km, 2) start and end of the transfer; NaN where there is none.
    """
    m, n_stages, n_devices = n_microbatches, seconds.shape[1], len(first) - 1
    n_works = 2 * n_stages * m
    start, end = np.full(n_works, np.nan), np.full(n_works, np.nan)
    sent, arrival = np.full((n_works, 2), np.nan), np.full(n_works, np.inf)
    arrival[:m] = 0.0
    position, running = first[:-1].copy(), np.full(n_devices, -1)
    sending_until, since = np.zeros(n_devices), np.zeros(n_devices)
    left, rate = np.zeros(n_devices), np.zeros(n_devices)
    free_from = np.zeros(channels.max() + 1 if channels.size else 0)
    now = 0.0
    while True:
        is_changed = False
        for d in range(n_devices):
            if running[d] < 0 and position[d] < first[d + 1]:
                w = order[position[d]]
                if arrival[w] <= now and sending_until[d] <= now:
                    position[d] += 1
                    running[d], start[w], since[d], rate[d] = w, now, now, 0.0
                    left[d] = seconds[w // (n_stages * m), (w // m) % n_stages]
                    is_changed = True
        if is_changed:
            _compiled_share(now, cores, running, since, left, rate)
        coming = np.inf
        for d in range(n_devices):
            if running[d] >= 0:
                coming = min(coming, since[d] + left[d] / rate[d])
            elif position[d] < first[d + 1]:
                coming = min(coming, max(arrival[order[position[d]]], sending_until[d]))
        if coming == np.inf:
            return start, end, sent
        now = coming
        is_changed = False
        for d in range(n_devices):
            if running[d] < 0 or since[d] + left[d] / rate[d] > now:
                continue
            w = running[d]
            running[d], end[w], is_changed = -1, now, True
            phase, stage = w // (n_stages * m), (w // m) % n_stages
            if phase == 0 and stage == n_stages - 1:
                arrival[w + n_stages * m] = now
            elif phase == 0 or stage > 0:
                hop, target = (stage, w + m) if phase == 0 else (stage - 1, w - m)
                begin, channel = now, channels[phase, hop]
                if channel >= 0 and hops[hop] > 0:
                    begin = max(now, free_from[channel])
                    free_from[channel] = begin + hops[hop]
                arrival[target] = begin + hops[hop]
                if hops[hop] > 0:
                    sent[w, 0], sent[w, 1] = begin, arrival[target]
                    if is_blocking:
                        sending_until[d] = arrival[target]
        if is_changed:
            _compiled_share(now, cores, running, since, left, rate)


play: Callable[..., tuple[Floats, Floats, Floats]] = numba.njit(cache=True)(_play)
