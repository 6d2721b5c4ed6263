"""Checkpoints that survive kills, full disks and flipped bits.

A checkpoint is two files, `step-<n>.safetensors` (all tensors) and `step-<n>.json` (everything else, and the SHA-256
of both). Each is written to a temporary file, synced and renamed, the JSON last: without it the checkpoint doesn't
exist. The newest two are kept. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _tensors_from_bytes
from safetensors.torch import save as _tensors_to_bytes
from torch import Tensor, nn

from lm.errors import CheckpointError

_FORMAT = 1
_FIELDS = {"format", "step", "tensors_sha256", "config", "extra"}
_KEEP = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint held beside the tensors.

    Attributes:
        step: number of updates done.
        extra: the caller's own values.
    """

    step: int
    extra: dict[str, Any]


def save(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    extra: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint and remove all but it and the one before.

    Args:
        folder: made if missing.
        model: all of its `state_dict()` is stored.
        optimizer: all tensors of its state are stored, under the parameters' names.
        step: number of updates done.
        extra: values that JSON can hold.
        config: what the run was made of; `load` compares it.

    Returns:
        The JSON file.

    Raises:
        CheckpointError: can't be written; what was there before is untouched.
    """
    folder = Path(folder)
    tensors = _tensors_to_bytes(_collect(model, optimizer))
    body = {
        "format": _FORMAT,
        "step": step,
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "config": dict(config or {}),
        "extra": dict(extra),
    }
    body = json.loads(json.dumps(body))  # as it will be read: keys are texts, and sorted as such
    text = json.dumps({"body": body, "body_sha256": _digest(body)}, indent=1).encode()
    target = folder / f"step-{step:08d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(target.with_suffix(".safetensors"), tensors)
        _write(target, text)
    except OSError as error:
        raise _not_written(target, len(tensors) + len(text), error) from error
    _prune(folder, step)
    return target


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    config: Mapping[str, Any] | None = None,
) -> Loaded | None:
    """Put the newest good checkpoint of a folder into a model and an optimizer.

    A damaged checkpoint is reported as a warning and the one before it is taken.

    Args:
        folder: as given to `save`.
        model: gets the weights.
        optimizer: gets its state; None: weights alone, e.g. to generate.
        config: of the run that wants to go on; None: not compared.

    Returns:
        Step and extra values; None if the folder holds no checkpoint, or only tensors that a kill left without JSON.

    Raises:
        CheckpointError: every checkpoint is damaged, or it belongs to another configuration or model.
    """
    folder = Path(folder)
    files = sorted(folder.glob("step-*.json"), reverse=True)
    damaged = []
    for file in files:
        try:
            body, tensors = _read(file)
        except _DamagedError as error:
            damaged.append(str(error))
            _log.warning("checkpoint is damaged, trying the one before: %s", error)
            continue
        if config is not None:
            _check_config(file, body["config"], config)
        _restore(file, model, optimizer, tensors)
        return Loaded(body["step"], body["extra"])
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read",
            found="; ".join(damaged),
            expected="files as they were written, with matching SHA-256",
            remedy="restore the folder from a copy, or remove it and start the run again",
        )
    return None


class _DamagedError(Exception):
    """One checkpoint can't be read; says which file and why."""


def _collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors by name; a tensor under two names (tied weights) is stored twice."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def _write(path: Path, data: bytes) -> None:
    """Replace a file by `data`, or leave it as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself has to reach the disk
        directory = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _not_written(path: Path, size: int, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return CheckpointError(
        f"can't write the checkpoint {path}",
        found=error.strerror or str(error),
        expected=f"room for {size} bytes",
        remedy=("free space" if full else "make the folder writable") + " and resume; the checkpoint before is intact",
    )


def _prune(folder: Path, step: int) -> None:
    """Keep the checkpoint of `step` and the newest before it; later ones belong to a past that was given up."""
    files = sorted(folder.glob("step-*.json"))
    older = [file for file in files if file.stem < f"step-{step:08d}"]
    kept = {file.stem for file in older[1 - _KEEP :]} | {f"step-{step:08d}"}
    for file in [*folder.glob("step-*.json"), *folder.glob("step-*.safetensors"), *folder.glob(".step-*.tmp")]:
        if file.stem not in kept:
            file.unlink(missing_ok=True)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Body and tensors of a checkpoint whose checksums match."""
    try:
        content = json.loads(file.read_bytes())
        body = content["body"]
        if content["body_sha256"] != _digest(body):
            raise _DamagedError(f"{file} doesn't match its SHA-256")
        if not body.keys() >= _FIELDS:
            raise _DamagedError(f"{file} lacks {', '.join(sorted(_FIELDS - body.keys()))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"{file}: {type(error).__name__}: {error}") from error
    if body["format"] != _FORMAT:
        raise CheckpointError(
            f"{file} was written by another version", found=f"format {body['format']}", expected=f"format {_FORMAT}"
        )
    path = file.with_suffix(".safetensors")
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != body["tensors_sha256"]:
            raise _DamagedError(f"{path} doesn't match its SHA-256 ({len(data)} bytes)")
        return body, _tensors_from_bytes(data)
    except (OSError, SafetensorError) as error:
        raise _DamagedError(f"{path}: {error}") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_config(file: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    a, b = _flat(stored), _flat(json.loads(json.dumps(dict(wanted))))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    if keys:
        raise CheckpointError(
            f"{file} belongs to another configuration: {', '.join(keys)}",
            found="; ".join(f"{key}={a.get(key)!r}" for key in keys),
            expected="; ".join(f"{key}={b.get(key)!r}" for key in keys),
            remedy="resume with the configuration of the run, or start in another folder",
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _restore(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, tensors: Mapping[str, Tensor]
) -> None:
    stored = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    wanted = model.state_dict()
    wrong = [
        name
        for name in sorted(stored.keys() | wanted.keys())
        if name not in stored or name not in wanted or stored[name].shape != wanted[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{file} belongs to another model: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}",
            found="; ".join(f"{n}: {tuple(stored[n].shape) if n in stored else 'missing'}" for n in wrong[:5]),
            expected="; ".join(f"{n}: {tuple(wanted[n].shape) if n in wanted else 'missing'}" for n in wrong[:5]),
            remedy="build the model from the configuration of the run",
        )
    model.load_state_dict(stored)
    if optimizer is not None:
        _restore_optimizer(model, optimizer, tensors)


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The optimizer's tensors; its settings stay those it was made with."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, parameter in enumerate(parameters):
        prefix = f"optimizer.{names[id(parameter)]}."
        values = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if values:
            state[index] = values
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
