"""The moments of a layer's inputs and of its wanted output together, and of some of the images without the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fxprune.statistics.accumulators import CrossStatistics, InputStatistics


@dataclass(frozen=True)
class Centred:
    """Moments about the means: H (G, D, D), T (G, R/G, D), and the means (G, D) and (G, R/G), all float64."""

    hessian: Tensor
    target: Tensor
    mean: Tensor
    mean_target: Tensor


@dataclass(frozen=True)
class Moments:
    """Those of a layer's inputs, and of its wanted output with them, over the same patches."""

    inputs: InputStatistics
    cross: CrossStatistics

    @cached_property
    def centred(self) -> Centred:
        """About the means of all that was seen."""
        hessian, target = self.inputs.hessian(centred=True), self.cross.target(self.inputs, None, centred=True)
        return Centred(hessian, target, self.inputs.mean, self.cross.mean)

    def without(self, part: Moments) -> Centred:
        """Those of the images that are not in a part of what was seen, by Chan, Golub & LeVeque 1983."""
        count, own, a, b = self.inputs.count, part.inputs.count, self.centred, part.centred
        left = count - own
        x, y = a.mean - b.mean, a.mean_target - b.mean_target
        between = count * own / left
        return Centred(
            (count * a.hessian - own * b.hessian - between * x[:, :, None] * x[:, None, :]) / left,
            (count * a.target - own * b.target - between * y[:, :, None] * x[:, None, :]) / left,
            a.mean + x * own / left,
            a.mean_target + y * own / left,
        )
