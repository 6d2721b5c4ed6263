"""Builds, their errors and their cache; prepared launches and their counts."""

from __future__ import annotations

import pytest
import torch

from hetero.opencl import build, kernels
from hetero.opencl.errors import KernelBuildError, NoOpenCLError, OpenCLError
from hetero.opencl.ir import Launch, LocalMemory, Root, View
from hetero.opencl.program import Device, open_device

_TYPES = {"T": "uint", "W": "uint", "DESCENDING": 0}  # of the files that are made for several

_ADD = """
KERNEL add(TENSOR(x), TENSOR_OUT(out), __local float *t, const int n, const float y)
{
    for (int i = 0; i < n; i++) { t[i] = BASE(x)[i] + y; BASE(out)[i] = t[i]; }
}
"""


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A device with an empty cache of its own, as if its platform had none."""
    monkeypatch.setenv("HETEROQ_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_CACHING_PLATFORMS", frozenset())
    try:
        opened = open_device("opencl:0")
    except NoOpenCLError as error:
        pytest.skip(f"no OpenCL here: {error.remedy}")
    return Device(opened.description, opened._handle)


def _view(root, offset=0, n=4):
    return View(root, offset, (n,), (1,), torch.float32)


def _add(x, out, y=1.0, op="add", **defines):
    arguments = (x, out, LocalMemory(64), 4, y)
    return Launch(op, "add", _ADD, arguments, (1,), (1,), (out,), defines, is_generated=True)


def test_launches_are_replayed_on_whatever_is_bound(device):
    source, target = Root("input", 16), Root("output", 16)
    prepared = device.prepare([_add(_view(source), _view(target)), _add(_view(target), _view(target), y=10.0)])
    assert prepared.roots == (source, target)
    for start in (0.0, 5.0):
        x, y = torch.arange(4.0) + start, torch.empty(4)
        prepared.bind(source, device.buffer(x.data_ptr(), 16))
        prepared.bind(target, device.buffer(y.data_ptr(), 16))
        prepared.enqueue()
        device.finish()
        assert torch.equal(y, x + 11)


def test_offsets_count_elements(device):
    x, y = torch.arange(6.0), torch.zeros(6)
    source, target = Root("constant", 24, tensor=x), Root("constant", 24, tensor=y)
    device.prepare([_add(_view(source, 2), _view(target, 1))]).enqueue()
    device.finish()
    assert torch.equal(y, torch.tensor([0.0, 3, 4, 5, 6, 0]))


def test_launches_are_counted_by_op_when_they_are_enqueued(device):
    root = Root("constant", 16, tensor=torch.zeros(4))
    prepared = device.prepare([_add(_view(root), _view(root), op=op) for op in ("gelu", "gelu", "addmm")])
    assert device.counts == {}
    prepared.enqueue()
    prepared.enqueue()
    device.finish()
    assert device.counts == {"gelu": 4, "addmm": 2}


def test_an_argument_without_a_buffer_is_an_error_that_names_it(device):
    root = Root("input", 16, name="tokens")
    with pytest.raises(OpenCLError, match="tokens"):
        device.prepare([_add(_view(root), _view(root))]).enqueue()


def test_binding_a_root_that_nothing_uses_is_ignored(device):
    device.prepare([]).bind(Root("input", 4), object())


def test_a_build_error_names_device_options_file_and_line_and_has_the_log_once(device, capfd):
    with pytest.raises(KernelBuildError) as info:
        device.program("\nKERNEL broken()\n{ undeclared = 1; }", {"WIDTH": 3}, is_generated=True)
    error = info.value
    assert (error.file, error.line) == ("generated.cl", 3)
    assert error.device == device.description.description
    assert "-DWIDTH=3" in error.options
    assert str(error).count("undeclared identifier") == 1
    assert "   3 { undeclared = 1; }" in error.found


def test_an_error_in_a_file_of_ours_names_that_file(device, tmp_path, monkeypatch):
    for file in build._FOLDER.glob("*.cl"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "softmax.cl").write_text("\n\nKERNEL softmax() { return 1 + ; }\n")
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    with pytest.raises(KernelBuildError) as info:
        device.program("softmax.cl", {})
    assert (info.value.file, info.value.line) == ("softmax.cl", 3)


def test_every_kernel_file_builds_without_a_warning(device, capfd):
    for file in sorted(build._FOLDER.glob("*.cl")):
        if not file.name.endswith("common.cl") and not file.name.startswith("gpu_"):  # those need a launch's sizes
            device.program(file.name, _TYPES if file.name in ("product.cl", "sort.cl") else {})
    assert "warning" not in capfd.readouterr().err


def test_a_compiler_that_ignores_line_directives_is_understood():
    text, _ = build.assemble("softmax.cl", is_generated=False)
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines, 1) if line.startswith("KERNEL softmax("))
    own = (build._FOLDER / "softmax.cl").read_text().splitlines()
    expected = own.index(lines[at - 1]) + 1
    assert build._own_place(text, "input.cl", at) == f"softmax.cl:{expected}"
    assert build._own_place(text, "softmax.cl", 3) == "softmax.cl:3"
    assert build._own_place(text, "/tmp/pocl/common.cl", 7) == "common.cl:7"


def test_a_program_comes_from_the_disk_the_second_time(device, tmp_path, monkeypatch):
    root = Root("constant", 16, tensor=torch.zeros(4))
    launches = [_add(_view(root), _view(root))]
    device.prepare(launches)
    (cached,) = (tmp_path / "opencl").glob("*.bin")
    monkeypatch.setattr(build, "_write", None)  # a build from source would call it
    again = Device(device.description, device._handle)
    again.prepare(launches).enqueue()
    again.finish()
    assert root.tensor.tolist() == [1.0] * 4
    assert cached.exists()


def test_a_platform_with_a_cache_of_its_own_is_not_asked_for_binaries(device, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_CACHING_PLATFORMS", frozenset({device._handle.platform.name}))
    root = Root("constant", 16, tensor=torch.zeros(4))
    device.prepare([_add(_view(root), _view(root))])
    assert device.programs_built == {"source": 1}
    assert not (tmp_path / "opencl").exists()


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_binary_is_built_again(device, tmp_path, damage):
    root = Root("constant", 16, tensor=torch.zeros(4))
    device.prepare([_add(_view(root), _view(root))])
    (cached,) = (tmp_path / "opencl").glob("*.bin")
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = Device(device.description, device._handle)
    again.prepare([_add(_view(root), _view(root))]).enqueue()
    again.finish()
    assert root.tensor.tolist() == [1.0] * 4
    assert len(cached.read_bytes()) >= len(whole) // 2 + 1


def test_other_constants_and_other_sources_are_other_programs(device, tmp_path):
    root = Root("constant", 16, tensor=torch.zeros(4))
    for width in (1, 2):
        device.prepare([_add(_view(root), _view(root), WIDTH=width)])
    device.prepare([kernels.embedding(_view2(root), _index(), _view2(root))[0]])
    assert len(list((tmp_path / "opencl").glob("*.bin"))) == 3


def test_a_cache_folder_that_cannot_be_written_is_no_error(device, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HETEROQ_CACHE", str(blocked))
    root = Root("constant", 16, tensor=torch.zeros(4))
    device.prepare([_add(_view(root), _view(root))])


def _view2(root):
    return View(root, 0, (2, 2), (2, 1), torch.float32)


def _index():
    return View(Root("constant", 16, tensor=torch.zeros(2, dtype=torch.int64)), 0, (2,), (1,), torch.int64)
