"""Small batches, handed on several at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POOL_NUMBERS = 2**20  # Of the first tensor; the products of fewer take less time than the calls that start them.


class Pool:
    """Calls a function on small batches joined together, on large ones as they are.

    Args:
        function: takes the tensors of a batch, (N, ...) each, and is content with several batches in one.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._waiting: list[tuple[Tensor, ...]] = []
        self._numbers = 0

    def put(self, *tensors: Tensor) -> None:
        """Add a batch: tensors of the same N, as many each time."""
        if self._waiting and any(
            new.shape[1:] != old.shape[1:] or new.dtype != old.dtype
            for new, old in zip(tensors, self._waiting[-1], strict=True)
        ):
            self.flush()
        if not self._waiting and tensors[0].numel() >= POOL_NUMBERS:
            self._function(*tensors)
            return
        # Copies: what a batch is a part of may be overwritten, or need not be held as a whole.
        self._waiting.append(tuple(t.clone() for t in tensors))
        self._numbers += tensors[0].numel()
        if self._numbers >= POOL_NUMBERS:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits."""
        if self._waiting:
            self._function(*(torch.cat(of) for of in zip(*self._waiting, strict=True)))
        self._waiting, self._numbers = [], 0
