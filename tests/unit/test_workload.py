"""Graphs of operators from files: what is read, what is refused, and what the command prints."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import hetero
from experiments import cli

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def diamond() -> dict[str, Any]:
    """a -> b, c -> d on two accelerators of 100 B and one processor."""
    times = {"a": (2.0, 4.0), "b": (3.0, 6.0), "c": (3.0, 7.0), "d": (1.0, 2.0)}
    nodes = [
        {"id": name, "supportedOnFpga": 1, "fpgaLatency": acc, "cpuLatency": cpu, "isBackwardNode": 0, "size": 40.0}
        for name, (acc, cpu) in times.items()
    ]
    edges = [{"sourceId": a, "destId": b, "cost": 0.5} for a, b in ("ab", "ac", "bd", "cd")]
    return {"maxSizePerFPGA": 100.0, "maxFPGAs": 2, "maxCPUs": 1, "nodes": nodes, "edges": edges}


def written(folder: Path, data: Any) -> Path:
    file = folder / "graph.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def test_file_becomes_arrays_in_its_own_order(tmp_path: Path) -> None:
    data = diamond()
    data["nodes"][1]["supportedOnFpga"] = 0
    workload = hetero.Workload.from_file(written(tmp_path, data))
    assert workload.ids == ("a", "b", "c", "d")
    assert workload.times[1].tolist() == [float("inf"), 6.0]
    assert workload.transfers.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]
    assert workload.devices == ("acc:0", "acc:1", "cpu:0")


def _set(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change one field, e.g. `nodes.0.size`."""

    def change(data: Any) -> None:
        *path, last = where.split(".")
        for key in path:
            data = data[int(key) if key.isdigit() else key]
        data[last] = value

    return change


def _drop(where: str) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        *path, last = where.split(".")
        for key in path:
            data = data[int(key) if key.isdigit() else key]
        del data[last]

    return change


WRONG = {
    "no nodes": (_set("nodes", []), "no operators"),
    "nodes missing": (_drop("nodes"), "no nodes"),
    "edges no list": (_set("edges", {}), "edges is no list"),
    "node no object": (_set("nodes", [1]), "nodes is no list of objects"),
    "id missing": (_drop("nodes.0.id"), "node 0 has no id"),
    "id a list": (_set("nodes.0.id", [1]), "node 0: id is \\[1\\]"),
    "id twice": (_set("nodes.0.id", "b"), "two operators have the id b"),
    "time missing": (_drop("nodes.2.cpuLatency"), "node 'c' has no cpuLatency"),
    "time negative": (_set("nodes.2.cpuLatency", -1.0), "node 'c': cpuLatency is -1.0"),
    "time NaN": (_set("nodes.2.fpgaLatency", float("nan")), "node 'c': fpgaLatency is nan"),
    "time infinite": (_set("nodes.2.fpgaLatency", float("inf")), "node 'c': fpgaLatency is inf"),
    "time too large": (_set("nodes.2.fpgaLatency", 10**400), "node 'c': fpgaLatency is 1000"),
    "time a text": (_set("nodes.2.fpgaLatency", "3"), "node 'c': fpgaLatency is '3'"),
    "time a truth": (_set("nodes.2.fpgaLatency", True), "node 'c': fpgaLatency is True"),
    "size negative": (_set("nodes.3.size", -4), "node 'd': size is -4"),
    "edge to nowhere": (_set("edges.1.destId", "z"), "edge 1: destId 'z' is no node's id"),
    "edge cost missing": (_drop("edges.1.cost"), "edge 1 has no cost"),
    "edge costs differ": (_set("edges.1.cost", 0.6), "node 'a' has edges of cost 0.5 and 0.6"),
    "cycle": (_set("edges.3.destId", "a"), "the graph has a cycle"),
    "loop": (_set("edges.3.destId", "c"), "the graph has a cycle"),
    "half a device": (_set("maxFPGAs", 1.5), "maxFPGAs is 1.5"),
    "fewer than no devices": (_set("maxCPUs", -1), "maxCPUs is -1"),
    "more devices than can be": (_set("maxCPUs", 10**9), "maxCPUs is 1000000000"),
    "support a text": (_set("nodes.0.supportedOnFpga", "0"), "node 'a': supportedOnFpga is '0'"),
    "backward a text": (_set("nodes.0.isBackwardNode", "false"), "node 'a': isBackwardNode is 'false'"),
    "backward two": (_set("nodes.0.isBackwardNode", 2), "node 'a': isBackwardNode is 2"),
    "no device at all": (lambda data: data.update(maxFPGAs=0, maxCPUs=0), "operator 'a' can run on no device"),
    "memory missing": (_drop("maxSizePerFPGA"), "the workload has no maxSizePerFPGA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_field_is_one_message_that_names_file_and_place(tmp_path: Path, case: str) -> None:
    change, message = WRONG[case]
    data = copy.deepcopy(diamond())
    change(data)
    with pytest.raises(hetero.PlacementError, match=message) as raised:
        hetero.Workload.from_file(written(tmp_path, data))
    assert "graph.json" in str(raised.value)


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", "3"])
def test_file_that_holds_no_graph_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(hetero.PlacementError, match=r"graph\.json"):
        hetero.Workload.from_file(written(tmp_path, content))


def test_operator_too_large_is_named_with_bytes_needed_and_free(tmp_path: Path) -> None:
    data = diamond() | {"maxCPUs": 0}
    data["nodes"][3]["size"] = 500.0
    with pytest.raises(hetero.PlacementError, match=r"operator 'd' doesn't fit(?s:.)*500 B needed, 100 B free"):
        hetero.plan_workload(hetero.Workload.from_file(written(tmp_path, data)))


def test_colour_that_no_device_holds_names_its_operators(tmp_path: Path) -> None:
    data = diamond() | {"maxCPUs": 0, "maxFPGAs": 4}
    for node in data["nodes"][:3]:
        node["colorClass"] = "x"
    with pytest.raises(hetero.PlacementError, match=r"operators 'a', 'b', 'c'\.\.\.(?s:.)*120 B needed, 100 B free"):
        hetero.plan_workload(hetero.Workload.from_file(written(tmp_path, data)))


def test_too_little_memory_in_all_says_how_much(tmp_path: Path) -> None:
    data = diamond() | {"maxCPUs": 0, "maxFPGAs": 1}
    with pytest.raises(hetero.PlacementError, match=r"fits into memory(?s:.)*160 B needed in all; 1 acc of 100 B"):
        hetero.plan_workload(hetero.Workload.from_file(written(tmp_path, data)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"objective": "speed"}, "unknown objective 'speed'"), ({"time_limit_s": float("nan")}, "time limit is nan")],
)
def test_request_without_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(hetero.PlacementError, match=message):
        hetero.plan_workload(hetero.Workload.from_json(diamond()), **settings)


def test_command_prints_the_plan_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--workload", str(written(tmp_path, diamond())), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["value"] == printed["lower_bound"]
    assert printed["proof"] == "optimal"
    assert set(printed["assignment"]) == set("abcd")
    assert set(printed["assignment"].values()) <= {"acc:0", "acc:1", "cpu:0"}


def test_command_prints_devices_and_what_simple_placements_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--workload", str(written(tmp_path, diamond()))]) == 0
    printed = capsys.readouterr().out
    assert "optimal" in printed
    assert "<- binds" in printed
    assert "all on one acc" in printed
    assert "acc:0 is too small" in printed


REFUSED = {
    "neither": ([], "neither a configuration nor a workload"),
    "both": (["x.yaml", "--workload", "FILE"], "a configuration and a workload are given"),
    "other option": (["--workload", "FILE", "--topology", "t.yaml"], "--topology is for the plan of a configuration"),
    "objective of a configuration": (["x.yaml", "--objective", "latency"], "--objective is for --workload"),
    "contiguity of a configuration": (["x.yaml", "--no-contiguous"], "--contiguous is for --workload"),
    "missing file": (["--workload", "absent.json"], "can't read the workload absent.json"),
    "unknown objective": (["--workload", "FILE", "--objective", "speed"], "unknown objective 'speed'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_command_refuses_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, message = REFUSED[case]
    file = str(written(tmp_path, diamond()))
    assert cli.main(["plan", *(file if word == "FILE" else word for word in words)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out


def test_command_needs_no_torch(tmp_path: Path) -> None:
    file = str(written(tmp_path, diamond()))
    heavy = ["torch", "pyopencl", "pennylane", "qiskit", "ortools"]
    code = (
        "import sys; from experiments import cli;"
        f"assert cli.main(['plan', '--workload', {file!r}, '--json']) == 0;"
        f"sys.exit(str([name for name in {heavy} if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
