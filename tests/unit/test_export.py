import json

import pytest
import torch
from torch.distributed.pipelining import SplitPoint, pipeline

import lm
from hetero import export
from hetero.cost import Costs, LayerCost, LayerTime
from hetero.device import Device
from hetero.errors import PlacementError
from hetero.planner import given_plan, plan
from hetero.planner.plans import Plan
from hetero.topology import Link, Topology

CONFIG = lm.ModelConfig(family="gpt", n_layer=2, d_model=16, n_head=2, vocab_size=17, seq_len=8)
NAMES = [name for name, _ in lm.Transformer(CONFIG).layers()]


def cluster(*devices):
    """Devices (name, api) that can run every layer, joined by one link, and the model's costs on them."""
    found = tuple(Device(name, "gpu" if api == "cuda" else "cpu", api, 2**33) for name, api in devices)
    times = {device.name: LayerTime(1e-3, 2e-3, 0.1, "given") for device in found}
    costs = Costs(tuple(LayerCost(name, None, 8, 8, 64, 16, 1.0, times) for name in NAMES), 4)
    return costs, Topology(found, (Link("*", "*", 1e-5, 1e9),))


def three_stages():
    costs, topology = cluster(("cuda:1", "cuda"), ("cpu", "cpu"), ("cuda:0", "cuda"))
    return given_plan([("cuda:1", 0, 1), ("cpu", 2, 2), ("cuda:0", 3, 5)], costs, topology), topology


def test_the_device_map_names_each_layer_and_the_number_of_its_device():
    plan_, topology = three_stages()
    expected = [1, 1, "cpu", 0, 0, 0]
    assert export.device_map(plan_, topology) == dict(zip(NAMES, expected, strict=True))


def test_cuda_devices_with_other_names_are_numbered_as_listed():
    costs, topology = cluster(("a100:0", "cuda"), ("h100:0", "cuda"), ("h100:1", "cuda"))
    made = given_plan([("h100:1", 0, 2), ("a100:0", 3, 5)], costs, topology)
    assert list(export.device_map(made, topology).values()) == [2, 2, 2, 0, 0, 0]


def test_accelerate_takes_the_device_map():
    modeling = pytest.importorskip("accelerate.utils.modeling", reason="pip install accelerate")
    accelerate = pytest.importorskip("accelerate")
    plan_, topology = three_stages()
    modeling.check_device_map(lm.Transformer(CONFIG), export.device_map(plan_, topology))
    with pytest.raises(ValueError, match="does not give any device"):
        modeling.check_device_map(lm.Transformer(CONFIG), {"embedding": "cpu"})
    costs, alone = cluster(("cpu", "cpu"))
    model, tokens = lm.Transformer(CONFIG), torch.zeros(2, 8, dtype=torch.long)
    before = model(tokens)
    placed = accelerate.dispatch_model(model, export.device_map(plan(costs, alone), alone))
    assert torch.equal(placed(tokens), before)


def test_a_device_that_accelerate_does_not_know_is_refused():
    costs, topology = cluster(("cpu", "cpu"), ("opencl:0.1", "opencl"))
    made = given_plan([("cpu", 0, 2), ("opencl:0.1", 3, 5)], costs, topology)
    with pytest.raises(PlacementError, match=r"can't address 'opencl:0\.1'") as error:
        export.device_map(made, topology)
    assert "a device of opencl" in str(error.value)


def test_the_pipelining_package_cuts_the_model_where_the_plan_does():
    plan_, _ = three_stages()
    points = export.split_points(plan_)
    assert points == {NAMES[2]: "BEGINNING", NAMES[3]: "BEGINNING"}
    model, tokens = lm.Transformer(CONFIG), torch.zeros(2, 8, dtype=torch.long)
    pipe = pipeline(model, (tokens,), split_spec={name: SplitPoint[where] for name, where in points.items()})
    assert pipe.num_stages == len(plan_.stages)
    for k, stage in enumerate(plan_.stages):
        held = {name for name, _ in pipe.get_stage_module(k).named_parameters()}
        assert held == {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{x}." for x in stage.layers))}
    (output,) = pipe(tokens)
    assert torch.equal(output, model(tokens))


def test_a_plan_of_one_stage_has_no_split_points():
    costs, topology = cluster(("cpu", "cpu"))
    assert export.split_points(plan(costs, topology)) == {}


KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}


def faults(value, schema, root, path="$"):
    """What breaks a JSON schema, by the keywords that ours uses (an unknown keyword is a fault as well)."""
    known = {"type", "properties", "required", "items", "prefixItems", "minItems", "maxItems", "anyOf", "$ref"}
    unknown = set(schema) - known - {"title", "default", "$defs", "$schema", "description", "additionalProperties"}
    found = [f"{path}: unknown keyword {key}" for key in unknown]
    if "$ref" in schema:
        return found + faults(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    if "anyOf" in schema:
        return found + ([] if any(not faults(value, one, root, path) for one in schema["anyOf"]) else [f"{path}: none"])
    kind = schema.get("type")
    if kind and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [*found, f"{path}: {value!r} is no {kind}"]
    if isinstance(value, dict):
        found += [f"{path}: {key} is missing" for key in schema.get("required", ()) if key not in value]
        for key, inner in value.items():
            if key in schema.get("properties", {}):
                found += faults(inner, schema["properties"][key], root, f"{path}.{key}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{path}: {key} is not known")
    if isinstance(value, list):
        prefix = schema.get("prefixItems", [])
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{path}: {len(value)} items")
        for k, inner in enumerate(value):
            one = prefix[k] if k < len(prefix) else schema.get("items", {})
            found += faults(inner, one, root, f"{path}[{k}]")
    return found


def test_plans_keep_to_their_json_schema_and_broken_ones_do_not():
    schema = export.plan_schema()
    costs, topology = cluster(("cpu", "cpu"), ("cuda:0", "cuda"))
    for made in (plan(costs, topology), plan(costs, topology, objective="latency"), three_stages()[0]):
        data = json.loads(json.dumps(made.to_json()))
        assert faults(data, schema, schema) == []
        assert Plan.from_json(data) == made
    assert faults({k: v for k, v in data.items() if k != "value"}, schema, schema) == ["$: value is missing"]
    assert faults(data | {"valeu": 1.0}, schema, schema) == ["$: valeu is not known"]
    assert faults(data | {"value": "fast"}, schema, schema) == ["$.value: 'fast' is no number"]
    assert faults(data | {"interval_s": [1.0]}, schema, schema) == ["$.interval_s: 1 items"]
    stage = data["stages"][0] | {"layers": [3]}
    assert faults(data | {"stages": [stage]}, schema, schema) == ["$.stages[0].layers[0]: 3 is no string"]


@pytest.mark.parametrize("kind", export.FORMATS)
def test_every_format_is_written_whole_to_a_folder_that_is_made(tmp_path, kind):
    plan_, topology = three_stages()
    path = tmp_path / "deep" / "plan.json"
    export.write(kind, path, plan_, topology)
    assert json.loads(path.read_text())
    assert [one.name for one in path.parent.iterdir()] == ["plan.json"]


def test_a_file_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    plan_, topology = three_stages()
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export.write("json", path, plan_, topology)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


def test_an_unknown_format_is_refused(tmp_path):
    plan_, topology = three_stages()
    with pytest.raises(PlacementError, match="no export format 'onnx'"):
        export.write("onnx", tmp_path / "plan", plan_, topology)
