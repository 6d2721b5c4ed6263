"""The five models share what they have in common."""

import pytest
import torch

from experiments import arms, config_file
from experiments.config import ARMS

CONFIG = config_file.load(
    {
        "name": "x",
        "model": {"n_layer": 2, "d_model": 16, "n_head": 2, "seq_len": 8},
        "quantum": {"unit": "block1.mlp", "n_qubits": 3, "n_circuit_layers": 2},
    }
).config


@pytest.fixture(scope="module")
def models():
    return {arm: arms.build(CONFIG, arm, 5, 11) for arm in ARMS}


def test_common_weights_are_equal_bit_for_bit(models):
    baseline = models["baseline"].state_dict()
    for arm in ARMS[1:]:
        state = models[arm].state_dict()
        common = {name for name in baseline if not name.startswith("block1.mlp.inner.")}
        assert common == {name for name in state if not name.startswith("block1.mlp.inner.")}
        assert len(common) > 10
        assert all(torch.equal(baseline[name], state[name]) for name in common)


def test_projections_start_alike_in_all_four_bottlenecks(models):
    for name in ("down.weight", "down.bias", "up.weight", "up.bias"):
        key = f"block1.mlp.inner.{name}"
        states = [models[arm].state_dict()[key] for arm in ARMS[1:]]
        assert all(torch.equal(states[0], state) for state in states[1:])


def test_the_frozen_circuit_starts_as_the_hybrids_and_is_not_trained(models):
    hybrid, frozen = arms.circuit_layer(models["hybrid"]), arms.circuit_layer(models["frozen"])
    assert torch.equal(hybrid.weights, frozen.weights)
    assert hybrid.weights.requires_grad
    assert not frozen.weights.requires_grad


def test_another_seed_changes_every_random_part():
    other = arms.build(CONFIG, "hybrid", 6, 11).state_dict()
    same = arms.build(CONFIG, "hybrid", 5, 11).state_dict()
    for key in ("embedding.token.weight", "block1.mlp.inner.down.weight", "block1.mlp.inner.core.weights"):
        assert not torch.equal(other[key], same[key])


@pytest.mark.parametrize("n_qubits", range(1, 9))
@pytest.mark.parametrize("n_circuit_layers", [1, 2, 5])
def test_the_twins_size_matches_the_circuits(n_qubits, n_circuit_layers):
    settings = CONFIG.quantum.model_copy(update={"n_qubits": n_qubits, "n_circuit_layers": n_circuit_layers})
    config = CONFIG.model_copy(update={"quantum": settings})
    hybrid, twin = (arms.count_parameters(arms.build(config, arm, 0, 5))[1] for arm in ("hybrid", "twin"))
    assert 0 <= twin - hybrid <= n_qubits


def test_building_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    arms.build(CONFIG, "hybrid", 0, 5)
    assert torch.equal(before, torch.random.get_rng_state())
