"""Configurations: every mistake with its place, all in one go; overrides and sweeps by the same rules."""

import re

import pytest

from experiments import config_file
from experiments.config import ARMS, Config, layer_names
from experiments.errors import ConfigError

MINIMAL = "name: tiny\n"
FULL = """\
name: full
seeds: [3, 4]
arms: [baseline, hybrid]
data:
  name: topics
  tokenizer: byte
  split: [0.8, 0.1, 0.1]
model:
  n_layer: 2
  d_model: 32
  n_head: 4
  seq_len: 16
  dropout: 0.1
quantum:
  unit: block1.mlp
  n_qubits: 4
  n_circuit_layers: 2
  simulator: aer
  shots: null
train:
  steps: 10
  batch_size: 8
  learning_rate: {baseline: 1e-3, hybrid: 2e-3}
plan:
  devices: [cpu, "opencl:0.1", aer]
  n_microbatches: 4
  pins: {head: cpu}
comparison:
  margin: 0.02
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config_file.parse(text, "x.yaml", overrides)
    return caught.value.message.split("\n")


def test_a_minimal_configuration_has_defaults_for_the_rest():
    config = config_file.parse(MINIMAL, "x.yaml").config
    assert config.arms == ("baseline",)
    assert config.quantum is None
    assert config.data.name == "topics"


def test_a_quantum_section_means_all_five_arms():
    config = config_file.parse(MINIMAL + "quantum: {unit: block0.mlp, n_qubits: 2}\n", "x.yaml").config
    assert config.arms == ARMS


def test_numbers_follow_yaml_1_2():
    config = config_file.parse(FULL, "x.yaml").config
    assert config.train.rate("baseline") == 1e-3
    assert config.train.rate("hybrid") == 2e-3
    assert config_file.parse("name: no\n", "x.yaml").config.name == "no"
    assert "expected text, found 12" in problems("name: 12\n")[0]
    assert "found '010'" in problems(MINIMAL + "train: {steps: 010}\n")[0]
    assert "found '12:30'" in problems(MINIMAL + "train: {steps: 12:30}\n")[0]


def test_the_resolved_configuration_reads_back_to_the_same():
    config = config_file.parse(FULL, "x.yaml").config
    assert config_file.parse(config_file.resolved_yaml(config), "y.yaml").config == config


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  n_qubits: 4", "  n_qubit: 4", "x.yaml:16:3: quantum.n_qubit: unknown key; did you mean 'n_qubits'?"),
        ("name: full", "nam: full", "x.yaml:1:1: nam: unknown key; did you mean 'name'?"),
        ("  steps: 10", "  steps: ten", "x.yaml:21:10: train.steps: expected a whole number, found 'ten'"),
        ("  steps: 10", "  steps: 1.5", "x.yaml:21:10: train.steps: expected a whole number, found 1.5"),
        ("  steps: 10", "  steps: true", "x.yaml:21:10: train.steps: expected a whole number, found true"),
        ("  steps: 10", "  steps: -1", "x.yaml:21:10: train.steps: has to be at least 1, found -1"),
        ("  steps: 10", "  steps:", "x.yaml:21:9: train.steps: expected a whole number, found nothing"),
        ("  dropout: 0.1", "  dropout: .nan", "x.yaml:13:12: model.dropout: expected a finite number, found nan"),
        ("  dropout: 0.1", "  dropout: 1e999", "x.yaml:13:12: model.dropout: expected a finite number, found inf"),
        ("  dropout: 0.1", "  dropout: 1.0", "x.yaml:13:12: model.dropout: has to be below 1.0, found 1.0"),
        ("  shots: null", "  shots: 0", "x.yaml:19:10: quantum.shots: has to be at least 1, found 0"),
        ("  n_qubits: 4", "  n_qubits: 65", "x.yaml:16:13: quantum.n_qubits: has to be at most 64, found 65"),
        ("  n_head: 4", "  n_head: 5", "x.yaml:11:11: model.n_head: 5 heads don't divide d_model = 32"),
        ("unit: block1.mlp", "unit: block2.mlp", "x.yaml:15:9: quantum.unit: no unit 'block2.mlp'; there are"),
        ("hybrid: 2e-3", "hybird: 2e-3", "23:35: train.learning_rate.hybird: unknown key; did you mean 'hybrid'?"),
        (", hybrid: 2e-3", "", "x.yaml:23:18: train.learning_rate: no learning rate for arm 'hybrid'"),
        ("{head: cpu}", "{heads: cpu}", "x.yaml:27:17: plan.pins.heads: no layer 'heads'; there are"),
        ("{head: cpu}", "{head: gpu}", "x.yaml:27:16: plan.pins.head: 'gpu' is not in plan.devices"),
        ("n_microbatches: 4", "n_microbatches: 3", "3 micro-batches don't divide train.batch_size = 8"),
        (', aer]', ']', "x.yaml:25:12: plan.devices: circuits need the device 'aer' in this list"),
        ("seeds: [3, 4]", "seeds: [3, 3]", "x.yaml:2:12: seeds.1: 3 is listed twice"),
        ("seeds: [3, 4]", "seeds: []", "x.yaml:2:8: seeds: has to have at least 1 entries, found a list"),
        ("seeds: [3, 4]", "seeds: 3", "x.yaml:2:8: seeds: expected a list, found 3"),
        ("[0.8, 0.1, 0.1]", "[0.8, 0.1, 0.2]", "data.split: the three shares have to be above 0 and add up to 1"),
        ("  name: topics", "  name: topics\n  path: a.txt", "x.yaml:6:9: data.path: both a name and a path are given"),
        ("  steps: 10", "  steps: 10\n  steps: 11", "22:3: train.steps: duplicate key (first on line 21); remove one"),
        ("model:\n", "model: 3\nx:\n", "x.yaml:8:8: model: expected a section of 'key: value', found 3"),
        ("simulator: aer", "simulator: aerr", "; found 'aerr'; did you mean 'aer'?"),
        ("name: full", "name: ../evil", "x.yaml:1:7: name: '../evil' is not a name"),
        ("  shots: null", "  steps: 3", "x.yaml:19:3: quantum.steps: unknown key; did you mean 'train.steps'?"),
        ("model:", "model:\n  family: lama", "expected one of gpt, llama; found 'lama'; did you mean 'llama'?"),
        ("model:", "model:\n  family: bert", "9:11: model.family: an experiment compares losses of the next token"),
        ("model:", "model:\n  n_kv_head: 3", "9:14: model.n_kv_head: 3 heads of keys and values don't divide"),
        ("model:", "model:\n  rope_base: 10", "9:14: model.rope_base: family 'gpt' has no rotary positions"),
        ("model:", "model:\n  rope_bas: 10", "9:3: model.rope_bas: unknown key; did you mean 'rope_base'?"),
        ("model:", "model:\n  norm_eps: 0", "9:13: model.norm_eps: has to be above 0.0, found 0"),
        ("model:", "model:\n  d_ff: 1.5", "9:9: model.d_ff: expected a whole number, found 1.5"),
        ("n_head: 4", "n_head: 32\n  family: llama", "11:11: model.n_head: rotary positions need heads of even width"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(old, new, expected):
    assert old in FULL
    found = problems(FULL.replace(old, new, 1))
    assert any(expected in line for line in found), found


def test_all_mistakes_are_reported_at_once_and_in_order():
    text = (
        FULL.replace("  steps: 10", "  stepz: 10")
        .replace("n_head: 4", "n_head: 5")
        .replace("n_qubits: 4", "n_qubits: x")
    )
    found = problems(text, "plan.n_microbatches=3", "model.nlayer=2")
    assert [line.split(": ")[0] for line in found] == [
        "x.yaml:11:11",
        "x.yaml:16:13",
        "x.yaml:21:3",
        "override 'plan.n_microbatches=3'",
        "override 'model.nlayer=2'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml:1:1: empty document"),
        ("- a\n", "x.yaml:1:1: expected settings"),
        ("name: &a x\nseeds: *a\n", "x.yaml:1:7: anchors and aliases are not supported"),
        ("name: !!python/object/apply:os.system ['true']\n", "x.yaml:1:7: tag"),
        ("name: x\n---\nname: y\n", "x.yaml:2:1:"),
        ("name: [\n", "x.yaml:2:1:"),
        ("name: x\0\n", "x.yaml:1:8: not YAML"),
        ("name: \ud800\n", "x.yaml: not text (lone surrogate at character 6)"),
        ("a: " + "[" * 40, "nested deeper than 32 levels"),
        ("#" * ((1 << 20) + 1), "x.yaml: larger than 1 MiB"),
        ("? [a]\n: 1\n", "a key has to be a plain word"),
        ("seeds: [" + "9" * 5000 + "]\n", "can't be read as a whole number"),
    ],
)
def test_what_is_no_configuration_is_refused(text, expected):
    assert expected in problems(text)[0]


def test_overrides_replace_values_and_fill_absent_sections():
    overrides = ["train.steps=5", "seeds=[7]", "quantum.unit=block0.mlp", "quantum.n_qubits=3", "train.grad_clip=null"]
    config = config_file.parse(MINIMAL, "x.yaml", overrides).config
    assert (config.train.steps, config.seeds, config.train.grad_clip) == (5, (7,), None)
    assert config.quantum is not None
    assert config.quantum.n_qubits == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=5", "override 'train.stepz=5': train.stepz: unknown key; did you mean 'steps'?"),
        ("trian.steps=5", "override 'trian.steps=5': trian: unknown key; did you mean 'train'?"),
        ("train.steps", "override 'train.steps': expected KEY=VALUE"),
        ("=3", "override '=3': expected KEY=VALUE"),
        ("seeds.x=3", "override 'seeds.x=3': seeds: not a section"),
        ("train.steps=[1", "override 'train.steps=[1':"),
        ("plan.devices=[cpu, 3]", "override 'plan.devices=[cpu, 3]': plan.devices.1: expected text"),
        ("train.steps=*a", "anchors and aliases are not supported"),
    ],
)
def test_a_wrong_override_is_named(override, expected):
    assert any(expected in line for line in problems(FULL, override))


def test_a_layers_dotted_name_is_one_key_of_the_pins():
    config = config_file.parse(MINIMAL, "x.yaml", ["plan.pins.block0.mlp=cpu"]).config
    assert config.plan.pins == {"block0.mlp": "cpu"}
    runs = config_file.expand(config_file.parse(MINIMAL, "x.yaml", ["sweep.plan.pins.block0.mlp=[cpu, aer]"]))
    assert [run.config.plan.pins for _, run in runs] == [{"block0.mlp": "cpu"}, {"block0.mlp": "aer"}]


def test_a_sweep_is_the_grid_of_its_lists():
    text = MINIMAL + "sweep: {train.steps: [5, 6], model.d_model: [32, 64, 128]}\n"
    runs = config_file.expand(config_file.parse(text, "x.yaml"))
    assert [settings for settings, _ in runs][:2] == [
        {"train.steps": 5, "model.d_model": 32},
        {"train.steps": 5, "model.d_model": 64},
    ]
    assert len(runs) == 6
    assert runs[5][1].config.model.d_model == 128
    assert runs[5][1].config.sweep == {}


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("train.steps: [5, x]", "x.yaml:2:26: train.steps: expected a whole number, found 'x'"),
        ("train.stepz: [5]", "x.yaml:2:23: train.stepz: unknown key; did you mean 'steps'?"),
        ("model.n_head: [4, 3]", "x.yaml:2:27: model.n_head: 3 heads don't divide d_model = 64"),
        ("name: [a, b]", "x.yaml:2:16: sweep.name: can't be varied"),
        ("train.steps: []", "x.yaml:2:22: sweep.train.steps: has to have at least 1 entries"),
        ("train.steps: 5", "x.yaml:2:22: sweep.train.steps: expected a list, found 5"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(sweep, expected):
    assert any(expected in line for line in problems(f"name: x\nsweep: {{{sweep}}}\n"))


def test_a_sweep_of_too_many_runs_is_refused():
    values = ", ".join(map(str, range(1, 41)))
    assert "1600 combinations" in problems(f"name: x\nsweep: {{train.steps: [{values}], seeds: [{values}]}}\n")[0]


def test_a_sweep_can_come_from_the_command_line():
    loaded = config_file.parse(MINIMAL, "x.yaml", ["sweep.train.steps=[1, 2]"])
    assert len(config_file.expand(loaded)) == 2


def test_a_dict_is_checked_by_the_same_rules():
    assert config_file.load({"name": "x", "train": {"steps": 3}}).config.train.steps == 3
    with pytest.raises(ConfigError, match=r"config: train\.stepz: unknown key; did you mean 'steps'\?"):
        config_file.load({"name": "x", "train": {"stepz": 3}})


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "No such file"), (b"name: \xff\n", "not UTF-8"), (b"name: x\n" * 200_000, "larger than 1 MiB")],
)
def test_an_unreadable_file_is_named(tmp_path, content, expected):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        config_file.load(path)
    assert str(path) in caught.value.message


def test_a_text_is_looked_for_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("beside")
    (tmp_path / "x.yaml").write_text("name: x\ndata: {path: text.txt}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert config_file.load(tmp_path / "x.yaml").config.data.path == str(tmp_path / "text.txt")
    given = config_file.load(tmp_path / "x.yaml", ["data.path=text.txt"]).config.data.path
    assert given == str(elsewhere / "text.txt")


def test_the_texts_of_a_sweep_are_looked_for_as_a_single_one_is(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("beside")
    (tmp_path / "x.yaml").write_text("name: x\nsweep: {data.path: [a.txt, b.txt]}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def paths(*overrides):
        return [run.config.data.path for _, run in config_file.expand(config_file.load(tmp_path / "x.yaml", overrides))]

    assert paths() == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert paths("sweep.data.path=[c.txt]") == [str(elsewhere / "c.txt")]


def test_a_varied_run_finds_its_one_text_beside_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("beside")
    (tmp_path / "x.yaml").write_text("name: x\ndata: {path: text.txt}\nsweep: {train.steps: [1, 2]}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = config_file.expand(config_file.load(tmp_path / "x.yaml"))
    assert {run.config.data.path for _, run in runs} == {str(tmp_path / "text.txt")}


def test_the_schema_lists_every_section_with_descriptions():
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["$defs"]["Train"]["properties"]["batch_size"]["description"] == "Sequences a step."
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_layer_names_are_those_of_the_transformer(family):
    import lm

    config = config_file.parse(FULL, "x.yaml", [f"model.family={family}"]).config
    size = lm.ModelConfig(n_layer=2, d_model=32, n_head=4, vocab_size=5, seq_len=16, family=family)
    assert layer_names(config.model) == [name for name, _ in lm.Transformer(size).layers()]


def test_every_setting_of_the_model_reaches_it():
    from experiments import arms

    settings = {"family": "llama", "n_kv_head": 2, "d_ff": 20, "norm_eps": 1e-3, "rope_base": 50.0, "dropout": 0.2}
    overrides = [f"model.{key}={value}" for key, value in settings.items()]
    loaded = config_file.parse(MINIMAL, "x.yaml", overrides)
    assert config_file.parse(config_file.resolved_yaml(loaded.config), "y.yaml").config == loaded.config
    model = arms.build(loaded.config, "baseline", 0, 11)
    assert {key: getattr(model.config, key) for key in settings} == settings
    dumped = loaded.config.model.model_dump()
    assert dumped == {key: getattr(model.config, key) for key in dumped}
