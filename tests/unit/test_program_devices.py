"""Names of OpenCL devices, opened devices, and what is said when there are none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero.errors import DeviceError
from hetero.opencl.errors import NoOpenCLError, OutOfDeviceMemory
from hetero.opencl.program import list_devices, open_device


@pytest.fixture(scope="module")
def devices():
    try:
        return list_devices()
    except NoOpenCLError as error:
        pytest.skip(f"no OpenCL here: {error.remedy}")


def test_every_listed_device_opens_under_its_name(devices):
    for description in devices:
        assert open_device(description.name).description == description


def test_all_names_of_a_device_give_one_object(devices):
    first = devices[0]
    device = open_device("opencl:0")
    assert open_device("opencl") is device
    assert open_device(f"opencl:{first.platform}:{first.index}") is device


def test_a_subdevice_has_one_compute_unit_and_its_own_core(devices):
    parts = [d for d in devices if d.subindex is not None]
    if not parts:
        pytest.skip("no device here has sub-devices: it needs two compute units")
    assert all(d.capabilities.compute_units == 1 for d in parts)
    assert [d.cores for d in parts if d.index == 0] == [(k,) for k in range(sum(d.index == 0 for d in parts))]
    assert all(open_device(d.name).queue.device.max_compute_units == 1 for d in parts)


@pytest.mark.parametrize("name", ["opencl:99", "opencl:0.99", "opencl:7:0"])
def test_a_device_that_does_not_exist_is_an_error_that_lists_what_does(devices, name):
    with pytest.raises(DeviceError, match="does not exist") as info:
        open_device(name)
    assert devices[0].name in info.value.found


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=12))
def test_any_other_text_is_refused_by_a_device_error(text):
    name = f"opencl{text}x"
    with pytest.raises(DeviceError, match="not the name"):
        open_device(name)


def test_a_buffer_is_the_tensor_itself(devices):
    device = open_device("opencl:0")
    if not device.capabilities.shares_host_memory:
        pytest.skip("this device has memory of its own")
    x = torch.arange(7.0)[1:]
    buffer = device.buffer(x.data_ptr(), x.nbytes)
    assert device.buffer(x.data_ptr(), x.nbytes) is buffer
    copy = torch.empty(6)
    x[0] = 42
    device.download(copy, buffer)
    assert torch.equal(copy, x)


def test_upload_and_download_are_inverse(devices):
    device = open_device("opencl:0")
    x, y = torch.arange(100.0), torch.empty(100)
    buffer = device.allocate(x.nbytes)
    device.upload(buffer, x)
    device.download(y, buffer)
    assert torch.equal(x, y)


def test_too_large_an_allocation_says_how_many_bytes_were_wanted_and_are_there(devices):
    device = open_device("opencl:0")
    wanted = 1 << 50
    with pytest.raises(OutOfDeviceMemory, match=str(wanted)) as info:
        device.allocate(wanted)
    assert str(device.capabilities.memory_bytes) in info.value.found


_WITHOUT_PLATFORM = """
from hetero.opencl.errors import NoOpenCLError
from hetero.opencl.program import list_devices
try:
    list_devices()
except NoOpenCLError as error:
    assert "pocl" in error.remedy, error
    print("no platform")
"""
_IMPORT_ONLY = """
import sys, os
import hetero.opencl.kernels, hetero.opencl.program
assert "pyopencl" not in sys.modules
assert "POCL_AFFINITY" not in os.environ
hetero.opencl.program.list_devices()
assert os.environ["POCL_AFFINITY"] == "1"
print("lazy")
"""


def _python(code, **environment):
    variables = {k: v for k, v in os.environ.items() if k != "POCL_AFFINITY"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    ).stdout


def test_without_a_platform_the_error_says_what_to_install():
    assert _python(_WITHOUT_PLATFORM, OCL_ICD_VENDORS="/nonexistent").strip() == "no platform"


def test_importing_touches_neither_opencl_nor_the_environment(devices):
    assert _python(_IMPORT_ONLY).strip() == "lazy"
