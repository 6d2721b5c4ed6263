"""Sampled layers: unbiased, of the variance that theory gives, reproducible and independent."""

import copy

import numpy as np
import torch

import quantum

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
    z = (estimates.mean(0) - truth) / (estimates.std(0) / np.sqrt(REPEATS))
    # 30 components beyond 4.5 standard deviations: false alarm 2e-4
    assert float(z.abs().max()) < 4.5
    # the derivative by an input is sum_j g_j (e+_j - e-_j)/2 with (sum_j |g_j|)^2 / 2 shots above its variance
    bound = cotangent.abs().sum(1, keepdim=True).square().expand(4, 3).reshape(-1) / (2 * SHOTS)
    assert bool((estimates.var(0)[:12] < 1.3 * bound).all())
    assert bool((estimates.var(0)[:12] > 0).all())


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


def test_stock_devices_sample_too():
    module = quantum.QuantumLayer(2, 1, simulator="default.qubit", shots=4000)
    twin = quantum.QuantumLayer(2, 1)
    twin.load_state_dict({"weights": module.weights.detach()})
    leaves = [torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for m, leaf in zip((module, twin), leaves, strict=True):
        m(leaf).sum().backward()
    # each component is a sum of two shifted differences: deviation below sqrt(2 * 2 / 4 / 4000) = 0.016; six of them
    assert float((leaves[0].grad - leaves[1].grad).abs().max()) < 0.1
