"""How far the pruned model's outputs are from the dense model's: of one layer, and of the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.graph import module_of

CHUNK_NUMBERS = 2**17
ROUNDING = 1e-6  # Sums over a batch are taken in float32.


def channel_dim(layer: Node) -> int:
    """Where a layer's output has its channels: last for Linear, second for convolutions."""
    module = module_of(layer)  # While it is solved, a factored layer is an nn.Sequential of two.
    return -1 if isinstance(module[-1] if isinstance(module, nn.Sequential) else module, nn.Linear) else 1


@dataclass
class OutputError:
    """||y_dense - y_pruned||^2 / ||y_dense - mean||^2 of one layer, the mean per output channel."""

    channel_dim: int
    squared_error: float = 0.0
    squares: float = 0.0
    sums: Tensor | None = None
    count: int = 0

    def update(self, dense: Tensor, pruned: Tensor) -> None:
        """Add one batch of layer outputs."""
        # A few images at a time: their differences stay in the cache.
        step = max(1, CHUNK_NUMBERS * len(dense) // max(1, dense.numel()))
        parts = zip(dense.split(step), pruned.split(step), strict=True)
        norms = [torch.linalg.vector_norm(found - wanted) for wanted, found in parts]
        self.squared_error += float(torch.stack(norms).double().square().sum())
        self.squares += float(torch.linalg.vector_norm(dense)) ** 2
        sums = dense.sum([dim for dim in range(dense.dim()) if dim != self.channel_dim % dense.dim()]).double()
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += dense.numel() // len(sums)

    @property
    def relative(self) -> float:
        """The ratio; for an output that is constant, 0 if it is reproduced, else 1."""
        if self.sums is None:
            return 0.0
        variance = self.squares - float(self.sums.square().sum()) / self.count
        if variance <= ROUNDING * self.squares:
            return float(self.squared_error > ROUNDING * self.squares)
        return self.squared_error / variance


@dataclass
class OutputAgreement:
    """Top-1 agreement and KL(dense || pruned) of the model's outputs, if the output is one (N, classes) tensor."""

    same: int = 0
    divergence: float = 0.0
    count: int = 0

    def update(self, dense: Tensor, pruned: Tensor) -> None:
        """Add one batch of (N, classes) logits."""
        dense, pruned = dense.double(), pruned.double()
        self.same += int((dense.argmax(1) == pruned.argmax(1)).sum())
        log_dense, log_pruned = dense.log_softmax(1), pruned.log_softmax(1)
        self.divergence += float((log_dense.exp() * (log_dense - log_pruned)).sum())
        self.count += len(dense)

    @property
    def agreement(self) -> float | None:
        """Percent, or None."""
        return 100 * self.same / self.count if self.count else None

    @property
    def kl(self) -> float | None:
        """Nats a sample, or None."""
        return self.divergence / self.count if self.count else None
