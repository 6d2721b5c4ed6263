"""The report of a run folder: what it shows, what it survives, and that it stays what it claims to be."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import importlib.util
import json
import random
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from experiments import report
from experiments.errors import RunFolderError

_SPEC = importlib.util.spec_from_file_location("report_fixture", Path(__file__).parents[1] / "report_fixture.py")
fixture = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fixture)


class Page(html.parser.HTMLParser):
    """The text of each element with an id, all attributes, all tags, and what no element may contain."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "hr", "link"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside, f"</{tag}> closes nothing"
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self._inside:
            self.text.append(data)

    def close_all(self) -> None:
        assert self._inside == []

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def written(folder: Path) -> str:
    return report.write(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixture.write_run(tmp_path_factory.mktemp("run"), n_seeds=4, steps=120, margin=0.02)


@pytest.fixture(scope="module")
def text(complete: Path) -> str:
    return written(complete)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return fixture.write_run(tmp_path / "run", arms=("baseline", "hybrid"), n_seeds=2, steps=20)


def embedded(text: str) -> dict[str, Any]:
    return json.loads(
        re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.S).group(1)
    )


def test_report_goes_into_the_run_folder_or_where_it_is_told(small: Path, tmp_path: Path) -> None:
    assert report.write(small) == small / "report.html"
    target = tmp_path / "elsewhere" / "a.html"
    assert report.write(small, target) == target
    assert target.read_bytes() == (small / "report.html").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_same_folder_gives_the_same_bytes(complete: Path, text: str) -> None:
    assert written(complete) == text


def test_page_has_every_section_and_is_well_formed(text: str) -> None:
    page = Page(text)
    page.close_all()
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {"result", "cost", "curves", "placement", "launches", "method", "environment", "report-data"} <= ids
    anchors = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href") and value[0] == "#"}
    assert anchors <= ids


@pytest.mark.parametrize(
    "expected",
    [
        "too few seeds for a claim (n = 4 < 10)",  # verdict
        "in place of the residual unit block1.mlp",  # question
        "not measured",  # energy
        "bigram 2.56",  # floor of the validation split, in its figure
        "the margin of equivalence, ±0.02",
        "4 seeds are too few for a claim",  # limits
        "below 0.12",  # 2 / 2^4
        "predicted:",
        "measured:",
        "attention_backward",  # launches
        "98b4b30c0ffee98b4b30c0ffee98b4b30c0ffee0",  # commit
        "heteroq run experiments/configs/quickstart.yaml",
        "n_circuit_layers: 1",  # config
        "est.",  # QPU time and price
        "not possible: embedding can't run on aer",
    ],
)
def test_page_says(text: str, expected: str) -> None:
    assert expected in Page(text).words


def test_table_shows_mean_and_interval_of_each_arm(complete: Path, text: str) -> None:
    arms = json.loads((complete / "summary.json").read_text())["arms"]
    words = Page(text).words
    for arm in arms.values():
        losses = [seed["test_loss"] for seed in arm["seeds"].values()]
        low, high = arm["interval"]["test_loss"]
        assert f"{sum(losses) / len(losses):.4f} [{low:.4f}, {high:.4f}]" in words


def test_differences_are_signed_and_stand_with_their_p_values(complete: Path, text: str) -> None:
    comparison = json.loads((complete / "summary.json").read_text())["comparisons"][0]
    low, high = (f"{v:+.4f}".replace("-", "−") for v in comparison["interval"])
    assert f"{comparison['difference']:+.4f} [{low}, {high}] 0.12 0.50 0.031" in Page(text).words


def test_intervals_of_differences_are_named_by_the_alpha_of_the_run(small: Path) -> None:
    summary = json.loads((small / "summary.json").read_text())
    (small / "summary.json").write_text(json.dumps({**summary, "alpha": 0.01}))
    text = written(small)
    assert 'aria-label="paired differences between arms with 99 % intervals"' in text
    assert "95 % intervals (Student's t) beneath, 99 % for differences" in Page(text).words


def test_every_seed_has_a_thin_curve_and_every_arm_a_thick_one(text: str) -> None:
    training = re.findall(r'<svg class="chart"[^>]*data-split="train".*?</svg>', text, re.S)
    assert len(training) == 5
    for svg in training:
        assert svg.count('class="thin"') == 4
        assert svg.count('class="thick"') == 1
    wide, narrow = re.findall(r'<svg class="chart (?:wide|narrow)"[^>]*data-split="val".*?</svg>', text, re.S)
    assert wide.count('class="thin"') == narrow.count('class="thin"') == 20


def test_placement_draws_each_layer_on_its_device_and_each_hand_over(text: str) -> None:
    svg = next(s for s in re.findall(r'<svg class="chart wide".*?</svg>', text, re.S) if "placement of hybrid" in s)
    assert svg.count('class="stage"') == 3
    assert svg.count('class="arrow"') == 2
    for layer in fixture.LAYERS:
        assert all(f">{word}</text>" in svg for word in layer.split("."))


def test_schedules_have_a_bar_for_each_pass_of_each_micro_batch(text: str) -> None:
    svg = next(s for s in re.findall(r'<svg class="chart wide".*?</svg>', text, re.S) if "one step of hybrid" in s)
    assert svg.count('class="bar forward"') == svg.count('class="bar backward"') == 2 * 3 * 8  # predicted and measured
    assert svg.count('class="bar transfer"') == 2 * 2 * 2 * 8


def test_drawings_are_xml_with_finite_coordinates_and_a_name(text: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) > 30
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("aria-label") or root.get("aria-hidden")
        values = " ".join(value for node in root.iter() for value in node.attrib.values())
        assert not re.search(r"\b(nan|inf|None)\b", values)


def test_marks_stay_inside_their_drawings(text: str) -> None:
    for drawing in re.findall(r'<svg class="chart.*?</svg>', text, re.S):
        root = ET.fromstring(drawing)
        _, _, width, height = map(float, root.get("viewBox").split())
        for node in root.iter():
            for name, limit in (("x", width), ("cx", width), ("x2", width), ("y", height), ("cy", height)):
                assert -1 <= float(node.get(name, 0)) <= limit + 1, ET.tostring(node)


def test_data_in_the_page_recomputes_the_figures(complete: Path, text: str) -> None:
    data = embedded(text)
    assert data["summary"] == json.loads((complete / "summary.json").read_text())
    lines = (complete / "arms/hybrid/seed-1/metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if entry["split"] == "train"]
    steps, embedded_losses = next(a for a in data["arms"] if a["name"] == "hybrid")["curves"]["train"]["1"]
    assert steps == list(range(1, 121))
    assert embedded_losses == pytest.approx(losses, rel=1e-5)


def test_seeds_can_be_downloaded_as_csv_without_scripts(text: str) -> None:
    encoded = re.search(r'href="data:text/csv;base64,([^"]+)"', text).group(1)
    lines = base64.b64decode(encoded).decode().splitlines()
    assert lines[0].startswith("arm,seed,val_loss,test_loss")
    assert len(lines) == 1 + 5 * 4


def test_page_refers_to_nothing_outside_of_itself(text: str) -> None:
    allowed = re.compile(r"#[\w-]+$|data:text/csv;base64,")
    for tag, name, value in Page(text).attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert allowed.match(value), f"<{tag} {name}={value}>"
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    assert "@import" not in style
    assert "url(" not in style


def test_security_policy_allows_this_script_and_nothing_else(text: str) -> None:
    policy = next(v for tag, n, v in Page(text).attributes if tag == "meta" and n == "content" and "default-src" in v)
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00\ud800"


def test_hostile_names_stay_text(small: Path) -> None:
    plain = Page(written(small))
    clean = HOSTILE.replace("\ud800", "")
    for name in ("summary.json", "environment.json", "arms/hybrid/plan.json", "arms/hybrid/predicted_trace.json"):
        data = json.loads((small / name).read_text())
        (small / name).write_text(json.dumps(_hostile(data)))
    (small / "config.yaml").write_text(clean, encoding="utf-8")
    page = Page(written(small))
    page.close_all()
    assert set(page.tags) <= set(plain.tags)
    assert page.tags.count("script") == 2
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "alert(1)" in page.words


def _hostile(value: Any) -> Any:
    """Every string, and every key that isn't part of the schema, made hostile."""
    if isinstance(value, dict):
        free = {"cpu", "aer", "opencl:0.1", "gemm", "versions"}
        return {(HOSTILE if key in free else key): _hostile(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) and value not in ("M", "X", "process_name", "thread_name") else value


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"n_seeds": 1},
        {"n_seeds": 0, "status": "running"},
        {"arms": ("baseline",), "n_seeds": 1},
        {"arms": ("hybrid",)},
        {"arms": ("twin", "identity")},
        {"arms": ("baseline", "something-else"), "n_seeds": 2},
        {"status": "interrupted"},
        {"n_blocks": 30, "arms": ("hybrid",)},
        {"steps": 1},
    ],
    ids=str,
)
def test_partial_runs_are_reported(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = fixture.write_run(tmp_path, **{"steps": 20, **settings})
    page = Page(written(folder))
    page.close_all()
    for arm in settings.get("arms", fixture.ARMS):
        assert arm in page.words
    if settings.get("status"):
        assert f"This run is {settings['status']}" in page.words


def test_run_without_summary_shows_what_its_seeds_have_reached(small: Path) -> None:
    _remove(small, "summary.json", "environment.json", "arms/hybrid/seed-1/status.json")
    (small / "arms/hybrid/seed-1/status.json").write_text('{"status": "interrupted", "step": 7}')
    words = Page(written(small)).words
    assert "This run is incomplete" in words
    assert "baseline: 2 seeds with results; hybrid: 1 seed with results, seed 1 interrupted at step 7." in words
    assert "No verdict yet." in words
    assert "Missing or unreadable in the run folder: summary.json, environment.json." in words
    loss = json.loads((small / "arms/hybrid/seed-0/status.json").read_text())["result"]["test_loss"]
    assert f"{loss:.4f}" in words


def test_absent_records_leave_gaps_and_no_errors(small: Path) -> None:
    for arm in ("baseline", "hybrid"):
        names = ("plan.json", "predicted_trace.json", "seed-0/trace.json", "seed-0/metrics.jsonl", "seed-1")
        _remove(small, *(f"arms/{arm}/{name}" for name in names))
    _remove(small, "config.yaml", "environment.json")
    page = Page(written(small))
    assert "Loss curves" not in page.words
    assert "Missing or unreadable in the run folder: config.yaml, environment.json." in page.words


def test_damaged_records_are_passed_over(small: Path) -> None:
    metrics = small / "arms/baseline/seed-0/metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3, "loss": NaN}\n[1]\nnull\n{"step": "x"}\n{"step": 21, "lo')
    (small / "arms/baseline/seed-0/trace.json").write_text("{")
    (small / "arms/hybrid/plan.json").write_bytes(b"\xff\xfe")
    (small / "config.yaml").write_bytes(b"a: [\xff")
    Page(written(small)).close_all()


def test_any_wrong_value_in_the_records_is_survived(small: Path) -> None:
    rng = random.Random(5)
    names = ["summary.json", "environment.json", "arms/hybrid/plan.json", "arms/hybrid/predicted_trace.json"]
    for _ in range(40):
        name = rng.choice([*names, "summary.json", "summary.json"])
        original = (small / name).read_text()
        data = json.loads(original)
        for _ in range(6):
            _spoil(data, rng)
        (small / name).write_text(json.dumps(data))
        try:
            Page(written(small)).close_all()
            report.text_table(json.loads((small / "summary.json").read_text()))
        except Exception as error:
            raise AssertionError(f"{name}: {json.dumps(data)[:2000]}") from error
        (small / name).write_text(original)


def _spoil(data: Any, rng: random.Random) -> None:
    """Replace one value somewhere inside by something that doesn't belong there, or drop it."""
    while isinstance(data, dict | list) and data:
        key = rng.choice(list(data) if isinstance(data, dict) else range(len(data)))
        if not isinstance(data[key], dict | list) or not data[key] or rng.random() < 0.15:
            if isinstance(data, dict) and rng.random() < 0.3:
                del data[key]
            else:
                data[key] = rng.choice([None, "text", [], {}, float("nan"), float("inf"), -1, 0, True, 1e300, [1, "a"]])
            return
        data = data[key]


def test_large_run_stays_below_three_megabytes(tmp_path: Path) -> None:
    folder = fixture.write_run(tmp_path, n_seeds=10, steps=2000)
    size = report.write(folder).stat().st_size
    assert size < 3e6
    assert "Points are means of consecutive steps" in (folder / "report.html").read_text()


def test_folder_without_a_run_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run to report") as caught:
        report.write(tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def _luminance(colour: str) -> float:
    """Relative luminance; WCAG 2.2, definition of that name."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_marks_have_enough_contrast_in_both_modes(mode: str, text: str) -> None:
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if mode == "light" else dark.split("* {")[0]))
    paper = _luminance(colours["paper"])
    names = ["ink", "muted", "link", *(f"a{i}" for i in range(8)), *(f"d{i}" for i in range(5))]
    for name in names:
        high, low = sorted((paper, _luminance(colours[name])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"--{name} {colours[name]}"
