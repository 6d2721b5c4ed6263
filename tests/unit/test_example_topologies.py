"""The example topologies, and the one in the documentation, load and can be planned for."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import cli
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.planner import plan
from hetero.planner.fleet import plan_fleet
from hetero.profiling import profile
from hetero.topology import Topology

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "topologies").glob("*.yaml"))
SMALL = [file for file in FILES if file.stem != "fleet_10000"]


class Layer(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x, context):
        return super().forward(x)


def roofline_costs(topology, n_layers=8, flops=1e12, nbytes=2**27):
    """Equal layers at the peak of each device that has one."""
    times = {
        name: LayerTime(flops / group.device.flops, 2 * flops / group.device.flops, 0.1, "given")
        for group in topology.classes()
        if group.device.flops
        for name in group.members
    }
    layers = (LayerCost(f"l{k}", None, nbytes, nbytes, 2**20, 2**22, flops, times) for k in range(n_layers))
    return Costs(tuple(layers), n_microbatches=4)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_opens_with_what_it_is_and_its_command(file):
    head = file.read_text("utf-8").split("devices:")[0].split("hosts:")[0].split("racks:")[0]
    assert head.startswith("# ")
    assert "# Expect: " in head
    assert re.search(
        rf"^#   heteroq plan experiments/configs/\S+( \S+=\S+)* --topology examples/topologies/{file.name}$", head, re.M
    )
    config = re.search(r"experiments/configs/\S+", head)[0]
    assert (ROOT / config).exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_figure_of_an_example_says_where_it_comes_from(file):
    for group in Topology.from_yaml(file).classes():
        for field in ("flops", "bandwidth", "power_w", "price_usd_h"):
            if getattr(group.device, field) is not None:
                assert group.device.provenance[field]


@pytest.mark.parametrize("file", SMALL, ids=lambda file: file.stem)
def test_a_plan_for_an_example_uses_its_devices(file):
    topology = Topology.from_yaml(file)
    found = plan(roofline_costs(topology), topology, time_limit_s=10.0)
    assert found.lower_bound <= found.value
    assert {stage.device for stage in found.stages} <= set(topology.names)


def test_a_pipeline_of_equal_layers_has_one_on_each_h100():
    topology = Topology.from_yaml(ROOT / "examples/topologies/node_8xh100.yaml")
    found = plan(roofline_costs(topology), topology, time_limit_s=10.0)
    assert {stage.device for stage in found.stages} == {f"dgx/gpu:{k}" for k in range(8)}
    assert found.proof == "optimal"


def test_the_fleet_has_ten_thousand_devices_of_six_kinds_in_three_tiers():
    topology = Topology.from_yaml(ROOT / "examples/topologies/fleet_10000.yaml")
    assert len(topology.devices) == 10_000
    assert len(topology.classes()) == 6
    first = "hopper:7/node:1/gpu:0"
    ways = [topology.link(first, f"hopper:{r}/node:{n}/gpu:5") for r, n in ((7, 1), (7, 2), (8, 1))]
    assert ways[0].bandwidth > ways[1].bandwidth > ways[2].bandwidth
    assert ways[0].latency_s < ways[1].latency_s < ways[2].latency_s


def test_the_fleet_is_planned_as_replicas_with_a_bound():
    topology = Topology.from_yaml(ROOT / "examples/topologies/fleet_10000.yaml")
    found = plan_fleet(roofline_costs(topology), topology, time_limit_s=20.0)
    assert found.throughput <= found.upper_bound
    assert found.gap <= 0.01
    assert found.devices == {group.name: len(group.members) for group in topology.classes()}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "10000 devices are planned as a fleet of replicas, for throughput and without constraints"),
        (["plan.objective=throughput", "--steps", "3"], "--steps is for one pipeline"),
    ],
)
def test_the_command_line_refuses_for_a_fleet_what_is_for_one_pipeline(words, text, capsys):
    file, config = ROOT / "examples/topologies/fleet_10000.yaml", ROOT / "experiments/configs/cluster.yaml"
    assert cli.main(["plan", str(config), *words, "--topology", str(file)]) == 2
    assert text in capsys.readouterr().err


def test_alike_devices_of_the_fleet_are_priced_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    topology = Topology.from_yaml(ROOT / "examples/topologies/fleet_10000.yaml")
    batch = SimpleNamespace(inputs=torch.ones(2, 4), targets=torch.zeros(2, 4), context={})
    costs = profile([("a", Layer())], batch, topology, n_microbatches=2)
    times = costs.layers[0].times
    assert times.keys() == set(topology.names)
    assert len({id(time) for time in times.values()}) == 6
    assert times["hopper:9/node:0/gpu:0"].forward_s < times["compute:9/node:0/cpu"].forward_s


def test_the_command_line_lists_a_file_by_groups_of_alike_devices(capsys):
    assert cli.main(["devices", "--topology", str(ROOT / "examples/topologies/fleet_10000.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20
    row = next(line.split() for line in lines if line.startswith("hopper/node/gpu"))
    assert row[1:3] == ["3200", "gpu"]
    assert "* - * within a rack: 5 us, 40 GB/s, full duplex" in lines


def test_the_command_line_answers_a_wrong_file_with_its_faults_alone(tmp_path, capsys):
    path = tmp_path / "t.yaml"
    path.write_text("devices: [{name: a, model: x}]")
    assert cli.main(["devices", "--topology", str(path)]) == 2
    assert f"error: {path}:1:28: devices[0].model: 'x' is not in the catalogue" in capsys.readouterr().err


def test_the_example_of_the_documentation_is_a_topology(tmp_path):
    [example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "topologies.md").read_text("utf-8"), re.S)
    path = tmp_path / "cluster.yaml"
    path.write_text(example)
    topology = Topology.from_yaml(path)
    assert len(topology.devices) == 2 + 8 * 5
    assert topology.link("node:3/gpu:0", "node:3/cpu").shared == "pcie of node:3"
    assert topology.link("node:3/gpu:0", "node:4/gpu:0").bandwidth == 25e9 / 8
    assert topology.link("slow", "fast").duplex == "half"


def test_the_documentation_has_every_key_that_a_file_may_have(tmp_path):
    text = (ROOT / "docs" / "topologies.md").read_text("utf-8")
    path = tmp_path / "wrong.yaml"
    path.write_text("devices: [{zzzzzz: 1, host: a, rack: b}]\nlinks: [{zzzzzz: 1}]\nhosts: [{zzzzzz: 1}]\nzzzzzz: 1")
    with pytest.raises(Exception, match="unknown key") as error:
        Topology.from_yaml(path)
    keys = {
        key for known in re.findall(r"there are ([\w, ]+)$", error.value.message, re.M) for key in known.split(", ")
    }
    assert len(keys) > 25
    assert {key for key in keys if f"`{key}`" not in text} == set()
