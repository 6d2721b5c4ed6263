"""Every shipped configuration says at its head how to run it, how long that takes and what comes out.

    # Command: heteroq run experiments/configs/NAME.yaml
    # Time: about 4 min on 2 cores
    # Expect: ARM.FIGURE = VALUE +- TOLERANCE            of the command as it stands; checked by the slow tests
    # Smoke: a.b=c ...                                   overrides that make it a matter of seconds
    # Smoke expects: ARM.FIGURE = VALUE +- TOLERANCE     of the command with them; checked here

FIGURE is a mean of `summary.json` (test_loss, val_loss) or `plan_ms`, the predicted time of a step. Losses don't depend
on the machine but for rounding; planned times of simulated devices don't at all. Measured times are never checked.
"""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

import experiments
from experiments import cli, config_file

CONFIGS = Path(str(files("experiments"))) / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.endswith("_topology"))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIGURE = re.compile(r"(\w+)\.(\w+) = ([-\d.e]+) \+- ([\d.e]+)")


def head(name):
    """Key -> values of the comment lines on top of a configuration."""
    found = {}
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if match := re.match(r"# (Command|Time|Expect|Smoke|Smoke expects): (.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def figures(lines):
    """(arm, figure) -> (value, tolerance)."""
    matches = [FIGURE.fullmatch(line.strip()) for line in lines]
    assert all(matches), lines
    return {(m[1], m[2]): (float(m[3]), float(m[4])) for m in matches}


def check(name, lines, overrides, tmp_path, capsys):
    """Compare the stated figures; the run's summary, None of one that is only planned."""
    path = CONFIGS / f"{name}.yaml"
    summary = None
    if head(name)["Command"][0].startswith("heteroq plan"):
        assert cli.main(["plan", str(path), *overrides, "--json"]) == 0
        plans = json.loads(capsys.readouterr().out)["arms"]
        found = {(arm, "plan_ms"): 1e3 * plan["value"] for arm, plan in plans.items()}
    else:
        summary = experiments.run(path, overrides, out=tmp_path / "out").summary
        found = {(arm, key): value for arm, c in summary["arms"].items() for key, value in c["mean"].items()}
    for key, (value, tolerance) in figures(lines).items():
        assert found[key] == pytest.approx(value, abs=tolerance), key
    return summary


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETEROQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_there_are_those_that_the_readme_names():
    assert NAMES == ["classical", "cluster", "llama", "opencl", "quickstart", "shots"]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_has_command_time_and_figures(name):
    lines = head(name)
    verb = "plan" if name == "cluster" else "run"
    assert lines["Command"] == [f"heteroq {verb} experiments/configs/{name}.yaml"]
    assert re.fullmatch(r"about \d+ (s|min) on 2 cores", lines["Time"][0])
    assert figures(lines["Expect"])
    if verb == "run":
        assert figures(lines["Smoke expects"])


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_form_gives_the_stated_figures(name, tmp_path, capsys):
    lines = head(name)
    if name == "cluster":  # as fast as it stands
        check(name, lines["Expect"], [], tmp_path, capsys)
    else:
        check(name, lines["Smoke expects"], lines["Smoke"][0].split(), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "cluster"])
def test_the_whole_run_gives_the_stated_figures(name, tmp_path, capsys):
    summary = check(name, head(name)["Expect"], [], tmp_path, capsys)
    if name == "quickstart":
        for seed, figures in summary["arms"]["baseline"]["seeds"].items():
            assert figures["test_loss"] <= summary["floors"]["bigram"] - 0.1, seed


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cluster"])
def test_rates_of_arms_that_are_compared_were_tuned_with_seeds_that_the_run_does_not_use(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from tune_learning_rates import TUNING_SEED

    config = config_file.load(CONFIGS / f"{name}.yaml").config
    assert TUNING_SEED not in config.seeds
    if len(config.arms) > 1:
        assert f"seed {TUNING_SEED}" in (config.train.tuning or "")


RESULTS = {name: sorted(BENCHMARKS.glob(f"results/learning_rates_{name}_*.json")) for name in NAMES}


@pytest.mark.parametrize("name", [name for name, files in RESULTS.items() if files])
def test_rates_are_the_best_of_their_tuning(name):
    config = config_file.load(CONFIGS / f"{name}.yaml").config
    best = json.loads(RESULTS[name][-1].read_text())["best"]
    assert best == {arm: config.train.rate(arm) for arm in config.arms}


def test_the_schema_for_editors_is_the_programs_own(capsys):
    assert cli.main(["schema"]) == 0
    assert json.loads((CONFIGS / "schema.json").read_text()) == json.loads(capsys.readouterr().out)


def test_a_simulated_cluster_is_refused_by_run(tmp_path, capsys):
    code = cli.main(["run", str(CONFIGS / "cluster.yaml"), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code == 2
    assert "plan.topology: nothing can run on simulated devices: host, h100:0" in err
    assert not (tmp_path / "out").exists()
