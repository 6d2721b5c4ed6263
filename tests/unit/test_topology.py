import json

import pytest

from hetero.device import Absence, Device
from hetero.errors import DeviceError
from hetero.topology import Link, Topology


def device(name, **fields):
    return Device(name, "cpu", "cpu", 2**30, **fields)


def test_an_unknown_device_is_answered_with_those_that_exist():
    absences = (Absence("opencl", "no platform", "pip install pocl"),)
    topology = Topology((device("cpu", description="EPYC"),), absences=absences)
    with pytest.raises(DeviceError) as error:
        topology.device("opencl:1")
    text = str(error.value)
    for part in (
        "'opencl:1' does not exist",
        "cpu (EPYC, 1.0 GiB)",
        "no platform",
        "pip install pocl",
        "heteroq devices",
    ):
        assert part in text


def test_a_link_counts_in_both_directions_and_the_direction_asked_comes_first():
    links = (Link("a", "b", 1.0, 2.0), Link("b", "a", 5.0, 1.0))
    assert Topology((device("a"), device("b")), links).transfer_s("b", "a", 4) == 9.0
    assert Topology((device("a"), device("b")), links[:1]).transfer_s("b", "a", 4) == 3.0


def test_a_pattern_links_many_devices_and_the_first_match_counts():
    links = (Link("h:0", "h:1", 0.0, 10.0), Link("h:*", "h:*", 1.0, 10.0))
    topology = Topology(tuple(device(f"h:{k}") for k in range(3)), links)
    assert topology.transfer_s("h:0", "h:1", 10) == 1.0
    assert topology.transfer_s("h:0", "h:2", 10) == 2.0
    assert topology.transfer_s("h:2", "h:2", 10) == 0.0


def test_devices_of_one_memory_pool_need_no_link():
    topology = Topology((device("a", memory_pool="host"), device("b", memory_pool="host")))
    assert topology.transfer_s("a", "b", 10**9) == 0.0


def test_devices_without_a_link_are_an_error():
    with pytest.raises(DeviceError, match="no link between 'a' and 'b'"):
        Topology((device("a"), device("b"))).transfer_s("a", "b", 1)


def test_two_devices_of_one_name_are_an_error():
    with pytest.raises(DeviceError, match="listed twice"):
        Topology((device("a"), device("a")))


def test_json_gives_the_same_topology_back():
    links = (Link("a", "b", 0.0, float("inf")), Link("a", "*", 1e-6, 1e9, "measured"))
    topology = Topology((device("a", cores=(0, 1)), device("b")), links, (Absence("cuda", "no driver", "install"),))
    text = json.dumps(topology.to_json(), allow_nan=False)
    assert Topology.from_json(json.loads(text)) == topology


GOOD = """\
devices:
  - {name: host, kind: cpu, api: cpu, memory_bytes: 64 GiB, cores: [0, 1]}
  - name: h100
    count: 2
    kind: gpu
    api: cuda
    memory_bytes: 80e9
    flops: 6.7e13
    provenance: {flops: data sheet}
links:
  - {source: host, target: "h100:*", latency_s: 1e-5, bandwidth: 5e10}
  - {source: "h100:*", target: "h100:*", latency_s: 2e-6, bandwidth: 4.5e11}
"""


def write(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_simulated_devices(tmp_path):
    topology = Topology.from_yaml(write(tmp_path, GOOD))
    assert topology.names == ("host", "h100:0", "h100:1")
    assert all(device.simulated for device in topology.devices)
    assert topology.device("host").memory_bytes == 64 * 2**30
    assert topology.device("h100:1").flops == 6.7e13
    assert topology.transfer_s("h100:1", "host", 5e10) == pytest.approx(1.00001)


@pytest.mark.parametrize(
    ("old", "new", "place", "text"),
    [
        ("flops: 6.7e13", "flops: fast", ":8:12: devices[1].flops", "'fast'; expected a number"),
        ("flops: 6.7e13", "flops: -1", ":8:12: devices[1].flops", "not negative"),
        ("flops: 6.7e13", "flop: 1", ":8:5: devices[1].flop", "unknown key"),
        ("memory_bytes: 80e9", "memory_bytes: 80 apples", ":7:19: devices[1].memory_bytes", "such as 80 GiB"),
        ("kind: gpu", "kind: toaster", ":5:11: devices[1].kind", "expected cpu or gpu"),
        ("    kind: gpu\n", "", ":3:5: devices[1].kind", "missing"),
        ("bandwidth: 5e10", "bandwidth: 0", "links[0].bandwidth", "expected more"),
        ("    count: 2\n", "    count: two\n", ":4:12: devices[1].count", "whole number"),
        ("memory_bytes: 80e9", "memory_bytes: 1e999", ":7:19: devices[1].memory_bytes", "such as 80 GiB"),
        ("name: h100", "name: host", ":1:1: devices", ""),
        ("source: host", "source: hots", ":11:5: links[0].source", "'hots' matches no device; there are host, h100:0"),
        ('target: "h100:*", latency_s: 2e-6', "target: h100, latency_s: 2e-6", "links[1].target", "'h100' matches no"),
        ("bandwidth: 4.5e11", "bandwidth: 1, duplex: half", "links[1].duplex", "unknown key"),
    ],
)
def test_a_fault_in_a_file_is_named_with_its_place(tmp_path, old, new, place, text):
    changed = GOOD.replace(old, new, 1)
    if new == "name: host":
        changed = changed.replace("    count: 2\n", "")
    path = write(tmp_path, changed)
    with pytest.raises(DeviceError) as error:
        Topology.from_yaml(path)
    assert f"{path}" in str(error.value)
    assert place in str(error.value)
    assert text in str(error.value)


def test_all_faults_of_a_file_are_named_at_once(tmp_path):
    path = write(tmp_path, GOOD.replace("kind: gpu", "kind: x").replace("latency_s: 1e-5", "latency_s: soon"))
    with pytest.raises(DeviceError) as error:
        Topology.from_yaml(path)
    assert "devices[1].kind" in str(error.value)
    assert "links[0].latency_s" in str(error.value)


@pytest.mark.parametrize("text", ["", "devices: [", "- 1", "devices: {}", "devices: []", "devices: \x01"])
def test_what_is_no_topology_is_an_error(tmp_path, text):
    with pytest.raises(DeviceError):
        Topology.from_yaml(write(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DeviceError, match="No such file"):
        Topology.from_yaml(tmp_path / "nowhere.yaml")
