"""Small batches, handed on several at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry

POOL_NUMBERS = 2**20  # Of the largest tensor; the products of fewer take less time than the calls that start them.


class Pool:
    """Calls a function on small batches joined together, on large ones as they are.

    Args:
        function: takes a layer's geometry and the tensors of a batch, (N, ...) each; content with several batches in one.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._geometry: LayerGeometry | None = None
        self._kind: object = None  # Geometry, shapes and dtypes of what waits.
        self._waiting: list[Tensor] = []  # With room for more; the first `_count` entries are filled.
        self._count = 0

    def __len__(self) -> int:
        """Images that wait."""
        return self._count

    def put(self, geometry: LayerGeometry, *tensors: Tensor) -> None:
        """Add a batch, unless it has no images: the layer's geometry on it, and tensors of the same N, as many each time."""
        kind = (geometry, [(t.shape[1:], t.dtype) for t in tensors])
        count = len(tensors[0])
        if not count:
            return
        if self._waiting and (kind != self._kind or self._count + count > len(self._waiting[0])):
            self.flush()
        room = POOL_NUMBERS * count // max(1, *(t.numel() for t in tensors))
        if room <= count:
            self._function(geometry, *tensors)
            return
        if not self._waiting:
            self._geometry, self._kind, self._waiting = geometry, kind, [_with_room(t, room) for t in tensors]
        for waiting, new in zip(self._waiting, tensors, strict=True):
            waiting[self._count : self._count + count] = new
        self._count += count

    def flush(self) -> None:
        """Hand on what waits."""
        if self._waiting:
            self._function(self._geometry, *(t[: self._count] for t in self._waiting))
        self._waiting, self._count = [], 0


def _with_room(like: Tensor, count: int) -> Tensor:
    """An empty tensor for `count` entries, channels last where those of `like` have them there."""
    last = like.dim() == 4 and like[:1].is_contiguous(memory_format=torch.channels_last)
    shape = (count, *like.shape[1:])
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
