"""Which labels of `labels` no other one dominates, compiled: most of a search's time is spent here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hetero.planner.problem import Floats
    from hetero.planner.symmetry import Ints


def _undominated(
    order: Ints,
    kind: Ints,
    sums: Floats,
    forward: Floats,
    backward: Floats,
    nbytes: Floats,
    rooms: Floats,
    counts: Floats,
    which: Ints,
    weights: Floats,
    is_capped: NDArray[np.bool_],
    most: int,
) -> NDArray[np.bool_]:
    """(n,) whether each label stays; each is compared with the first few of its kind that stay.

    Args:
        order: (n,) rows, kind by kind, the best value first.
        kind: (n,) what only labels that can be compared have in common.
        sums: (n,) S.
        forward: (n, X) loads of which F is the largest.
        backward: (n, Y) likewise, B.
        nbytes: (n, Z) bytes that must not be more.
        rooms: (n, R) room to recompute in.
        counts: (W, Z, R) which rooms count in which bytes, in each of W cases.
        which: (n,) the label's case.
        weights: (2,) factors of F and B.
        is_capped: (2,) whether F and B have a limit, so that no load may exceed the other label's.
        most: labels that one is compared with.
    """
    alive = np.ones(len(order), np.bool_)
    kept = np.empty(most, np.int64)
    n_kept, current = 0, -1
    for position in range(len(order)):
        b = order[position]
        if position == 0 or kind[b] != current:
            n_kept, current = 0, kind[b]
        for k in range(n_kept):
            a = kept[k]
            if sums[a] > sums[b]:
                continue
            excess_f, excess_b = 0.0, 0.0
            for x in range(forward.shape[1]):
                excess_f = max(excess_f, forward[a, x] - forward[b, x])
            for x in range(backward.shape[1]):
                excess_b = max(excess_b, backward[a, x] - backward[b, x])
            if (is_capped[0] and excess_f > 0.0) or (is_capped[1] and excess_b > 0.0):
                continue
            if sums[a] + (weights[0] * excess_f + weights[1] * excess_b) > sums[b]:
                continue
            is_worse = True
            for z in range(nbytes.shape[1]):
                more = nbytes[a, z] - nbytes[b, z]
                for r in range(rooms.shape[1]):
                    more += counts[which[b], z, r] * max(0.0, rooms[a, r] - rooms[b, r])
                if more > 0.0:
                    is_worse = False
                    break
            if is_worse:
                alive[b] = False
                break
        if alive[b] and n_kept < most:
            kept[n_kept] = b
            n_kept += 1
    return alive


undominated: Callable[..., NDArray[np.bool_]] = numba.njit(cache=True)(_undominated)
