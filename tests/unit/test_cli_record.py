"""Run folders: locks, whole files, appended lines, and what a used folder says."""

import json
import multiprocessing
import os
import re

import pytest

from experiments import record
from experiments.cost import Meter, Spent
from experiments.errors import RunFailedError, RunFolderBusyError, RunFolderError


def test_a_hundred_folders_of_one_second_differ(tmp_path):
    assert len({record.new_folder("x", tmp_path) for _ in range(100)}) == 100


def test_a_folder_that_can_not_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="can't make the run folder"):
        record.make_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["summary.json", "config.yaml"], "already holds a finished run"),
        (["sweep.json", "config.yaml", "table.json"], "already holds a finished run"),
        (["config.yaml"], r"already holds an unfinished run\n  remedy: go on with: heteroq run --resume "),
        (["thesis.tex"], r"is not empty\n  found: thesis\.tex"),
    ],
)
def test_a_used_folder_is_refused(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(RunFolderError, match=expected):
        record.refuse_used(tmp_path)


def test_what_a_kill_leaves_before_the_start_is_no_run(tmp_path):
    for name in (".lock", "environment.json"):
        (tmp_path / name).write_text("{}")
    plan = tmp_path / "arms" / "baseline" / "plan.json"
    plan.parent.mkdir(parents=True)
    plan.write_text("{}")
    record.refuse_used(tmp_path)
    assert not plan.exists()  # a run makes its own, or is given them again


def test_arms_with_more_than_plans_are_a_run(tmp_path):
    (tmp_path / "arms" / "baseline" / "seed-0").mkdir(parents=True)
    (tmp_path / "arms" / "baseline" / "seed-0" / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunFolderError, match="is not empty"):
        record.refuse_used(tmp_path)


def test_a_locked_folder_names_the_process(tmp_path):
    with (
        record.locked(tmp_path),
        pytest.raises(RunFolderBusyError, match=f"in use by process {os.getpid()}"),
        record.locked(tmp_path),
    ):
        pass
    with record.locked(tmp_path):
        pass


def _hold(folder, barrier, results):
    barrier.wait()
    try:
        with record.locked(folder):
            results.put("ran")
            barrier.wait()
    except RunFolderBusyError:
        results.put("busy")
        barrier.wait()


def test_exactly_one_of_several_runners_gets_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    workers = [context.Process(target=_hold, args=(tmp_path, barrier, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    outcomes = sorted(results.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join(timeout=30)
    assert outcomes == ["busy"] * 5 + ["ran"]


def _lock_and_die(folder):
    with record.locked(folder):
        os._exit(9)


def test_a_killed_process_leaves_no_lock(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=_lock_and_die, args=(tmp_path,))
    worker.start()
    worker.join(timeout=30)
    with record.locked(tmp_path):
        pass


def test_a_file_that_can_not_be_written_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    record.write_json(path, {"a": 1})

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFailedError, match=re.escape(f"can't write {path} (13 bytes): No space left on device")):
        record.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_json_with_a_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json(tmp_path / "x.json", {"a": float("nan")})


def test_lines_are_whole_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = record.JsonLines(path)
    lines.append({"step": 1, "loss": 0.1})
    lines.append({"step": 2, "loss": 0.2})
    lines.close()
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [line["step"] for line in record.read_lines(path)] == [1, 2]
    record.keep_lines(path, lambda line: True)
    assert path.read_bytes() == before
    record.keep_lines(path, lambda line: line["step"] < 2)
    assert path.read_bytes() == before.split(b"\n")[0] + b"\n"


def test_a_damaged_record_names_its_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"x\.json is damaged"):
        record.read_json(tmp_path / "x.json")


def test_energy_is_read_from_the_packages_and_wraps(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    part = tmp_path / "intel-rapl:0:0"
    for folder, value in ((zone, "990"), (part, "0")):
        folder.mkdir()
        (folder / "energy_uj").write_text(value)
        (folder / "max_energy_range_uj").write_text("1000")
    meter = Meter(tmp_path)
    (zone / "energy_uj").write_text("40")
    assert meter.spent().energy_j == pytest.approx(50e-6)


def test_energy_is_none_where_nothing_can_be_read(tmp_path):
    assert Meter(tmp_path).spent().energy_j is None


def test_a_meter_counts_cpu_time_and_the_peak_of_memory():
    meter = Meter()
    block = bytearray(50 << 20)
    total = sum(range(300_000))
    spent = meter.spent()
    assert len(block) + total > 0
    assert 0 < spent.cpu_s < 60
    assert spent.wall_s > 0
    assert spent.peak_rss_bytes > 50 << 20


def test_the_parts_of_an_interrupted_run_add_up():
    a, b = Spent(1.0, 2.0, 3.0, 100), Spent(10.0, 20.0, 30.0, 50)
    assert a + b == Spent(11.0, 22.0, 33.0, 100)
    assert (Spent() + a).energy_j == 3.0
    assert (a + Spent(1.0, 1.0, None, 1)).energy_j is None


def test_the_environment_says_where_a_run_took_place():
    found = record.environment(["heteroq", "run"], {"devices": []})
    assert found["versions"]["torch"].startswith("2.")
    assert found["cores"] >= 1
    json.dumps(found, allow_nan=False)
