"""The command line: exit codes, messages, and words in any order."""

import json

import pytest

from experiments import cli


def run(capsys, *words):
    """Exit code, stdout and stderr of a command."""
    try:
        code = cli.main(list(map(str, words)))
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_schema_is_json_for_editors(capsys):
    code, out, _ = run(capsys, "schema")
    assert code == 0
    schema = json.loads(out)
    assert schema["properties"]["train"] == {
        "$ref": "#/$defs/Train",
        "default": schema["properties"]["train"]["default"],
    }
    assert schema["required"] == ["name"]


def test_a_typo_in_yaml_is_one_message_without_traceback(capsys, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\ntrain:\n  stepz: 3\n")
    for command in ("run", "plan"):
        code, out, err = run(capsys, command, path)
        assert (code, out) == (2, "")
        assert err == f"error: {path}:3:3: train.stepz: unknown key; did you mean 'steps'?\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run"], "no configuration"),
        (["run", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["run", "--resume", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere holds no run"),
        (["run", "--resume", "nowhere", "x.yaml"], "--resume takes the folder alone"),
        (["frobnicate"], "invalid choice"),
        (["run", "x.yaml", "--bogus"], "unrecognized arguments: --bogus"),
        (["report", "x", "y=1", "--bogus"], "unrecognized arguments: --bogus"),
        (["devices", "y=1"], "unrecognized arguments: y=1"),
        (["run", "x.yaml", "--out", "o", "train"], "unrecognized arguments: train"),
    ],
)
def test_a_users_mistake_ends_2(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err


def test_one_html_file_is_refused_for_a_sweep_of_several_runs(capsys, tmp_path):
    (tmp_path / "sweep.json").write_text('{"runs": [{"run": "run-000"}, {"run": "run-001"}]}')
    code, _, err = run(capsys, "report", tmp_path, "--html", tmp_path / "a.html")
    assert code == 2
    assert "--html names one file for several runs" in err


def test_a_sweep_is_not_planned_as_if_it_were_its_base(capsys, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nsweep: {model.n_layer: [1, 2]}\n")
    code, out, err = run(capsys, "plan", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}:2:8: sweep: several configurations; one is planned at a time\n")


def test_overrides_may_stand_behind_options(capsys, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\n")
    code, _, err = run(capsys, "run", path, "train.steps=a", "--out", tmp_path / "o", "model.n_layer=b")
    assert code == 2
    assert "override 'train.steps=a'" in err
    assert "override 'model.n_layer=b'" in err


def test_every_root_error_is_one_message(capsys, monkeypatch):
    import hetero.errors
    import lm.errors
    import quantum.errors

    for root in (hetero.errors.HeteroError, lm.errors.LMError, quantum.errors.QuantumError):

        def fail(options, root=root):
            raise root("it broke", found="this", expected="that", remedy="mend it")

        monkeypatch.setattr(cli, "_schema", fail)
        code, _, err = run(capsys, "schema")
        assert code == 2
        assert err == "error: it broke\n  found: this\n  expected: that\n  remedy: mend it\n"


def test_our_own_mistakes_keep_their_traceback(capsys, monkeypatch):
    def fail(options):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_schema", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["schema"])


def test_ctrl_c_before_a_run_ends_130(capsys, monkeypatch):
    def fail(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_schema", fail)
    assert run(capsys, "schema")[0] == 130
