"""The five models that an experiment compares.

All arms of one seed share data order, token budget and the initial values of every common weight: the transformer is
initialised first, from the seed alone; then one residual unit gets another inner module. The four arms with a
bottleneck share the initial values of its projections as well.

    baseline   the transformer, untouched
    hybrid     a bottleneck around a trained circuit
    twin       the bottleneck around a small classical network with at least as many parameters
    frozen     the hybrid, its circuit random and untrained
    identity   the bottleneck alone
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

import lm
import quantum
from experiments.config import layer_names

if TYPE_CHECKING:
    from experiments.config import Config, Quantum


def build(config: Config, arm: str, seed: int, vocab_size: int) -> lm.Transformer:
    """The model of an arm with the initial weights of a seed."""
    size = lm.ModelConfig(
        family=config.model.family,
        n_layer=config.model.n_layer,
        d_model=config.model.d_model,
        n_head=config.model.n_head,
        vocab_size=vocab_size,
        seq_len=config.model.seq_len,
        dropout=config.model.dropout,
        d_ff=config.model.d_ff,
        n_kv_head=config.model.n_kv_head,
        norm_eps=config.model.norm_eps,
        rope_base=config.model.rope_base,
    )
    model = lm.Transformer(size, generator=torch.Generator().manual_seed(seed))
    assert [name for name, _ in model.layers()] == layer_names(config.model)
    if arm != "baseline":
        assert config.quantum is not None
        core = _core(config.quantum, arm, seed)
        width = config.quantum.n_qubits
        inner = quantum.Bottleneck(config.model.d_model, width, core, generator=_generator(seed, "bottleneck"))
        model.replace_inner(config.quantum.unit, inner)
    return model


def circuit_layer(model: nn.Module) -> quantum.QuantumLayer | None:
    """The model's quantum layer; None where it has none."""
    return next((module for module in model.modules() if isinstance(module, quantum.QuantumLayer)), None)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of parameters: all, and those that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _core(settings: Quantum, arm: str, seed: int) -> nn.Module:
    if arm == "identity":
        return nn.Identity()
    if arm == "twin":
        size = (settings.n_qubits, settings.n_circuit_layers)
        return quantum.TanhMLP(*size, generator=_generator(seed, "twin"))
    circuit = quantum.QuantumLayer(
        settings.n_qubits,
        settings.n_circuit_layers,
        simulator=settings.simulator,
        shots=settings.shots,
        embedding=settings.embedding,
        ansatz=settings.ansatz,
        seed=seed,
        generator=_generator(seed, "circuit"),
    )
    if arm == "frozen":
        circuit.weights.requires_grad_(False)
    return circuit


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each seed and purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
