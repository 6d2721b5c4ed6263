"""Sampled layers: unbiased, of the variance that theory gives, reproducible and independent."""

import copy

import numpy as np
import pennylane as qml
import torch

import quantum
from quantum import gradient
from quantum.aer import plan
from quantum.circuit import capture

SHOTS = 64
REPEATS = 400


def layer(shots=SHOTS, seed=3):
    return quantum.QuantumLayer(3, 2, shots=shots, seed=seed, generator=torch.Generator().manual_seed(0))


def inputs():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def exact(module, x):
    twin = quantum.QuantumLayer(3, 2)
    twin.load_state_dict({"weights": module.weights.detach()})
    return twin(x), twin


def test_values_have_the_mean_and_variance_of_the_shots():
    module, x = layer(), inputs()
    with torch.no_grad():
        values = torch.stack([module(x) for _ in range(REPEATS)])
        truth = exact(module, x)[0]
    variance = (1 - truth**2) / SHOTS
    z = (values.mean(0) - truth) / (variance / REPEATS).sqrt()
    # 12 values beyond 4.5 standard deviations: false alarm 8e-5
    assert float(z.abs().max()) < 4.5
    # relative variance of a variance of m values is about 2/m (kurtosis near 3): 0.071 each, 5 sigma
    ratio = values.var(0) / variance
    assert float((ratio - 1).abs().max()) < 5 * np.sqrt(2 / REPEATS) * 1.3


def shifted_variances(module, x, cotangent):
    """Exact variances of all gradient components: each is sum_rows (e+ - e-)/2, e a mean of SHOTS samples of D g."""
    tape = capture(3, 2, embedding="angle", ansatz="strongly_entangling", batch=2)
    program, g = plan(tape, [0, 1, 2]).program, cotangent.numpy()
    p, order = gradient.branches(
        program, module.weights.detach().numpy().reshape(-1), x.numpy(), shared=True, per_row=True
    )
    outcomes = g @ np.stack([np.diag(qml.matrix(qml.Z(i), wire_order=range(3))).real for i in range(3)])
    one_shot = (p * outcomes**2).sum(-1) - (p * outcomes).sum(-1) ** 2  # (angles, +-, rows)
    variances = one_shot.sum(1) / (4 * SHOTS)
    rows = {index: variances[k] for k, (is_row, index) in enumerate(order) if is_row}
    angles = {index: variances[k].sum() for k, (is_row, index) in enumerate(order) if not is_row}
    in_rows = np.stack([rows[i] for i in range(3)], axis=1).reshape(-1)
    return torch.from_numpy(np.concatenate([in_rows, [angles[i] for i in range(len(angles))]]))


def test_gradients_are_unbiased_and_have_the_variance_of_the_parameter_shift_rule():
    module, x = layer(), inputs()
    cotangent = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    samples = []
    for _ in range(REPEATS):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        (module(leaf) * cotangent).sum().backward()
        samples.append(torch.cat([leaf.grad.reshape(-1), module.weights.grad.reshape(-1)]))
    estimates = torch.stack(samples)
    leaf = x.clone().requires_grad_()
    values, twin = exact(module, leaf)
    (values * cotangent).sum().backward()
    truth = torch.cat([leaf.grad.reshape(-1), twin.weights.grad.reshape(-1)])
    variances = shifted_variances(module, x, cotangent)
    is_random = variances > 1e-20  # the last rotation about Z changes no measurement: its gradient is 0, always
    assert torch.equal(estimates[:, ~is_random], torch.zeros_like(estimates[:, ~is_random]))
    z = ((estimates.mean(0) - truth) / (variances / REPEATS).sqrt())[is_random]
    # 30 components beyond 4.5 standard deviations: false alarm 2e-4
    assert float(z.abs().max()) < 4.5
    # means of 64 shots are near normal: a variance of 400 values has a relative deviation of sqrt(2/400) = 0.071; 30
    # of them beyond 5: false alarm 2e-5
    ratio = (estimates.var(0) / variances)[is_random]
    assert float((ratio - 1).abs().max()) < 5 * np.sqrt(2 / REPEATS)


def test_samples_of_nothing_finite_are_not_a_number():
    module, x = layer(), inputs()
    x[1, 0] = torch.nan
    values = module(x)
    assert values[1].isnan().any()
    assert values[[0, 2, 3]].isfinite().all()


def test_samples_depend_on_seed_and_call_only():
    x = inputs()
    first, second = layer(), layer()
    a, b = (first(x), first(x)), (second(x), second(x))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(layer(seed=4)(x), a[0])


def test_rows_draw_from_streams_of_their_own():
    row = inputs()[:1]
    values = layer()(row.expand(64, 3)).detach()
    assert len({tuple(v.tolist()) for v in values}) > 32
    alone = layer()(row).detach()
    assert torch.equal(values[:1], alone)


def test_gradients_of_one_call_repeat():
    results = []
    for _ in range(2):
        module, leaf = layer(), inputs().requires_grad_()
        module(leaf).sum().backward()
        results.append((leaf.grad, module.weights.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_resumed_layer_goes_on_with_the_same_samples():
    x, module = inputs(), layer()
    module(x)
    state = copy.deepcopy(module.state_dict())
    expected = module(x)
    resumed = layer()
    resumed.load_state_dict(state)
    assert torch.equal(resumed(x), expected)


def test_neither_numpy_nor_torch_global_generators_are_touched():
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    layer()(inputs().requires_grad_()).sum().backward()
    assert np.array_equal(np.random.get_state()[1], np_state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
