"""Mutated topology files end as a topology or as errors that name a place, never otherwise."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.errors import DeviceError
from hetero.topology import Topology

SOURCES = [
    """\
devices:
  - {name: host, kind: cpu, api: cpu, memory_bytes: 64 GiB, cores: [0, 1], provenance: {flops: me}}
  - name: h100
    count: 2
    model: NVIDIA H100 SXM5 80GB
    dtype: bf16
    launch_s: 5 us
links:
  - {source: host, target: "h100:*", latency_s: 1e-5, bandwidth: 50 GB/s, duplex: half, shared: pcie}
  - {source: "h100:*", target: "h100:*", latency_s: 2 us, bandwidth: 450 GB/s}
""",
    """\
racks:
  - name: r
    count: 3
    hosts:
      - {name: a, count: 2, devices: [{name: t, count: 4, model: Google TPU v5e, dtype: bf16, power_w: 150 W}]}
      - {name: b, devices: [{name: c, kind: cpu, api: cpu, memory_bytes: 1e12, memory_pool: m}]}
hosts:
  - {name: x, devices: [{name: q, kind: qpu, api: aer, memory_bytes: 1 GiB}]}
links:
  - {source: "*", target: "*", within: rack, latency_s: 1 us, bandwidth: 100 Gbit/s}
  - {source: "*", target: "*", latency_s: 9 us, bandwidth: 10 Gbit/s}
""",
]
TOKENS = st.sampled_from([
    "&a", "*a", "<<: *a", "!!binary QQ==", "!!python/name:os.system", "---", "...", "%YAML 9.9", "\t", "\0", "é", "- ",
    "? ", ": ", "{", "}", "[", "]", "|", "'", '"', "#", "1e999", ".nan", "-.inf", "-1", "0", "9" * 5000, "~", "true",
    "\n", "  ", "[" * 50, "- - - -", "?? ", "? [a, b]\n: 1\n", "count: 0", "count: 999999999", "host: a", "rack: b",
    "within: host", "dtype: int8", "model: x", " GB", " GiB", " us", "e", "*", "**", "[!", "]", "name", "devices:",
    "hosts:", "links:", "racks:", "1 Gb", "\u2028", "\ufeff", "\x85",
])  # fmt: skip
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 12), st.one_of(TOKENS, st.text(max_size=3))), min_size=1, max_size=5
)
PLACE = re.compile(r"fuzz\.yaml:\d+:\d+: .|can't read .*fuzz\.yaml")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("topologies") / "fuzz.yaml"


def mutate(text: str, mutations: list[tuple[int, int, str]]) -> str:
    for at, drop, put in mutations:
        at %= len(text) + 1
        text = text[:at] + put + text[at + drop :]
    return text


def check(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        topology = Topology.from_yaml(file)
    except DeviceError as error:
        for line in error.message.splitlines():
            assert PLACE.search(line), line
    else:
        assert len(topology.components()) == 1
        assert Topology.from_json(topology.to_json()) == topology


def test_the_sources_are_topologies(file):
    for text in SOURCES:
        file.write_text(text)
        Topology.from_yaml(file)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(SOURCES), MUTATIONS)
def test_a_mutated_file_is_a_topology_or_a_placed_error(file, source, mutations):
    check(file, mutate(source, mutations))


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.sampled_from(SOURCES), MUTATIONS)
def test_ten_thousand_mutated_files_are_topologies_or_placed_errors(file, source, mutations):
    check(file, mutate(source, mutations))
