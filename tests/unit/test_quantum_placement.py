"""Aer as a runtime of a planner."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import torch

import quantum
from quantum import placement


def test_aer_is_found_through_its_entry_point():
    (entry,) = importlib.metadata.entry_points(group="hetero.backends", name="aer")
    assert entry.load() is placement


def test_the_device_shares_the_hosts_cores_and_memory():
    (device,) = placement.devices(subdevices=True)
    assert (device["name"], device["api"], device["memory_pool"]) == ("aer", "aer", "host")
    assert device["cores"]
    assert device["memory_bytes"] > 2**20


def test_absence_says_what_to_install(monkeypatch):
    assert placement.absence() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert placement.devices(subdevices=False) == []
    assert placement.absence()["remedy"] == "pip install qiskit-aer"


def test_asking_whether_aer_is_here_loads_no_simulator():
    code = (
        "import sys, quantum.placement as p; p.absence(); p.devices(False);"
        "sys.exit(any(m in sys.modules for m in ('qiskit_aer', 'pennylane')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_a_compiled_stage_is_the_module_and_its_launches_are_counted():
    module = quantum.Bottleneck(8, 3, quantum.QuantumLayer(3, 2))
    x = torch.randn(2, 4, 8)
    run = placement.compile(module, (x, {}), "aer")
    before = placement.launches("aer").get("cx", 0)
    assert torch.equal(run(x, {}), module(x))
    assert placement.launches("aer")["cx"] == before + 2 * 6
    assert placement.torch_device("aer") == "cpu"


def test_measured_rates_are_positive():
    assert all(value > 0 for value in placement.measure(None).values())
