"""What part of a roofline's bound devices reach, learnt from the layers that were measured on real ones.

A layer of F [FLOP] that moves Q [B] takes on a device at least T = max(F / peak, Q / bandwidth); the efficiency of a
measured time t is T / t. Each layer that is profiled leaves one observation. From those on devices of one kind (cpu,
gpu), log efficiency is fitted by a linear function of

    log F,  log (1 + F/Q)  (arithmetic intensity),  pass (forward or backward),  kind of operation,  api

with Huber's loss, so that a few odd layers don't turn it, and a ridge penalty on all but level and pass, so that an
operation or api with few observations stays near the common level. Sizes are taken as inside of the measured range:
there is no extrapolation.

The error of a device that was never measured is found by leaving devices out: fit without one, predict its layers. It
is the 90 % quantile of those residuals, or that of the layers themselves if larger. With a single measured device
nobody knows how devices differ, and with none nobody knows anything: then the assumed factor below is the least.

Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009; Huber, "Robust Statistics", 1981, section 7.8
(iteratively reweighted least squares).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero import cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ASSUMED = 0.5
"""Efficiency where nothing of the kind was measured: large trainings report 0.3 to 0.6 of a peak (Narayanan et al.,
SC 2021, table 1: 0.44 to 0.52; Chowdhery et al., "PaLM", 2022, table 3: 0.21 to 0.46). A judgement for a layer."""

ASSUMED_FACTOR = 3.0
"""A time under an assumed efficiency is taken to be right within this factor: small layers reach a tenth of a peak."""

_LEAST = 8  # observations of a kind, of forward and backward passes together: fewer don't fix the function's slopes
_COVERAGE = 0.9
_LEAST_ERROR = 0.05
_RIDGE = 1.0  # in units of one observation: an operation seen once is believed by half
_HUBER = 1.345  # 95 % efficient for normal residuals (Huber 1981, section 4.5)


@dataclass(frozen=True)
class Observation:
    """One layer as it was measured on one device.

    Attributes:
        device: description, driver and number of cores: equal for devices that are the same hardware.
        kind: of the device.
        api: of the device.
        operation: what the layer mainly does, from `hetero.modules.operation`.
        flops: of a forward pass [FLOP].
        nbytes: that a forward pass moves at least [B].
        forward_s: measured [s].
        backward_s: measured [s].
        peak_flops: of the device, measured [FLOP/s].
        bandwidth: of the device, measured [B/s].
        launch_s: of the device, measured [s].
    """

    device: str
    kind: str
    api: str
    operation: str
    flops: float
    nbytes: float
    forward_s: float
    backward_s: float
    peak_flops: float
    bandwidth: float
    launch_s: float


@dataclass(frozen=True)
class Efficiency:
    """What part of the bound a layer should reach.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, whose bound is twice the forward pass's.
        error: times lie between 1 / (1 + error) and (1 + error) times what follows from the two.
        basis: where it comes from, in words.
    """

    forward: float
    backward: float
    error: float
    basis: str


def bound_s(flops: float, nbytes: float, peak_flops: float, bandwidth: float) -> float:
    """The roofline's bound of a forward pass [s]."""
    return max(flops / peak_flops, nbytes / bandwidth)


def record(name: str, observation: Observation) -> None:
    """Keep an observation, in the place of an earlier one of that name."""
    cache.write("efficiency", name, dataclasses.asdict(observation))


def recorded() -> list[Observation]:
    """All observations that are kept."""
    return cache.read_all("efficiency", lambda stored: Observation(**stored))


def efficiency(
    kind: str, api: str, operation: str, flops: float, nbytes: float, observations: Sequence[Observation]
) -> Efficiency:
    """The efficiency of a layer on a device that was never measured.

    Args:
        kind: of the device.
        api: of the device.
        operation: of the layer.
        flops: of its forward pass [FLOP].
        nbytes: that its forward pass moves [B].
        observations: of all kinds.
    """
    own = [one for one in observations if one.kind == kind]
    points = [point for one in own for point in _points(one)]
    if len(points) < _LEAST:
        basis = (
            f"efficiency {ASSUMED:g} assumed, within a factor {ASSUMED_FACTOR:g}: too few layers on a {kind} measured"
        )
        return Efficiency(ASSUMED, ASSUMED, ASSUMED_FACTOR - 1.0, basis)
    fit = _Fit(points)
    forward, backward = (fit.predict(_Point("", api, operation, flops, nbytes, back, 0.0)) for back in (False, True))
    devices = sorted({point.device for point in points})
    half = max(_quantile([point.y - fit.predict(point) for point in points]), math.log1p(_LEAST_ERROR))
    basis = f"efficiency {math.exp(forward):.2g} learnt from {len(own)} layers on {len(devices)} devices of kind {kind}"
    if len(devices) > 1:
        half = max(half, _quantile(_left_out(points, devices)))
        basis += ", error from leaving devices out"
    else:
        half = max(half, math.log(ASSUMED_FACTOR))
        basis += f", within an assumed factor {ASSUMED_FACTOR:g}: one device doesn't show how others differ"
    return Efficiency(math.exp(forward), math.exp(backward), math.expm1(half), basis)


@dataclass(frozen=True)
class _Point:
    """One pass of an observation; y is the log of its efficiency."""

    device: str
    api: str
    operation: str
    flops: float
    nbytes: float
    is_backward: bool
    y: float

    @property
    def sizes(self) -> tuple[float, float]:
        return math.log10(1.0 + self.flops), math.log10(1.0 + self.flops / self.nbytes)


def _points(one: Observation) -> list[_Point]:
    """Both passes, net of a launch; a pass that took no more than that says nothing."""
    busy = bound_s(one.flops, one.nbytes, one.peak_flops, one.bandwidth)
    points = []
    for is_backward, seconds in ((False, one.forward_s), (True, one.backward_s)):
        net = seconds - one.launch_s
        if net > 0.0 and busy > 0.0:
            y = math.log((2 if is_backward else 1) * busy / net)
            points.append(_Point(one.device, one.api, one.operation, one.flops, one.nbytes, is_backward, y))
    return points


def _left_out(points: Sequence[_Point], devices: Sequence[str]) -> list[float]:
    """Residuals of each device's points under the fit to those of the others."""
    residuals = []
    for device in devices:
        fit = _Fit([point for point in points if point.device != device])
        residuals += [point.y - fit.predict(point) for point in points if point.device == device]
    return residuals


def _quantile(residuals: Sequence[float]) -> float:
    return float(np.quantile(np.abs(residuals), _COVERAGE, method="higher"))


class _Fit:
    """Log efficiency as a linear function of the features: Huber's loss, ridge on all but level and pass."""

    def __init__(self, points: Sequence[_Point]) -> None:
        self._apis = sorted({point.api for point in points})
        self._operations = sorted({point.operation for point in points})
        sizes = np.array([point.sizes for point in points])
        self._low, self._high = sizes.min(0), sizes.max(0)
        self._middle, self._spread = sizes.mean(0), np.maximum(sizes.std(0), 1e-9)
        x = np.array([self._features(point) for point in points])
        self._weights = _huber_ridge(x, np.array([point.y for point in points]))

    def predict(self, point: _Point) -> float:
        """The log of the efficiency."""
        return float(self._features(point) @ self._weights)

    def _features(self, point: _Point) -> Floats:
        sizes = (np.clip(point.sizes, self._low, self._high) - self._middle) / self._spread
        named = [point.api == api for api in self._apis] + [point.operation == one for one in self._operations]
        return np.array([1.0, 0.5 if point.is_backward else -0.5, *sizes, *named], float)


def _huber_ridge(x: Floats, y: Floats) -> Floats:
    """Weights (K,) of a linear function of x (N, K), whose first two columns are not penalised."""
    penalty = np.full(x.shape[1], _RIDGE)
    penalty[:2] = 1e-9
    importance = np.ones(len(y))
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        weighted = x * importance[:, None]
        new: Any = np.linalg.solve(x.T @ weighted + np.diag(penalty), weighted.T @ y)
        residuals = np.abs(y - x @ new)
        scale = max(float(np.median(residuals)) / 0.6745, 1e-6)  # of a normal distribution with that median
        importance = np.minimum(1.0, _HUBER * scale / np.maximum(residuals, 1e-12))
        if np.allclose(new, weights, atol=1e-9):
            break
        weights = new
    return weights
