"""How far a pruned layer's outputs are from the dense layer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.geometry import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxprune.graph import module_of
from fxprune.runtime.processes import gathered, world
from fxprune.statistics.offset import Offset
from fxprune.statistics.pool import Pool

CHUNK_NUMBERS = 2**18
ROUNDING = 1e-11  # Share of the energy: by rounding, a constant output varies by a few 1e-7 of its size in float32.


def channel_dim(layer: Node) -> int:
    """Where a layer's output has its channels, from the end: last for Linear, before the spatial ones for convolutions."""
    module = module_of(layer)  # While it is solved, a factored layer is an nn.Sequential of two.
    last = module[-1] if isinstance(module, nn.Sequential) else module
    return -1 - len(last.kernel_size) if isinstance(last, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)) else -1


@dataclass
class OutputError:
    """||y_dense - y_pruned||^2 / ||y_dense - mean||^2 of one layer, the mean per output channel.

    Sums are taken over a few images at a time, so that their differences stay in the cache: in float32, or in float64 where
    values are float64 or their squares exceed float32. The mean of the first batch is subtracted before values are squared;
    with a large mean, rounding would otherwise hide the variance.
    """

    channel_dim: int
    squared_error: float = 0.0
    squares: float = 0.0
    shift: Tensor | None = None
    sums: Tensor | None = None
    count: int = 0
    dtype: torch.dtype | None = None

    def update(self, dense: Tensor, pruned: Tensor) -> None:
        """Add one batch of layer outputs, or one without a batch dimension."""
        if dense.dim() == -self.channel_dim:
            dense, pruned = dense.unsqueeze(0), pruned.unsqueeze(0)
        if not len(dense):
            return
        others = [dim for dim in range(dense.dim()) if dim != self.channel_dim % dense.dim()]
        if self.dtype is None or self.shift is None:
            self.dtype = Offset.of(dense, self.channel_dim).dtype
            self.shift = dense.to(self.dtype).mean(others, keepdim=True)
        dense, pruned = dense.to(self.dtype), pruned.to(self.dtype)
        step = max(1, CHUNK_NUMBERS * len(dense) // max(1, dense.numel()))
        norms, sums = [], []
        buffer = torch.empty_like(dense[:step])
        for wanted, found in zip(dense.split(step), pruned.split(step), strict=True):
            norms.append(torch.linalg.vector_norm(torch.sub(found, wanted, out=buffer[: len(wanted)])))
            centred = torch.sub(wanted, self.shift, out=buffer[: len(wanted)])
            norms.append(torch.linalg.vector_norm(centred))
            sums.append(centred.sum(others))
        squared_error, squares = torch.stack(norms).double().square().unflatten(0, (-1, 2)).sum(0).tolist()
        total = torch.stack(sums).double().sum(0)
        self.squared_error += squared_error
        self.squares += squares
        self.sums = total if self.sums is None else self.sums + total
        self.count += dense.numel() // len(total)

    def pool(self) -> Pool:
        """Takes small batches of outputs, of both models, several at a time."""
        return Pool(lambda _, dense, pruned: self.update(dense, pruned))

    @staticmethod
    def summed(errors: Sequence[OutputError]) -> list[OutputError]:
        """For each error that of all processes together, in float64 about the first one's shift."""
        if world().count == 1:
            return list(errors)
        return [_merged(of_one) for of_one in zip(*gathered(list(errors)), strict=True)]

    @property
    def relative(self) -> float:
        """The ratio; for an output that is constant, 0 if it is reproduced, else 1."""
        if self.sums is None or self.shift is None:
            return 0.0
        shift = self.shift.double().flatten()
        variance = self.variance * self.count
        energy = self.squares + float((2 * self.sums + self.count * shift) @ shift)
        if variance <= ROUNDING * energy:
            return float(self.squared_error > ROUNDING * energy)
        return self.squared_error / variance

    @property
    def variance(self) -> float:
        """Of the dense values at one position, summed over the channels; 0 if nothing was added."""
        if self.sums is None:
            return 0.0
        return (self.squares - float(self.sums.square().sum()) / self.count) / self.count


def _merged(errors: Sequence[OutputError]) -> OutputError:
    """With d from the common shift to one's own: sum |y - s|^2 = sum |y - s - d|^2 + 2 d sum (y - s - d) + n |d|^2."""
    found = first = next((error for error in errors if error.count), errors[0])
    for error in errors:
        if error is first or error.sums is None or error.shift is None or found.sums is None or found.shift is None:
            continue
        d = (error.shift.double() - found.shift.double()).flatten()
        found = replace(
            found,
            squared_error=found.squared_error + error.squared_error,
            squares=found.squares + error.squares + float((2 * error.sums + error.count * d) @ d),
            sums=found.sums + error.sums + error.count * d,
            count=found.count + error.count,
        )
    return found
