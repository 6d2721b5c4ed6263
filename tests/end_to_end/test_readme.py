"""What the README shows works as it stands: its YAML file, its Python, its commands, its error message."""

import re
from pathlib import Path

import pytest

import experiments
from experiments import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMOKE = ["seeds=[0]", "train.steps=2", "plan.alternative_steps=0", "data.split=[0.9,0.05,0.05]"]


def block(language):
    """The README's only code block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_experiment.yaml").write_text(block("yaml"))
    (tmp_path / "my_text.txt").write_text("Words follow words, and letters follow letters. " * 200)
    return tmp_path


def test_the_experiment_runs(folder, capsys):
    assert cli.main(["run", "my_experiment.yaml", *SMOKE, "--out", "out"]) == 0
    assert "verdict" in capsys.readouterr().out
    assert (folder / "out" / "report.html").exists()


def test_the_typo_gets_the_message_shown(folder, capsys):
    path = folder / "my_experiment.yaml"
    path.write_text(path.read_text().replace("{steps:", "{stepz:"))
    assert cli.main(["run", "my_experiment.yaml"]) == 2
    (shown,) = re.findall(r"^    (error: my_experiment.*)$", README, flags=re.MULTILINE)
    assert shown in capsys.readouterr().err


def test_the_python_runs(folder, monkeypatch, capsys):
    real = experiments.run

    def run(config, overrides):
        return real(ROOT / config, [*overrides, *SMOKE, "arms=[baseline]"])

    monkeypatch.setattr(experiments, "run", run)
    exec(compile(block("python"), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "lower bound" in out
    assert "bigram floor" in out


COMMANDS = re.findall(r"^    (heteroq .*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_there_is(line):
    words = re.sub(r"\[[^]]*\]|#.*", "", line).replace("DIR...", "DIR").split()[1:]
    assert words
    assert cli._parse(words).command


def test_all_commands_are_shown():
    shown = {line.split()[1] for line in COMMANDS}
    assert shown == {"devices", "plan", "run", "report", "generate", "schema"}
