"""Which devices are here, what they can do, and why a runtime is missing."""

from __future__ import annotations

import dataclasses
import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from hetero import cache
from hetero.backends import all_backends, backend, broken_backends
from hetero.device import Absence, Device
from hetero.errors import DeviceError
from hetero.runtime.worker import Worker
from hetero.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Sequence

_KNOWN_ELSEWHERE = {
    "xla": Absence("xla", "no backend for TPUs is part of this version", "use a topology file to plan for TPUs"),
    "aer": Absence("aer", "no package provides the Aer simulator", "pip install qiskit-aer pennylane"),
}


def discover(names: Sequence[str] | None = None, subdevices: bool = True) -> Topology:
    """The devices of this machine.

    Args:
        names: these alone, to plan and run with: the cpu then gets the host's cores without those of the chosen OpenCL
            devices that compute on the host. None: all devices, overlapping ones too, each with all its cores: for a
            list, since a plan among them would give the cpu no core of its own.
        subdevices: whether the parts of an OpenCL device are listed; names may mention them in any case.

    Returns:
        Devices with their stored measurements, if there are any, and the runtimes that are unusable. None that uses the
        host's memory has more of it than the cpu, whose figure heeds the control group's limit.

    Raises:
        DeviceError: a name does not exist, or two names are the same hardware.
    """
    devices: list[Device] = []
    absences = dict(broken_backends())
    for api, runtime in all_backends().items():
        found = [Device(**fields) for fields in runtime.devices(subdevices or names is not None)]
        devices += [_with_stored_measurement(device) for device in found]
        if (reason := runtime.absence()) is not None:  # of a part of it, if there are devices
            absences[api] = Absence(**reason)
    absences |= {
        api: absence for api, absence in _KNOWN_ELSEWHERE.items() if api not in all_backends().keys() | absences
    }
    order = {"cpu": 0, "cuda": 1, "opencl": 2}
    devices.sort(key=lambda device: order.get(device.api, len(order)))
    topology = Topology(tuple(_within_host(devices)), absences=tuple(absences[api] for api in sorted(absences)))
    return topology if names is None else _choose(topology, list(dict.fromkeys(names)))


def _within_host(devices: list[Device]) -> list[Device]:
    cpu = next(device for device in devices if device.api == "cpu")
    source = {"memory_bytes": cpu.provenance["memory_bytes"]}
    return [
        dataclasses.replace(device, memory_bytes=cpu.memory_bytes, provenance=device.provenance | source)
        if device.memory_pool == "host" and device.memory_bytes > cpu.memory_bytes
        else device
        for device in devices
    ]


def _choose(topology: Topology, names: list[str]) -> Topology:
    chosen = topology.only(names)
    for device in chosen.devices:
        for other in chosen.devices:
            if device.overlaps(other):
                raise DeviceError(
                    f"{other.name!r} is a part of {device.name!r}",
                    found=f"both among the devices {', '.join(names)}",
                    remedy="choose the whole device, or parts of it",
                )
    host = next((device.cores for device in topology.devices if device.api == "cpu"), ())
    taken = {core for device in chosen.devices if device.api == "opencl" for core in device.cores}
    # Where the others take every core there is nothing left to leave: the cpu shares them, and the loads add up.
    free = tuple(core for core in host if core not in taken) or host
    devices = tuple(
        _with_stored_measurement(dataclasses.replace(d, cores=free)) if d.cores == host and d.api != "opencl" else d
        for d in chosen.devices
    )
    return dataclasses.replace(chosen, devices=devices)


def measure(device: Device) -> Device:
    """The device with its peak of a float32 matrix product, bandwidth of a copy and launch latency measured now.

    Medians of repetitions in a thread pinned to the device's cores; stored for `discover`, by device, cores and driver.

    Raises:
        DeviceError: the device is simulated, or its runtime is unusable.
    """
    if device.simulated:
        raise DeviceError(f"{device.name!r} can't be measured", found="a simulated device")
    worker = Worker(device)
    try:
        figures = worker.call(lambda: backend(device.api).measure(device))
    finally:
        worker.close()
    stored = {
        "figures": {name: figures.get(name) for name in ("flops", "bandwidth", "launch_s")},
        "date": datetime.date.today().isoformat(),
    }
    cache.write("devices", _measurement_key(device), stored)
    return _measured(device, stored)


def _with_stored_measurement(device: Device) -> Device:
    return cache.read("devices", _measurement_key(device), lambda stored: _measured(device, stored)) or device


def _measured(device: Device, stored: dict[str, Any]) -> Device:
    figures = {name: float(value) for name, value in stored["figures"].items() if value is not None}
    provenance = dict.fromkeys(figures, f"measured {stored['date']}")
    return dataclasses.replace(device, **figures, provenance=device.provenance | provenance)  # type: ignore[arg-type]


def _measurement_key(device: Device) -> str:
    return cache.key(
        device.name, device.description, device.driver, device.cores, torch.__version__, version("heteroq")
    )
