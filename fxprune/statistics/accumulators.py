"""What an observer gathers over the calibration set: raw moments in float64, and their centred forms.

Products of one batch are taken in float32 (or whatever the activations are) and added up in float64, so that many
batches neither overflow nor drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.geometry import LayerGeometry
from fxprune.statistics.patches import patch_sum
from fxprune.statistics.pool import Pool
from fxprune.statistics.products import GramAccumulator, cross_product

ROUNDING = 1e-6  # Relative to the second moment, whose batches are summed in float32.


@dataclass(frozen=True)
class InputStatistics:
    """Second and first moments of a layer's patches X (D x P), for each group.

    Attributes:
        gram: (G, D, D) float64, X X^T.
        total: (G, D) float64, X 1.
        count: P, patches seen.
        factors: what has been computed from them for one layer, for the next one that reads them.
    """

    gram: Tensor
    total: Tensor
    count: int
    factors: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def hessian(self, *, centred: bool) -> Tensor:
        """X X^T / P, (G, D, D) float64; with `centred` the mean patch is removed first."""
        second = self.gram / self.count
        if not centred:
            return second
        mean, constant = self.mean, self.constant
        centred_second = second - mean[:, :, None] * mean[:, None, :]
        return centred_second.masked_fill_(constant[:, :, None] | constant[:, None, :], 0)

    @property
    def constant(self) -> Tensor:
        """Whether an input hardly varies, (G, D): what rounding leaves of its variance must not look like a signal."""
        second = self.gram.diagonal(dim1=1, dim2=2) / self.count
        return second - self.mean**2 <= ROUNDING * second

    @property
    def mean(self) -> Tensor:
        """Mean patch, (G, D) float64."""
        return self.total / self.count


@dataclass
class CrossStatistics:
    """Cross moment of the wanted output Y (R x P) with the patches X, for each group.

    Attributes:
        cross: (G, R/G, D) float64, Y X^T.
        total: (G, R/G) float64, Y 1.
        count: P, output positions seen.
    """

    cross: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, geometry: LayerGeometry, device: torch.device) -> CrossStatistics:
        """Nothing seen yet."""
        shape = (geometry.groups, geometry.rows, geometry.columns)
        cross = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(cross, torch.zeros(shape[:2], dtype=torch.float64, device=device))

    def update(self, geometry: LayerGeometry, x: Tensor, y: Tensor) -> None:
        """Add a batch: layer input x and wanted output y."""
        x, y = geometry.batched(x), geometry.batched(y)
        sums = y.sum([dim for dim in range(y.dim()) if dim != geometry.channel_dim % y.dim()])
        self.cross += cross_product(geometry, x, y)
        self.total += sums.reshape(self.total.shape)
        self.count += y.numel() // geometry.out_channels

    def plus(self, change: CrossStatistics) -> CrossStatistics:
        """The moments of Y + Z, with those of Z scaled up from as many positions as were seen of it."""
        if not change.count:
            return self
        scale = self.count / change.count
        return CrossStatistics(self.cross + scale * change.cross, self.total + scale * change.total, self.count)

    @property
    def mean(self) -> Tensor:
        """Mean wanted output, (G, R/G) float64."""
        return self.total / self.count

    def target(self, inputs: InputStatistics, bias: Tensor | None, *, centred: bool) -> Tensor:
        """Y X^T / P, (G, R/G, D) float64, with both means removed, or with only the layer's fixed bias removed."""
        offset = self.mean if centred else _zero_or(bias, self.total)
        target = self.cross / self.count - offset[:, :, None] * inputs.mean[:, None, :]
        return target.masked_fill_(inputs.constant[:, None, :], 0) if centred else target


def _zero_or(bias: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bias is None else bias.to(like).reshape(like.shape)


class HessianObserver(nn.Module):
    """Passes its input through and adds its patches to the statistics.

    Layers that read the same input in the same geometry share one observer. A graph with observers still computes what
    it did; running it on calibration batches gathers every layer's statistics on the dense model's activations.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.enabled = True
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._pool = Pool(self.add)
        self._gram = GramAccumulator(self.geometry)
        self._total: Tensor | float = 0.0
        self._count = 0
        self._statistics: InputStatistics | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Observe (N, C, *spatial), or (..., C) for a Linear layer, and return it unchanged."""
        self.observe(x, self.geometry)
        return x

    def observe(self, x: Tensor, geometry: LayerGeometry) -> None:
        """Observe what the layer, in another geometry (of another padding), reads of an input."""
        if self.enabled:
            self._pool.put(geometry, self.geometry.batched(x.detach()))

    @torch.inference_mode()
    def add(self, geometry: LayerGeometry, batch: Tensor) -> None:
        """Observe a batch at once; `observe` lets small ones wait for more."""
        self._gram.add(batch, geometry)
        self._total = self._total + patch_sum(geometry, batch)
        self._count += patch_count(geometry, batch)
        self._statistics = None

    @contextmanager
    def paused(self) -> Iterator[bool]:
        """To observe nothing inside; gives whether somebody else is to `add` what would have been seen, being the first."""
        enabled, self.enabled = self.enabled, False
        try:
            yield enabled and not self._count and not len(self._pool)
        finally:
            self.enabled = enabled

    def statistics(self) -> InputStatistics:
        """The moments of everything observed so far."""
        self._pool.flush()
        if self._statistics is None:
            self._statistics = InputStatistics(self._gram.total(), torch.as_tensor(self._total), self._count)
        return self._statistics

    def extra_repr(self) -> str:
        """Shown in the graph module's repr."""
        return f"columns={self.geometry.columns}, groups={self.geometry.groups}"


def patch_count(geometry: LayerGeometry, x: Tensor) -> int:
    """P, patches in a batch: images times output positions, or vectors for Linear."""
    if not geometry.kernel_size:
        return x.numel() // geometry.in_channels
    padded = tuple(size + sum(p) for size, p in zip(x.shape[2:], geometry.padding, strict=True))
    count = x.shape[0]
    for size in geometry.output_size(padded):
        count *= size
    return count
