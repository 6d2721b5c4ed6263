"""Whole runs on the CPU and Aer: the folder, the figures in it, the commands around it."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import experiments
from experiments import cli, config_file, record, sweep
from experiments.errors import ConfigError, RunFailedError, RunFolderError

TEXT = "".join(f"{i} times {i % 7} is {i * (i % 7)}, says the table. " for i in range(400))


def settings(folder, **changes):
    """A configuration as a dict, seconds small."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    return {
        "name": "tiny",
        "seeds": [0, 1],
        "arms": ["baseline", "hybrid", "twin"],
        "data": {"path": str(path)},
        "model": {"n_layer": 1, "d_model": 16, "n_head": 2, "seq_len": 16},
        "quantum": {"unit": "block0.mlp", "n_qubits": 2},
        "train": {"steps": 4, "batch_size": 4, "eval_every": 2, "checkpoint_every": 2, "learning_rate": 1e-2},
        "plan": {"devices": ["cpu", "aer"], "n_microbatches": 2, "alternative_steps": 2},
        "comparison": {"margin": 0.05},
    } | changes


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETEROQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """One finished run, read by many tests."""
    folder = tmp_path_factory.mktemp("runs")
    return experiments.run(settings(folder), out=folder / "out")


def read(path):
    return json.loads(path.read_text())


def command(capsys, *words):
    code = cli.main(list(map(str, words)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_leaves_the_files_of_the_house_plan(finished):
    out = finished.out
    for name in ("config.yaml", "environment.json", "tuning.json", "summary.json", "report.html"):
        assert (out / name).stat().st_size > 0, name
    for arm in ("baseline", "hybrid", "twin"):
        for name in ("plan.json", "predicted_trace.json"):
            assert (out / "arms" / arm / name).exists(), (arm, name)
        for seed in (0, 1):
            folder = out / "arms" / arm / f"seed-{seed}"
            for name in ("metrics.jsonl", "timings.jsonl", "trace.json", "status.json", "checkpoints"):
                assert (folder / name).exists(), (arm, seed, name)
            assert read(folder / "status.json")["status"] == "complete"


def test_metrics_have_a_line_for_each_step_and_each_split(finished):
    lines = record.read_lines(finished.out / "arms" / "hybrid" / "seed-1" / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in lines] == [
        (0, "val"), (1, "train"), (2, "train"), (2, "val"), (3, "train"), (4, "train"), (4, "val"), (4, "test"),
    ]  # fmt: skip
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_summary_follows_from_the_metrics(finished):
    summary = finished.summary
    assert summary == read(finished.out / "summary.json")
    losses = {}
    for arm in ("baseline", "hybrid", "twin"):
        for seed in (0, 1):
            lines = record.read_lines(finished.out / "arms" / arm / f"seed-{seed}" / "metrics.jsonl")
            losses[arm, seed] = lines[-1]["loss"]
            assert summary["arms"][arm]["seeds"][str(seed)]["test_loss"] == lines[-1]["loss"]
    pairs = [(c["arm"], c["against"]) for c in summary["comparisons"]]
    assert pairs == [("hybrid", "baseline"), ("twin", "baseline"), ("hybrid", "twin")]
    difference = sum(losses["hybrid", k] - losses["baseline", k] for k in (0, 1)) / 2
    assert summary["comparisons"][0]["difference"] == pytest.approx(difference)
    assert "too few seeds for a claim (n = 2 < 10)" in summary["verdict"]
    assert summary["floors"]["bigram"] < summary["floors"]["unigram"]
    assert summary["floors"] == summary["floors_by_split"]["test"] != summary["floors_by_split"]["val"]


def test_circuits_are_counted_as_a_processor_would_run_them(finished):
    cost = finished.summary["arms"]["hybrid"]["cost"]
    tokens = read(finished.out / "summary.json")["data"]
    n_angles = 2 + 6  # inputs and weights of 2 qubits, 1 layer
    trained = 4 * 4 * 16 * (1 + 2 * n_angles)
    rows = {split: math.ceil((tokens[f"{split}_tokens"] - 1) / 64) * 64 for split in ("val", "test")}
    # Validated at steps 0, 2 and 4, tested once; the windows are filled up to whole batches, and a micro-batch
    # without a target (2 rows of 16) is left out.
    most = trained + 3 * rows["val"] + rows["test"]
    assert most - 4 * 32 <= cost["circuits"] <= most
    assert cost["gates_1q"] > cost["circuits"]
    assert cost["usd"] > 0
    assert finished.summary["arms"]["baseline"]["cost"]["circuits"] == 0


def test_the_hybrids_plan_has_an_aer_stage_and_was_predicted_before(finished):
    plan = read(finished.out / "arms" / "hybrid" / "plan.json")
    assert "aer" in [stage["device"] for stage in plan["stages"] if "block0.mlp" in stage["layers"]]
    arm = finished.summary["arms"]["hybrid"]
    assert arm["plan"]["predicted_s"] == plan["value"]
    assert arm["plan"]["measured_s"] > 0
    first = finished.out / "arms" / "hybrid" / "seed-0" / "metrics.jsonl"
    assert (finished.out / "arms" / "hybrid" / "plan.json").stat().st_mtime_ns <= first.stat().st_mtime_ns


def test_every_possible_single_device_is_measured_and_the_others_say_why_not(finished):
    for name, arm in finished.summary["arms"].items():
        alone = [other for other in arm["alternatives"] if other["name"].endswith(" alone")]
        assert any(other["predicted_s"] for other in alone), name
        for other in alone:
            assert other["reason"] if other["predicted_s"] is None else other["measured_s"] > 0, other


def test_the_twin_has_at_least_the_circuits_parameters_and_at_most_a_qubits_more(finished):
    arms = finished.summary["arms"]
    assert 0 <= arms["twin"]["parameters"] - arms["hybrid"]["parameters"] <= 2


def test_the_record_says_where_learning_rates_come_from(finished):
    tuning = read(finished.out / "tuning.json")
    assert tuning["learning_rates"] == {"baseline": 1e-2, "hybrid": 1e-2, "twin": 1e-2}
    assert "doesn't say how they were found" in tuning["note"]


def test_a_second_run_has_the_same_metrics_bit_for_bit(finished, tmp_path):
    loaded = config_file.load(finished.out / "config.yaml")
    again = experiments.run(loaded.config.model_dump(mode="json"), out=tmp_path / "again", plans=finished.out)
    assert metrics(again.out) == metrics(finished.out)
    assert read(tmp_path / "again/arms/hybrid/plan.json") == read(finished.out / "arms/hybrid/plan.json")


@pytest.mark.parametrize(
    ("changes", "key", "found", "expected"),
    [
        ({"plan": {"n_microbatches": 4}}, "n_microbatches", "2", "4"),
        ({"plan": {"objective": "latency"}}, "objective", "train_step", "latency"),
        ({"plan": {"pins": {"head": "aer"}}}, "pins", "{'head': 'cpu'}", "{'head': 'aer'}"),
        ({"model": {"n_layer": 2}}, "layers", "'block0.mlp', 'head']", "'block1.mlp', 'head']"),
        ({"quantum": {"simulator": "torch"}, "plan": {"devices": ["cpu"]}}, "devices", "'aer'", "['cpu']"),
    ],
)
def test_plans_of_another_configuration_are_refused_before_there_is_a_folder(
    finished, tmp_path, changes, key, found, expected
):
    config = settings(tmp_path, arms=["hybrid"])
    for section, values in changes.items():
        config[section] = config[section] | values
    with pytest.raises(RunFolderError, match=f"plan.json was made for another configuration: {key}") as caught:
        experiments.run(config, out=tmp_path / "out", plans=finished.out)
    assert found in caught.value.found
    assert expected in caught.value.expected
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_is_named_before_there_is_a_folder(tmp_path, cache):
    with pytest.raises(RunFolderError, match=r"can't read .*nothing/arms/baseline/plan\.json"):
        experiments.run(settings(tmp_path), out=tmp_path / "out", plans=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def quick(folder, train=(), **changes):
    """One step of the baseline, without measured alternatives."""
    config = settings(folder, seeds=[0], arms=["baseline"], **changes)
    config["train"] |= {"steps": 1, "eval_every": 1, **dict(train)}
    config["plan"] |= {"alternative_steps": 0}
    return config


@pytest.mark.parametrize("damage", [{"interval_s": [1]}, {"stages": 3}, {"stages": [{"layers": 3}]}])
def test_a_damaged_plan_is_named(finished, tmp_path, damage):
    plans = tmp_path / "plans"
    for arm in ("baseline", "hybrid", "twin"):
        (plans / "arms" / arm).mkdir(parents=True)
        content = read(finished.out / "arms" / arm / "plan.json") | damage
        (plans / "arms" / arm / "plan.json").write_text(json.dumps(content))
    with pytest.raises(experiments.RunFolderError, match=r"baseline.plan\.json is no plan"):
        experiments.run(settings(tmp_path), out=tmp_path / "out", plans=plans)
    assert not (tmp_path / "out").exists()


def test_plans_come_without_the_learning_rates_of_their_run(finished, tmp_path):
    config = quick(tmp_path, {"learning_rate": 3e-2, "tuning": "by hand, on the test split"})
    run = experiments.run(config, out=tmp_path / "out", plans=finished.out)
    tuning = {"learning_rates": {"baseline": 3e-2}, "note": "by hand, on the test split"}
    assert read(run.out / "tuning.json") == run.summary["tuning"] == tuning


@pytest.mark.parametrize("changes", [{}, {"eval_every": 100, "steps": 100, "checkpoint_every": 1}], ids=str)
def test_a_loss_that_is_not_finite_is_named_and_its_weights_are_not_kept(tmp_path, cache, changes):
    config = quick(tmp_path, {"learning_rate": 1e12, "warmup_steps": 0, **changes})
    with pytest.raises(RunFailedError, match=r"baseline, seed 0: ") as caught:
        experiments.run(config, out=tmp_path / "out")
    assert "heteroq run --resume" not in caught.value.remedy
    assert "start a new run with --out DIR" in caught.value.remedy
    folder = tmp_path / "out/arms/baseline/seed-0"
    assert read(folder / "status.json")["status"] == "failed"
    for file in (folder / "checkpoints").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.parametrize("swept", [False, True])
def test_an_impossible_plan_is_named_with_its_place_and_leaves_no_folder(tmp_path, cache, swept):
    config = quick(tmp_path)
    config["plan"] |= {"pins": {"block0.mlp": "aer"}}
    if swept:
        config["sweep"] = {"seeds": [[0], [1]]}
    path = tmp_path / "x.yaml"
    path.write_text("# a comment\n" + json.dumps(config))
    with pytest.raises(ConfigError, match=r"x\.yaml:2:\d+: plan: layer 'block0\.mlp' is pinned to 'aer'"):
        experiments.run(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def metrics(out):
    files = sorted(out.glob("arms/*/seed-*/metrics.jsonl"))
    assert files
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_used_folder_is_refused_with_the_way_on(finished, tmp_path):
    with pytest.raises(experiments.RunFolderError, match="already holds a finished run"):
        experiments.run(settings(tmp_path), out=finished.out)


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the finished run that was interrupted after its last training."""
    out = Path(shutil.copytree(finished.out, tmp_path / "out"))
    (out / "summary.json").unlink()
    return out


def test_settings_that_changed_since_a_seed_was_finished_are_refused(unfinished):
    file = unfinished / "config.yaml"
    file.write_text(file.read_text().replace("weight_decay: 0.1", "weight_decay: 0.2"))
    with pytest.raises(RunFolderError, match=r"another configuration: train\.weight_decay") as caught:
        experiments.resume(unfinished)
    assert (caught.value.found, caught.value.expected) == ("train.weight_decay=0.1", "train.weight_decay=0.2")


def test_a_text_that_changed_since_a_seed_was_finished_is_refused(unfinished, monkeypatch):
    import lm

    load = lm.load_corpus
    text = unfinished / "text.txt"
    text.write_text(TEXT[:-50])
    monkeypatch.setattr(lm, "load_corpus", lambda **words: load(**words | {"path": text}))
    with pytest.raises(RunFolderError, match=r"another configuration: data\.sha256"):
        experiments.resume(unfinished)


def test_resuming_after_the_last_step_keeps_the_measured_trace(unfinished, finished):
    folder = unfinished / "arms/hybrid/seed-1"
    before = read(folder / "trace.json")
    assert [event for event in before["traceEvents"] if event["ph"] == "X" and event["pid"] == 2]
    record.write_json(folder / "status.json", read(folder / "status.json") | {"status": "interrupted"})
    assert metrics(experiments.resume(unfinished).out) == metrics(finished.out)
    assert read(folder / "trace.json") == before


def test_resuming_a_finished_run_reads_it(finished):
    assert experiments.resume(finished.out).summary == finished.summary


def test_report_prints_the_table_and_json(finished, capsys):
    code, out, _ = command(capsys, "report", finished.out)
    assert code == 0
    assert "baseline" in out
    assert "verdict" in out
    code, out, _ = command(capsys, "report", finished.out, "--json")
    assert json.loads(out) == finished.summary


def test_generate_continues_the_prompt(finished, capsys):
    words = ["generate", finished.out, "--prompt", "1 times", "--tokens", "20", "--arm", "hybrid", "--seed", "1"]
    code, out, _ = command(capsys, *words)
    assert code == 0
    assert out.startswith("1 times")
    assert len(out.rstrip("\n")) == len("1 times") + 20
    assert command(capsys, *words)[1] == out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--arm", "frozen"], "the run has no arm 'frozen'\n  found: baseline, hybrid, twin"),
        (["--seed", "7"], "the run has no seed 7\n  found: 0, 1"),
    ],
)
def test_generate_names_what_there_is(finished, capsys, words, expected):
    code, _, err = command(capsys, "generate", finished.out, "--prompt", "1", *words)
    assert code == 2
    assert expected in err


def test_plan_agrees_with_the_run(finished, capsys, tmp_path):
    trace = tmp_path / "trace.json"
    code, out, _ = command(capsys, "plan", finished.out / "config.yaml", "--json", "--trace", trace)
    assert code == 0
    for arm, plan in json.loads(out)["arms"].items():
        ours = read(finished.out / "arms" / arm / "plan.json")
        assert plan["stages"] == ours["stages"]
        assert plan["value"] == ours["value"]
        assert plan["inputs_hash"] == ours["inputs_hash"]
    assert read(trace)["traceEvents"]
    assert (tmp_path / "trace.hybrid.json").exists()


def test_plan_draws_and_explains(finished, capsys):
    code, out, _ = command(capsys, "plan", finished.out / "config.yaml", "arms=[hybrid]")
    assert code == 0
    assert "== hybrid" in out
    assert "aer" in out
    assert "▓" in out  # the schedule
    assert "several runs a device" in out


def test_devices_lists_the_cpu_and_aer(capsys):
    code, out, _ = command(capsys, "devices", "--json")
    assert code == 0
    names = [device["name"] for device in json.loads(out)["devices"]]
    assert {"cpu", "aer"} <= set(names)
    code, out, _ = command(capsys, "devices")
    assert code == 0
    assert "GiB" in out


def test_a_sweep_runs_every_combination_and_resumes(finished, tmp_path):
    config = settings(tmp_path, seeds=[0], arms=["baseline"], sweep={"train.learning_rate": [1e-3, 1e-2]})
    result = experiments.run(config, out=tmp_path / "sweep", plans=finished.out)
    index = read(tmp_path / "sweep" / "sweep.json")
    assert [entry["settings"] for entry in index["runs"]] == [
        {"train.learning_rate": 1e-3},
        {"train.learning_rate": 1e-2},
    ]
    assert len((tmp_path / "sweep" / "table.txt").read_text().splitlines()) == 4
    (tmp_path / "sweep" / "run-000" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "sweep" / "run-001")
    assert experiments.resume(tmp_path / "sweep").summary == result.summary
    plan = read(tmp_path / "sweep/run-001/arms/baseline/plan.json")
    assert plan == read(finished.out / "arms/baseline/plan.json")


def test_a_resumed_sweep_has_the_configurations_that_it_began_with(tmp_path, cache, monkeypatch):
    begun = []

    def note(name, runs, folder, plans):
        begun.append((name, [one.config for _, one in runs]))

    monkeypatch.setattr(sweep, "_execute", note)
    (tmp_path / "b.txt").write_text(TEXT)
    circuit = {"unit": "block0.mlp", "n_qubits": 2}
    config = settings(tmp_path, sweep={"quantum": [None, circuit], "data.path": ["text.txt", "b.txt"]})
    del config["arms"], config["quantum"]
    (tmp_path / "x.yaml").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    experiments.run(tmp_path / "x.yaml", out=tmp_path / "out")
    experiments.resume(tmp_path / "out")
    assert begun[0] == begun[1]
    assert [config.data.path for config in begun[0][1]] == 2 * [str(tmp_path / "text.txt"), str(tmp_path / "b.txt")]
    assert [len(config.arms) for config in begun[0][1]] == [1, 1, 5, 5]
