"""The moments of a layer's inputs and of its wanted output together, and of some of the images without the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fxprune.statistics.accumulators import CrossStatistics, InputStatistics, moments_without


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
        # Another target of the same layer finds H there.
        factors = self.inputs.factors
        if "centred" not in factors:
            factors["centred"] = self.inputs.hessian(centred=True)
        hessian, target = factors["centred"], self.cross.target(self.inputs, None, centred=True)
        return Centred(hessian, target, self.inputs.mean, self.cross.mean)

    def without(self, part: Moments) -> Centred:
        """Those of the images that are not in a part of what was seen."""
        count, own, a, b = self.inputs.count, part.inputs.count, self.centred, part.centred
        left = count - own
        x, y = a.mean - b.mean, a.mean_target - b.mean_target
        return Centred(
            moments_without(a.hessian, b.hessian, count, own, x, x),
            moments_without(a.target, b.target, count, own, y, x),
            a.mean + x * own / left,
            a.mean_target + y * own / left,
        )
