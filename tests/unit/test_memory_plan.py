from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.opencl.ir import Root
from hetero.opencl.memory import assign, lifetimes

ALIGNMENT = 64
steps = st.lists(st.lists(st.integers(0, 15), max_size=4), min_size=1, max_size=12)
kinds = st.lists(st.sampled_from(["scratch", "scratch", "saved", "output", "input"]), min_size=16, max_size=16)
sizes = st.lists(st.integers(0, 1000), min_size=16, max_size=16)


def _intervals_overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@settings(deadline=None, max_examples=100)
@given(steps, kinds, sizes)
def test_no_two_live_roots_overlap(uses: list[list[int]], kind: list[str], nbytes: list[int]) -> None:
    roots = [Root(k, n) for k, n in zip(kind, nbytes, strict=True)]
    spans = lifetimes([[roots[i] for i in step] for step in uses])
    plan = assign(spans, alignment=ALIGNMENT)
    for a, b in itertools.combinations(spans, 2):
        if a.kind != b.kind or a.kind not in ("scratch", "saved"):
            continue
        # Brute force: alive together if some step lies within both lifetimes; saved roots always are.
        together = a.kind == "saved" or any(
            all(spans[r][0] <= step <= spans[r][1] for r in (a, b)) for step in range(len(uses))
        )
        places = [(r.offset, r.offset + r.nbytes) for r in (a, b)]
        assert not (together and _intervals_overlap(places[0], places[1]))
    for root in spans:
        if root.kind in ("scratch", "saved"):
            assert root.offset % ALIGNMENT == 0
            assert root.offset + root.nbytes <= (plan.arena_bytes if root.kind == "scratch" else plan.slab_bytes)


def test_a_chain_of_equal_temporaries_needs_two_places() -> None:
    roots = [Root("scratch", 1000) for _ in range(10)]
    plan = assign(lifetimes(list(itertools.pairwise(roots))), alignment=8)
    assert plan.arena_bytes == 2000


def test_saved_roots_never_share() -> None:
    roots = [Root("saved", 100) for _ in range(5)]
    plan = assign(lifetimes([[root] for root in roots]), alignment=4)
    assert plan.slab_bytes == 500
    assert len({root.offset for root in roots}) == 5


def test_outputs_are_counted_and_inputs_are_not() -> None:
    plan = assign(lifetimes([[Root("output", 12), Root("input", 1 << 40)]]), alignment=4)
    assert plan.output_bytes == 12
    assert plan.memory_bytes == 12


def test_copied_inputs_and_outputs_share_the_arena_with_temporaries() -> None:
    a, b, out, saved = Root("input", 1000), Root("scratch", 1000), Root("output", 1000), Root("saved", 100)
    spans = lifetimes([[a], [a, b], [b, out, saved], [out, saved]])
    plan = assign(spans, alignment=4, in_arena=("input", "scratch", "output", "saved"))
    assert (plan.arena_bytes, plan.slab_bytes, plan.output_bytes) == (2100, 100, 1000)
    assert a.offset == out.offset


def test_lifetimes_span_first_to_last_use() -> None:
    a, b = Root("scratch", 4), Root("scratch", 4)
    assert lifetimes([[a], [b], [], [a]]) == {a: (0, 3), b: (1, 1)}
