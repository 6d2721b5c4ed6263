"""Memory that stays on the device from step to step: regions, and where each tensor lies in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero.opencl.errors import CompileError
from hetero.opencl.fuse import is_dense_cover
from hetero.opencl.memory import aligned, piece_bytes_of, pieces, within_piece

if TYPE_CHECKING:
    from hetero.opencl.program import Device


class Region:
    """A piece of the device's memory: one buffer, or several where the device limits their size.

    Attributes:
        nbytes: its size [B].
        host: the same memory as the host sees it; None on a device with memory of its own.
    """

    def __init__(self, device: Device, nbytes: int, *, is_shared: bool, is_zero: bool = True) -> None:
        self.nbytes, self._device = max(nbytes, 4), device
        self._piece_bytes = piece_bytes_of(device.capabilities, alignment_of(device))
        self.host: torch.Tensor | None = None
        places = pieces(self.nbytes, self._piece_bytes)
        if is_shared:
            with torch.inference_mode(mode=False):
                self.host = (torch.zeros if is_zero else torch.empty)(self.nbytes, dtype=torch.uint8)
            start = self.host.data_ptr()
            self._buffers = [device.buffer(start + offset, size) for offset, size in places]
            return
        self._buffers = [device.allocate(size) for _, size in places]
        for buffer, (_, size) in zip(self._buffers, places, strict=True) if is_zero else ():
            device.upload(buffer, torch.zeros(size, dtype=torch.uint8))

    def part(self, offset: int, nbytes: int) -> Any:
        """A pyopencl buffer of some of it; both in bytes, within one piece."""
        piece, at = divmod(offset, self._piece_bytes)
        return self._device.sub_buffer(self._buffers[piece], at, max(nbytes, 4))

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """Copy a dense tensor to it, in the order of its memory."""
        flat = flattened(tensor)
        if self.host is not None:
            self.host[offset : offset + flat.nbytes].copy_(flat.view(torch.uint8))
        elif flat.numel():
            self._device.upload(self.part(offset, flat.nbytes), flat)

    def read(self, offset: int, like: torch.Tensor) -> torch.Tensor:
        """A tensor that looks like another: over the memory itself if it is shared, else a copy.

        Each has a storage of its own: AOTAutograd doesn't take tensors that share one and are changed in place, and
        saving one doesn't save all.
        """
        nbytes = like.numel() * like.itemsize
        if self.host is not None and nbytes:
            memory = torch.frombuffer(self.host.numpy(), dtype=torch.uint8, count=nbytes, offset=offset)
        else:
            memory = torch.empty(nbytes, dtype=torch.uint8)
            if nbytes:
                self._device.download(memory, self.part(offset, nbytes))
        return memory.view(like.dtype).as_strided(like.shape, like.stride())


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as one dimension, in the order of its memory; shares it."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def require_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise CompileError unless a tensor of the host has no gaps."""
    if tensor.device.type != "cpu":
        raise CompileError("the training step takes modules on the host", found=f"{name} on {tensor.device}")
    if tensor.numel() and not is_dense_cover(tensor.shape, tensor.stride(), tensor.numel()):
        raise CompileError(
            "a parameter or buffer has gaps",
            found=f"{name} with strides {tensor.stride()}",
            remedy="make it contiguous",
        )


class Layout:
    """Places of tensors one after the other in a region [B]; none across the end of a buffer."""

    def __init__(self, device: Device) -> None:
        self._alignment = alignment_of(device)
        self._piece_bytes = piece_bytes_of(device.capabilities, self._alignment)
        self.nbytes = 0
        self.offsets: dict[str, int] = {}

    def add(self, name: str, nbytes: int) -> None:
        """Give a tensor the next place."""
        size = aligned(max(nbytes, 4), self._alignment)
        self.offsets[name] = within_piece(self.nbytes, size, self._piece_bytes)
        self.nbytes = self.offsets[name] + size

    def piece(self, name: str) -> int:
        """Which of the region's buffers a tensor lies in."""
        return self.offsets[name] // self._piece_bytes


def alignment_of(device: Device) -> int:
    """What every offset is a multiple of [B]."""
    return max(64, device.capabilities.alignment_bytes)
