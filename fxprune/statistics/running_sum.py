"""A sum over batches that is fast for a few of them and exact for many."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

SETTLE_AFTER = 2**16  # Positions; float32 then has lost a few times 1e-7.


class RunningSum:
    """A sum of products over batches.

    The products of a few batches are added up in the batches' own dtype: where there are many channels, converting each
    batch's would take longer than the product itself. What has gathered then moves to float64, so that many batches
    neither overflow nor drift.
    """

    def __init__(self) -> None:
        self._recent: Tensor | None = None
        self._positions = 0
        self._settled: Tensor | None = None

    def buffer(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Where to add the next batch's products; of the dtype and on the device of `like`."""
        if self._recent is not None and self._recent.dtype != like.dtype:
            self.settle()
        if self._recent is None:
            self._recent = like.new_zeros(tuple(shape))
        return self._recent

    def added(self, positions: int) -> None:
        """Tell that the products of so many positions have been added to the buffer."""
        self._positions += positions
        if self._positions >= SETTLE_AFTER:
            self.settle()

    def settle(self) -> None:
        """Move to float64 what has gathered. Never in place: the sum so far may have been handed out."""
        if self._recent is not None:
            self._settled = self._recent.double() if self._settled is None else self._settled + self._recent
        self._recent, self._positions = None, 0

    def parts(self) -> list[Tensor]:
        """Tensors that together make up the sum."""
        return [part for part in (self._recent, self._settled) if part is not None]

    def total(self) -> Tensor | None:
        """The sum in float64; None before the first batch."""
        self.settle()
        return self._settled
