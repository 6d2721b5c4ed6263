"""Memory of outputs: storage of its own for each, used again by a later call when the caller has let it go.

A plan keeps it for all its frames. So it holds as many copies of an output as were held at the same time, whatever
inputs it was called with, and at most `_MAX_PIECES`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from hetero.opencl.fuse import is_dense_cover
from hetero.opencl.ir import Root, View

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_PIECES = 16  # of an output that are remembered: more calls in flight than that allocate anew


class Piece:
    """Memory of one output, with what its storage was when it was new."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.storage = tensor, tensor.untyped_storage()
        self.pointer, self.nbytes = self.storage.data_ptr(), self.storage.nbytes()
        self._users = storage_users(self.storage)

    def is_in_place(self) -> bool:
        """Whether nobody has resized it or moved it, as `share_memory_` does."""
        return self.storage.data_ptr() == self.pointer and self.storage.nbytes() == self.nbytes

    def is_free(self) -> bool:
        """Whether nobody outside has it, and it is what it was."""
        return storage_users(self.storage) == self._users and self.is_in_place()


def storage_users(storage: torch.UntypedStorage) -> tuple[int, int]:
    """How many tensors use a storage, and how many references there are to this object, which all of them share."""
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


class OutputPool:
    """Pieces of memory for one output."""

    def __init__(self, whole: View) -> None:
        self._whole = whole
        self._pieces: dict[int, Piece] = {}

    @property
    def nbytes(self) -> int:
        """What the pool holds [B], whether the caller has it or not."""
        return sum(piece.nbytes for piece in self._pieces.values())

    def take(self, pointer: int) -> Piece:
        """A free piece, new if there is none; the one at this address if it is free."""
        piece = self._pieces.get(pointer)
        if piece is not None and piece.is_free():
            return piece
        return next((piece for piece in self._pieces.values() if piece.is_free()), None) or self._new()

    def _new(self) -> Piece:
        piece = Piece(empty(self._whole))
        kept = [other for other in self._pieces.values() if other.is_in_place()][1 - _MAX_PIECES :]
        self._pieces = {other.pointer: other for other in (*kept, piece)}
        return piece


def empty(view: View) -> torch.Tensor:
    """New host memory that looks like a view."""
    with torch.inference_mode(mode=False):
        return torch.empty_strided(view.shape, view.strides, dtype=view.dtype)


def show(base: torch.Tensor, view: View, offset: int) -> torch.Tensor:
    """A view as a tensor, `offset` elements into its memory."""
    return base.as_strided(view.shape, view.strides, offset + view.offset)


def whole_views(outputs: Sequence[View | float | int | None], kinds: Sequence[str]) -> dict[Root, View]:
    """Roots of these kinds that the caller gets, each with the view that it is allocated as."""
    wholes: dict[Root, View] = {}
    for view in outputs:
        if isinstance(view, View) and view.root.kind in kinds:
            length = view.root.nbytes // view.dtype.itemsize
            is_empty = length > 0 and view.numel == 0  # a view without elements of memory that is computed
            is_whole = view.offset == 0 and not is_empty and is_dense_cover(view.shape, view.strides, length)
            if is_whole or view.root not in wholes:
                wholes[view.root] = view if is_whole else View(view.root, 0, (length,), (1,), view.dtype)
    return wholes


def in_layout(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """An input with the strides that the plan expects: itself, or a copy.

    Nothing guards the layout of saved tensors: hooks that pack and unpack them may change it.
    """
    if tensor.stride() == view.strides:
        return tensor
    return torch.empty_strided(view.shape, view.strides, dtype=tensor.dtype).copy_(tensor)
