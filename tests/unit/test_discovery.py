"""What `discover` lists, chooses and explains; fake runtimes stand for the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from hetero import cache, discovery
from hetero.backends import all_backends, cpu
from hetero.device import Device
from hetero.discovery import discover, measure
from hetero.errors import DeviceError


class FakeOpenCL:
    """A runtime with one device of as many cores as the host and its sub-devices."""

    def __init__(self, present: bool = True) -> None:
        self.present = present

    def devices(self, subdevices: bool) -> list[dict[str, Any]]:
        cores = (0, 1, 2, 3)
        whole = {"name": "opencl:0", "kind": "cpu", "api": "opencl", "memory_bytes": 1, "cores": cores}
        parts = [{**whole, "name": f"opencl:0.{k}", "cores": (k,)} for k in cores]
        return [whole, *(parts if subdevices else [])] if self.present else []

    def absence(self) -> dict[str, str] | None:
        return None if self.present else {"api": "opencl", "reason": "no platform", "remedy": "pip install pocl"}

    def measure(self, device: Device) -> dict[str, float]:
        return {"flops": 5e9, "bandwidth": 2e9, "launch_s": 1e-6}


class FakeAer:
    def devices(self, subdevices: bool) -> list[dict[str, Any]]:
        return [{"name": "aer", "kind": "qpu", "api": "aer", "memory_bytes": 1, "cores": (0, 1, 2, 3)}]

    def absence(self) -> None:
        return None


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    """Four cores, an OpenCL device, Aer, no GPU."""
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "host_cores", lambda: (0, 1, 2, 3))
    monkeypatch.setitem(all_backends(), "opencl", FakeOpenCL())
    monkeypatch.setitem(all_backends(), "aer", FakeAer())


def test_everything_is_listed_the_cpu_first():
    names = discover().names
    assert names[0] == "cpu"
    assert {"opencl:0", "opencl:0.0", "opencl:0.3", "aer"} <= set(names)
    assert names.index("opencl:0") < names.index("opencl:0.0") < names.index("aer")


def test_sub_devices_are_left_out_on_request():
    assert not [name for name in discover(subdevices=False).names if "." in name]


def test_the_cpu_computes_off_the_cores_of_chosen_sub_devices():
    topology = discover(["cpu", "opencl:0.1", "opencl:0.3"])
    assert topology.names == ("cpu", "opencl:0.1", "opencl:0.3")
    assert topology.device("cpu").cores == (0, 2)
    assert topology.device("opencl:0.1").cores == (1,)


def test_aer_shares_the_cores_of_the_cpu():
    topology = discover(["cpu", "opencl:0.1", "aer"])
    assert topology.device("aer").cores == topology.device("cpu").cores == (0, 2, 3)


def test_the_cpu_keeps_all_cores_where_nothing_else_would_be_left():
    topology = discover(["cpu", "opencl:0"])
    assert topology.device("cpu").cores == topology.device("opencl:0").cores == (0, 1, 2, 3)


def test_a_device_and_its_part_are_not_chosen_together():
    with pytest.raises(DeviceError, match=r"'opencl:0.2' is a part of 'opencl:0'"):
        discover(["opencl:0", "opencl:0.2"])


def test_an_unknown_name_is_refused_with_what_exists():
    with pytest.raises(DeviceError, match=r"(?s)'opencl:1' does not exist\n  found: .*opencl:0 .*heteroq devices"):
        discover(["cpu", "opencl:1"])


def test_an_absent_runtime_is_explained_where_its_device_is_asked_for(monkeypatch):
    monkeypatch.setitem(all_backends(), "opencl", FakeOpenCL(present=False))
    absences = {absence.api: absence for absence in discover().absences}
    assert absences["opencl"].remedy == "pip install pocl"
    with pytest.raises(DeviceError, match="opencl is absent: no platform"):
        discover(["opencl:0"])


def test_a_runtime_that_is_not_part_of_this_version_is_named():
    xla = next(absence for absence in discover().absences if absence.api == "xla")
    assert xla.reason
    assert xla.remedy


def test_the_cpu_can_use_no_more_memory_than_there_is():
    memory = discover(["cpu"]).device("cpu").memory_bytes
    assert 2**28 < memory <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_no_device_in_the_hosts_memory_has_more_of_it_than_the_cpu_may_use(monkeypatch):
    fields = FakeAer().devices(True)[0] | {"memory_bytes": 2**40, "memory_pool": "host"}
    monkeypatch.setattr(FakeAer, "devices", lambda *_: [fields, {**fields, "name": "gpu", "memory_pool": ""}])
    monkeypatch.setattr(cpu, "memory_bytes", lambda: 2**30)
    topology = discover()
    assert topology.device("aer").memory_bytes == topology.device("cpu").memory_bytes == 2**30
    assert topology.device("aer").provenance["memory_bytes"] == "operating system"
    assert topology.device("gpu").memory_bytes == 2**40


def test_measurements_are_stored_for_that_device_alone():
    measured = measure(discover().device("opencl:0.1"))
    assert (measured.flops, measured.bandwidth, measured.launch_s) == (5e9, 2e9, 1e-6)
    topology = discover()
    assert topology.device("opencl:0.1").flops == 5e9
    assert topology.device("opencl:0.1").provenance["flops"].startswith("measured 20")
    assert topology.device("opencl:0.2").flops is None


def test_a_measurement_is_void_with_another_driver_or_other_cores():
    device = discover().device("opencl:0.1")
    measure(device)
    key = discovery._measurement_key
    assert key(device) == key(discover().device("opencl:0.1"))
    assert key(device) != key(Device(**{**device.to_json(), "driver": "newer"}))
    assert key(device) != key(Device(**{**device.to_json(), "cores": (1, 2)}))


def test_a_simulated_device_is_not_measured():
    with pytest.raises(DeviceError, match="simulated"):
        measure(Device("h100:0", "gpu", "cuda", 1, simulated=True))


@pytest.mark.parametrize(
    "text", ['{"figures": {"flo', "{}", "[]", "null", '{"figures": [1]}', '{"date": "", "figures": {"flops": "fast"}}']
)
def test_a_broken_cache_entry_is_ignored(caplog, text):
    device = discover().device("opencl:0.1")
    measure(device)
    for path in (cache.folder() / "devices").iterdir():
        path.write_text(text)
    assert discover().device("opencl:0.1").flops is None
    assert "unreadable" in caplog.text


def test_a_cache_that_can_not_be_written_only_costs_time(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path / "file"))
    assert measure(discover().device("opencl:0.1")).flops == 5e9
    assert "could not be written" in caplog.text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "entry.json"
    cache.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        cache.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["entry.json"]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HETEROQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.folder() == tmp_path / "heteroq"


def test_without_an_opencl_platform_the_reason_and_a_remedy_are_given(tmp_path):
    program = """
from hetero.discovery import discover
from hetero.errors import DeviceError
try:
    discover(["cpu", "opencl:0"])
except DeviceError as error:
    print(error)
"""
    environment = os.environ | {"OCL_ICD_VENDORS": "/nonexistent", "HETEROQ_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    assert "'opencl:0' does not exist" in done.stdout
    assert "opencl is absent" in done.stdout
    assert "pip install" in done.stdout
