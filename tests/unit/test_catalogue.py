import datetime
import re

import pytest
import yaml

import hetero
from experiments import cli
from experiments.devices_table import catalogue_table
from hetero.device_catalogue import DTYPES, FILE, CatalogueError, catalogue, device_fields, read
from hetero.errors import DeviceError
from hetero.topology import Topology

ENTRIES = catalogue()
FIGURES = [
    pytest.param(name, figure, id=f"{entry.model}, {name}")
    for entry in ENTRIES
    for name, figure in entry.figures.items()
]


def test_there_are_devices_of_every_kind():
    found = {(entry.kind, entry.api) for entry in ENTRIES}
    assert {("cpu", "cpu"), ("gpu", "cuda"), ("gpu", "opencl"), ("tpu", "xla")} <= found
    assert {kind for kind, _ in found} == {"cpu", "gpu", "tpu", "qpu"}


def test_there_are_mobile_opencl_gpus():
    models = " ".join(entry.model for entry in ENTRIES if entry.api == "opencl")
    assert "Adreno" in models
    assert "Mali" in models


def test_models_differ_even_without_regard_to_case():
    assert len({entry.model.lower() for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(("name", "figure"), FIGURES)
def test_a_figure_has_a_source_with_address_and_day_or_is_marked_unverified(name, figure):
    if figure.source is None:
        assert figure.mark == "unverified"
        return
    assert figure.mark in ("maker", "quoted", "other")
    assert figure.source.title
    assert re.fullmatch(r"https://\S+\.\S+", figure.source.url)
    assert datetime.date(2026, 1, 1) <= datetime.date.fromisoformat(figure.source.checked)


# The widest that has been built: a slip by a factor of 1,000, or bits for bytes of a unit, falls outside.
PLAUSIBLE = {
    "memory_bytes": (4e9, 1e12),
    "bandwidth": (3e10, 2e13),
    "flops.fp32": (5e11, 3e14),
    "flops.tf32": (5e12, 5e15),
    "flops.bf16": (5e12, 1e16),
    "flops.fp16": (5e12, 1e16),
    "flops.int8": (5e12, 2e16),
    "link_bandwidth": (1e10, 2e12),
    "power_w": (1, 3000),
    "idle_power_w": (0.1, 500),
    "price_usd_h": (0.01, 20_000),
    "n_qubits": (2, 2000),
}


@pytest.mark.parametrize(("name", "figure"), FIGURES)
def test_a_figure_is_of_a_plausible_size(name, figure):
    low, high = PLAUSIBLE[name]
    assert low <= figure.value <= high


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_narrower_types_are_not_slower(entry):
    peaks = [entry.figures[f"flops.{dtype}"].value for dtype in DTYPES if dtype in entry.dtypes]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.model)
def test_memory_is_what_the_model_is_called_after(entry):
    if size := re.search(r"(\d+)GB$", entry.model):
        nominal = int(size[1])
        assert nominal * 1e9 <= entry.figures["memory_bytes"].value <= nominal * 2**30


def test_every_source_in_the_file_is_used():
    data = yaml.safe_load(FILE.read_text("utf-8"))
    used = {figure.source.url for entry in ENTRIES for figure in entry.figures.values() if figure.source}
    assert {source["url"] for source in data["sources"].values()} - used == {
        data["sources"]["sth_8480"]["url"]  # of the cores and channels that figures are derived from
    }


def test_a_model_fills_the_fields_of_a_device_and_says_where_they_come_from():
    fields = device_fields("nvidia h100 sxm5 80gb", "bf16")
    device = hetero.Device(name="gpu", **fields)
    assert (device.kind, device.api, device.memory_bytes) == ("gpu", "cuda", 80 * 10**9)
    assert device.description == "NVIDIA H100 SXM5 80GB"
    assert device.flops == 989.5e12
    assert device.provenance["flops"].startswith("bf16 peak: ")
    assert "https://" in device.provenance["bandwidth"]


def test_a_model_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(CatalogueError, match="did you mean 'NVIDIA H100 SXM5 80GB'"):
        device_fields("NVIDIA H100 SXM 80GB", "fp32")


def test_a_peak_that_is_not_known_is_never_replaced_by_another():
    with pytest.raises(CatalogueError, match="it has bf16, int8; choose one with dtype, or give flops"):
        device_fields("Google TPU v5e", "fp32")
    assert "flops" not in device_fields("Google TPU v5e", None)


def topology(tmp_path, device):
    path = tmp_path / "t.yaml"
    path.write_text(f"devices:\n  - {device}\n")
    return Topology.from_yaml(path)


def test_a_file_takes_figures_of_a_model_and_its_own_override_them(tmp_path):
    [device] = topology(
        tmp_path, "{name: t, model: Google TPU v5e, dtype: bf16, memory_bytes: 15 GB, launch_s: 3 us}"
    ).devices
    assert (device.flops, device.memory_bytes, device.launch_s) == (197e12, 15 * 10**9, 3e-6)
    assert device.provenance["memory_bytes"] == "topology file"
    assert "TPU v5e" in device.provenance["bandwidth"]


@pytest.mark.parametrize(
    ("device", "place", "text"),
    [
        ("{name: a, model: NVIDIA H100}", ":2:22: devices[0].model", "did you mean 'NVIDIA H100 SXM5 80GB'?"),
        ("{name: a, model: abc}", ":2:22: devices[0].model", "'abc' is not in the catalogue; there are NVIDIA"),
        ("{name: a, model: Google TPU v4}", ":2:5: devices[0].dtype", "it has bf16, int8"),
        ("{name: a, model: Google TPU v4, dtype: fp16}", ":2:44: devices[0].dtype", "it has bf16, int8"),
        ("{name: a, model: AMD EPYC 9654}", ":2:5: devices[0].memory_bytes", "missing"),
    ],
)
def test_a_model_or_peak_that_is_missing_is_named_with_its_place(tmp_path, device, place, text):
    with pytest.raises(DeviceError) as error:
        topology(tmp_path, device)
    assert place in error.value.message
    assert text in error.value.message


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("source: s", "source: t", "'t' is not among the sources"),
        ("source: s", "note: n", "devices[0].power_w.source: missing"),
        (", checked: 2026-11-25", "", "sources.s.checked: missing"),
        ("by: maker", "by: me", "expected maker or quoted or other"),
        ("5 W", "5 GB", "'5 GB'; expected 700 W"),
        ("power_w", "power", "unknown key; did you mean 'power_w'?"),
    ],
)
def test_a_fault_in_a_catalogue_is_named(tmp_path, old, new, text):
    good = """
sources: {s: {by: maker, title: t, url: "https://a.b", checked: 2026-11-25}}
devices: [{model: m, kind: gpu, api: cuda, power_w: {value: 5 W, source: s}}]
"""
    path = tmp_path / "c.yaml"
    path.write_text(good)
    assert read(path)["m"].figures["power_w"].value == 5
    path.write_text(good.replace(old, new))
    with pytest.raises(DeviceError) as error:
        read(path)
    assert text in error.value.message


def test_the_table_marks_what_is_not_the_makers(capsys):
    lines = {line.split("  ")[0]: line for line in catalogue_table(ENTRIES).splitlines()}
    assert re.search(r" 459 ", lines["Google TPU v5p"])
    assert re.search(r" 67~ ", lines["NVIDIA H100 SXM5 80GB"])
    assert re.search(r" 3\.4\? ", lines["Qualcomm Adreno 740"])
    assert cli.main(["devices", "--catalogue", "--json"]) == 0
    models = [entry["model"] for entry in yaml.safe_load(capsys.readouterr().out)]
    assert models == [entry.model for entry in ENTRIES]
