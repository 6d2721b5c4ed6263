import json
import random
from fnmatch import fnmatchcase

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


def test_a_link_counts_in_both_directions_unless_another_is_for_the_way_back():
    links = (Link("a", "b", 1.0, 2.0), Link("b", "a", 5.0, 1.0))
    assert Topology((device("a"), device("b")), links).transfer_s("b", "a", 4) == 9.0
    assert Topology((device("a"), device("b")), links[:1]).transfer_s("b", "a", 4) == 3.0


def test_a_link_listed_first_counts_before_one_for_all_in_both_directions():
    links = (Link("a", "b", 0.0, 8.0), Link("*", "*", 0.0, 1.0))
    topology = Topology((device("a"), device("b")), links)
    assert topology.link("a", "b").bandwidth == topology.link("b", "a").bandwidth == 8.0


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
        ("flops: 6.7e13", "flops: fast", ":8:12: devices[1].flops", "'fast'; expected 67 TFLOP/s"),
        ("flops: 6.7e13", "flops: -1", ":8:12: devices[1].flops", "not negative"),
        ("flops: 6.7e13", "flop: 1", ":8:5: devices[1].flop", "unknown key; did you mean 'flops'?"),
        ("memory_bytes: 80e9", "memory_bytes: 80 apples", ":7:19: devices[1].memory_bytes", "expected 80 GiB"),
        ("memory_bytes: 80e9", "memory_bytes: 0", ":7:19: devices[1].memory_bytes", "expected more"),
        ("kind: gpu", "kind: toaster", ":5:11: devices[1].kind", "expected cpu or gpu"),
        ("    kind: gpu\n", "", ":3:5: devices[1].kind", "missing"),
        ("bandwidth: 5e10", "bandwidth: 0", "links[0].bandwidth", "expected more"),
        ("    count: 2\n", "    count: two\n", ":4:12: devices[1].count", "whole number"),
        ("memory_bytes: 80e9", "memory_bytes: 1e999", ":7:19: devices[1].memory_bytes", "expected 80 GiB"),
        ("memory_bytes: 80e9", "memory_bytes: .nan", ":7:19: devices[1].memory_bytes", "expected 80 GiB"),
        ("flops: 6.7e13", "flops: .nan", ":8:12: devices[1].flops", "not negative"),
        ("    count: 2\n", "    count: 0\n", ":4:12: devices[1].count", "at least 1"),
        ("    count: 2\n", "    count: 99999999\n", ":3:5: devices[1].count", "at most 1000000"),
        ("name: h100", "name: host", ":3:5: devices[1]", "'host' is listed twice"),
        ("source: host", "source: hots", ":11:14: links[0].source", "'hots' matches no device; there are host, h100:0"),
        ('target: "h100:*", latency_s: 2e-6', "target: h100, latency_s: 2e-6", "links[1].target", "'h100' matches no"),
        ("bandwidth: 4.5e11", "bandwidth: 1, duplex: both", "links[1].duplex", "expected full or half"),
        ("bandwidth: 4.5e11", "bandwidth: 400 Gb", "links[1].bandwidth", "'400 Gb'; expected 25 GB/s"),
        ("latency_s: 2e-6", "latency_s: 2 weeks", "links[1].latency_s", "'2 weeks'; expected 5 us"),
        ("bandwidth: 4.5e11", "bandwidth: 1, within: host", "links[1].within", "no device is in a host"),
        ("kind: gpu", "dtype: bf16", ":5:12: devices[1].dtype", "there is none"),
        (
            "source: host",
            'source: "h100:0"',
            ":11:3: links",
            "nothing joins these parts of the topology: host | h100:0",
        ),
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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "devices: [",
        "- 1",
        "devices: {}",
        "devices: []",
        "hosts: [{name: h, devices: []}]",
        "devices: \x01",
        "devices: " + "[" * 2000,
        "a: &a [*a]",
    ],
)
def test_what_is_no_topology_is_an_error(tmp_path, text):
    with pytest.raises(DeviceError):
        Topology.from_yaml(write(tmp_path, text))


def test_sizes_and_rates_may_have_units(tmp_path):
    text = """
devices:
  - {name: a, kind: cpu, api: cpu, memory_bytes: 1.5 GiB, flops: 2 TFLOP/s, bandwidth: 100 GB/s, launch_s: 5 us}
  - {name: b, kind: cpu, api: cpu, memory_bytes: 1 kB, power_w: 0.5 kW, idle_power_w: 30, price_usd_h: 2.5 USD/h}
links:
  - {source: a, target: b, latency_s: 2 ms, bandwidth: 400 Gbit/s, duplex: half, shared: bus}
"""
    topology = Topology.from_yaml(write(tmp_path, text))
    a, b = topology.devices
    assert (a.memory_bytes, a.flops, a.bandwidth, a.launch_s) == (3 * 2**29, 2e12, 1e11, 5e-6)
    assert (b.memory_bytes, b.power_w, b.idle_power_w, b.price_usd_h) == (1000, 500.0, 30.0, 2.5)
    assert topology.link("b", "a") == Link("a", "b", 2e-3, 5e10, duplex="half", shared="bus")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DeviceError, match="No such file"):
        Topology.from_yaml(tmp_path / "nowhere.yaml")


TIERS = """\
racks:
  - name: rack
    count: 2
    hosts:
      - name: node
        count: 2
        devices:
          - {name: gpu, count: 2, model: NVIDIA T4 16GB}
          - {name: cpu, kind: cpu, api: cpu, memory_bytes: 64 GiB, cores: [0, 1], memory_pool: ram}
devices:
  - {name: qpu, kind: qpu, api: aer, memory_bytes: 1 GiB}
links:
  - {source: "*/cpu", target: "*/gpu:*", within: host, latency_s: 1e-6, bandwidth: 4, shared: bus, duplex: half}
  - {source: "*", target: "*", within: host, latency_s: 0, bandwidth: 8}
  - {source: "*", target: "*", within: rack, latency_s: 0, bandwidth: 2, shared: switch}
  - {source: "*", target: "*", latency_s: 0, bandwidth: 1, shared: spine}
"""


def test_hosts_and_racks_make_three_tiers_of_network(tmp_path):
    topology = Topology.from_yaml(write(tmp_path, TIERS))
    assert len(topology.devices) == 1 + 2 * 2 * 3
    gpu = topology.device("rack:1/node:0/gpu:1")
    assert (gpu.host, gpu.rack, gpu.flops) == ("rack:1/node:0", "rack:1", 8.1e12)
    assert topology.link("rack:1/node:0/gpu:0", gpu.name).bandwidth == 8
    assert topology.link(gpu.name, "rack:1/node:0/cpu").bandwidth == 4
    assert topology.link(gpu.name, "rack:1/node:1/cpu").bandwidth == 2
    assert topology.link(gpu.name, "rack:0/node:0/gpu:1").bandwidth == 1
    assert topology.link(gpu.name, "qpu").bandwidth == 1


def test_a_shared_medium_is_one_for_each_host_or_rack_in_which_its_link_is(tmp_path):
    topology = Topology.from_yaml(write(tmp_path, TIERS))
    assert topology.link("rack:1/node:0/gpu:0", "rack:1/node:0/cpu").shared == "bus of rack:1/node:0"
    assert topology.link("rack:1/node:0/gpu:0", "rack:1/node:1/cpu").shared == "switch of rack:1"
    assert topology.link("rack:1/node:0/gpu:0", "rack:0/node:1/cpu").shared == "spine"


def test_hosts_have_cores_and_memory_of_their_own(tmp_path):
    topology = Topology.from_yaml(write(tmp_path, TIERS))
    hosts = [device for device in topology.devices if device.kind == "cpu"]
    assert len({core for device in hosts for core in device.cores}) == 8
    assert [device.memory_pool for device in hosts] == [f"{device.host}/ram" for device in hosts]


def test_alike_devices_are_one_class_wherever_they_stand(tmp_path):
    topology = Topology.from_yaml(write(tmp_path, TIERS))
    found = {group.name: group for group in topology.classes()}
    assert {name: len(group.members) for name, group in found.items()} == {
        "qpu": 1, "rack/node/gpu": 8, "rack/node/cpu": 4,
    }  # fmt: skip
    assert found["rack/node/cpu"].device == topology.device("rack:0/node:0/cpu")


@pytest.mark.parametrize(
    ("other", "links"),
    [
        (device("d:1", flops=1.0), ()),
        (device("d:1", price_usd_h=1.0), ()),
        (device("d:1", cores=(3,)), ()),
        (device("d:1", memory_pool="ram"), ()),
        (device("d:1"), (Link("d:0", "d:1", 0.0, 1.0),)),
    ],
)
def test_devices_that_differ_in_a_figure_or_link_are_two_classes(other, links):
    topology = Topology((device("d:0"), other), links)
    assert [group.members for group in topology.classes()] == [("d:0",), ("d:1",)]
    assert [group.name for group in topology.classes()] == ["d:0", "d:1"]


def naive_link(topology, source, target):
    """The rule of `Topology.link` as its documentation says it, over all links."""
    a, b = topology.device(source), topology.device(target)
    near = {"": True, "host": a.host != "" and a.host == b.host, "rack": a.rack != "" and a.rack == b.rack}
    for link in topology.links:
        if near[link.within] and fnmatchcase(source, link.source) and fnmatchcase(target, link.target):
            return link
        if near[link.within] and fnmatchcase(target, link.source) and fnmatchcase(source, link.target):
            ends = (link.target, link.source, link.within)
            return next((one for one in topology.links if (one.source, one.target, one.within) == ends), link)
    return None


def reaches(topology, source):
    """Names that a search from one device over direct links finds."""
    found, todo = {source}, [source]
    while todo:
        name = todo.pop()
        for other in topology.devices:
            pool = topology.device(name).memory_pool
            joined = naive_link(topology, name, other.name) or (pool and pool == other.memory_pool)
            if other.name not in found and joined:
                found.add(other.name)
                todo.append(other.name)
    return found


def random_topology(rng):
    devices = [
        device(
            f"{rng.choice('ab')}:{k}",
            host=rng.choice(["", "h0", "h1"]),
            rack=rng.choice(["", "r0", "r1"]),
            memory_pool=rng.choice(["", "", "", "p"]),
        )
        for k in range(rng.randint(1, 7))
    ]
    patterns = ["*", "a:*", "b:*", "*:[0-2]", devices[0].name, devices[-1].name]
    links = [
        Link(rng.choice(patterns), rng.choice(patterns), 0.0, k + 1.0, within=rng.choice(["", "host", "rack"]))
        for k in range(rng.randint(0, 3))
    ]
    return Topology(tuple(devices), tuple(links))


def test_links_and_parts_of_random_topologies_are_those_of_a_search():
    rng = random.Random(0)
    split = 0
    for _ in range(500):
        topology = random_topology(rng)
        for a in topology.names:
            for b in topology.names:
                expected = naive_link(topology, a, b)
                if expected is not None:
                    assert topology.link(a, b) == expected
                elif a != b and not (topology.device(a).memory_pool and topology.device(b).memory_pool):
                    with pytest.raises(DeviceError, match="no link between"):
                        topology.link(a, b)
        parts = topology.components()
        split += len(parts) > 1
        assert sorted(name for part in parts for name in part) == sorted(topology.names)
        for part in parts:
            assert reaches(topology, part[0]) == set(part)
    assert 100 < split < 450
