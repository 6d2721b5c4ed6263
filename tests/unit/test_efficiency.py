"""Efficiencies learnt from synthetic layers: what the fit finds, what it doesn't believe, and what its errors hold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from hetero import efficiency as learnt
from hetero.efficiency import ASSUMED, ASSUMED_FACTOR, Observation, bound_s, efficiency
from hetero.modules import forward_flops, operation

PEAK, BANDWIDTH = 1e11, 1e10


def observed(device: str, flops: float, reached: float, **fields) -> Observation:
    """A layer of 0.1 byte per FLOP that reaches a part of its bound."""
    nbytes = 0.1 * flops
    busy = bound_s(flops, nbytes, PEAK, BANDWIDTH)
    base = Observation(
        device, "cpu", "cpu", "matmul", flops, nbytes, busy / reached, 2 * busy / reached, PEAK, BANDWIDTH, 0.0
    )
    return dataclasses.replace(base, **fields)


def at(flops: float, observations: list[Observation], *, kind: str = "cpu", api: str = "cpu", op: str = "matmul"):
    return efficiency(kind, api, op, flops, 0.1 * flops, observations)


def test_nothing_measured_is_said_to_be_assumed():
    found = at(1e6, [])
    assert (found.forward, found.backward, found.error) == (ASSUMED, ASSUMED, ASSUMED_FACTOR - 1.0)
    assert found.basis == "efficiency 0.5 assumed, within a factor 3: too few layers on a cpu measured"


def test_other_kinds_of_device_teach_nothing():
    observations = [observed("a", 10.0**k, 0.1, kind="gpu") for k in range(5, 11)]
    assert at(1e6, observations).forward == ASSUMED
    assert at(1e6, observations, kind="gpu").forward == pytest.approx(0.1, rel=1e-3)


def test_one_device_does_not_show_how_others_differ():
    found = at(1e7, [observed("a", 10.0**k, 0.25) for k in range(5, 11)])
    assert found.forward == pytest.approx(0.25, rel=1e-3)
    assert found.error == pytest.approx(ASSUMED_FACTOR - 1.0)
    assert found.basis.startswith("efficiency 0.25 learnt from 6 layers on 1 devices of kind cpu, within an assumed")


def test_larger_layers_that_reached_more_are_expected_to():
    observations = [observed(d, 10.0**k, 0.05 * (k - 4)) for d in "ab" for k in range(5, 11)]
    small, middle, large = (at(flops, observations).forward for flops in (1e5, 1e8, 1e10))
    assert small < middle < large
    assert large == pytest.approx(0.3, rel=0.35)
    assert at(1e20, observations).forward == pytest.approx(large)  # no extrapolation
    assert at(1e0, observations).forward == pytest.approx(small)


def test_an_outlier_does_not_turn_the_fit():
    observations = [observed(d, 10.0**k, 0.2) for d in "ab" for k in np.linspace(5, 10, 8)]
    wild = [*observations, observed("a", 1e9, 1e-4), observed("b", 3e6, 1e-4)]
    assert at(1e8, wild).forward == pytest.approx(0.2, rel=0.15)


def test_operations_and_apis_are_told_apart_and_unknown_ones_get_the_common_level():
    cases = [("cpu", "matmul", 0.4), ("cpu", "movement", 0.1), ("opencl", "matmul", 0.8), ("opencl", "movement", 0.2)]
    observations = [
        observed(f"{api}{n}", 10.0**k, reached, api=api, operation=op)
        for api, op, reached in cases
        for n in range(3)
        for k in np.linspace(5, 10, 8)
    ]
    for api, op, reached in cases:
        assert at(1e7, observations, api=api, op=op).forward == pytest.approx(reached, rel=0.1)
    common = at(1e7, observations, api="cuda", op="convolution").forward
    assert 0.1 < common < 0.8


def test_backward_passes_have_an_efficiency_of_their_own():
    observations = [
        dataclasses.replace(one, backward_s=one.backward_s * 2)
        for one in (observed(d, 10.0**k, 0.4) for d in "ab" for k in range(5, 11))
    ]
    found = at(1e7, observations)
    assert found.forward == pytest.approx(0.4, rel=0.05)
    assert found.backward == pytest.approx(0.2, rel=0.05)


def test_a_launch_is_no_work():
    observations = [
        dataclasses.replace(one, forward_s=one.forward_s + 1.0, backward_s=one.backward_s + 1.0, launch_s=1.0)
        for one in (observed(d, 10.0**k, 0.4) for d in "ab" for k in range(8, 12))
    ]
    assert at(1e9, observations).forward == pytest.approx(0.4, rel=0.01)


def test_leaving_devices_out_gives_the_error_between_devices():
    alike = [observed(d, 10.0**k, 0.2) for d in "abc" for k in range(5, 11)]
    assert at(1e7, alike).error == pytest.approx(learnt._LEAST_ERROR)
    unlike = [
        observed(d, 10.0**k, reached) for d, reached in zip("abc", (0.1, 0.2, 0.4), strict=True) for k in range(5, 11)
    ]
    found = at(1e7, unlike)
    # Without the last device the others' level is about 0.14: it is off by a factor of 2.8.
    assert found.error == pytest.approx(0.4 / math.sqrt(0.1 * 0.2) - 1.0, rel=0.1)
    assert found.basis.endswith("on 3 devices of kind cpu, error from leaving devices out")


@pytest.mark.parametrize("n_devices", [4, 8])
def test_a_new_device_lies_in_the_interval_about_as_often_as_the_quantile_says(n_devices):
    """Devices' efficiencies are log-normal. Few devices bound a share of 90 % badly; well over half must hold."""
    r = np.random.default_rng(n_devices)
    held, trials = 0, 150
    for _ in range(trials):
        levels = 0.2 * np.exp(0.4 * r.standard_normal(n_devices + 1))
        layers = [(d, 10.0**k) for d in range(n_devices) for k in range(5, 10)]
        known = [observed(str(d), flops, levels[d] * math.exp(0.1 * r.standard_normal())) for d, flops in layers]
        found = at(1e7, known)
        ratio = levels[-1] / found.forward
        held += 1 / (1 + found.error) <= ratio <= 1 + found.error
    assert 0.75 <= held / trials <= 1.0


def test_observations_are_kept_once_each(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    assert learnt.recorded() == []
    learnt.record("x", observed("a", 1e6, 0.3))
    learnt.record("x", observed("a", 1e6, 0.4))
    learnt.record("y", observed("a", 1e7, 0.5))
    (tmp_path / "efficiency" / "z.json").write_text("{}")
    assert learnt.recorded() == [observed("a", 1e6, 0.4), observed("a", 1e7, 0.5)]
    assert "unreadable" in caplog.text


class WithContext(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x, context):
        return self.module(x)


class Attention(nn.Module):
    def forward(self, x, context):
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("module", "x", "expected"),
    [
        (WithContext(nn.Linear(8, 8)), torch.ones(2, 8), "matmul"),
        (WithContext(nn.Conv1d(4, 4, 3)), torch.ones(2, 4, 9), "convolution"),
        (WithContext(nn.Embedding(5, 4)), torch.zeros(2, 3, dtype=torch.long), "movement"),
        (WithContext(nn.ReLU()), torch.ones(3), "movement"),
        (Attention(), torch.ones(1, 2, 8, 4), "attention"),
    ],
)
def test_a_layer_is_of_the_operation_that_takes_most(module, x, expected):
    assert operation(module, x, {}) == expected


def test_attention_on_the_host_is_counted():
    # Two products of (8, 4) by (4, 8) and (8, 8) by (8, 4) for each of two heads, 2 FLOP a term.
    assert forward_flops(Attention(), torch.ones(1, 2, 8, 4), {}) == 2 * 2 * (2 * 8 * 8 * 4)
