"""Sparsity patterns: "2:4", "1:4", "0.9" parsed, projected onto a weight, and checked on a weight.

N:M keeps at most N of every M consecutive input channels, for each output channel and kernel position, which is
the rule that TensorRT's sparse kernels ask for (with 2:4). A number between 0 and 1 is unstructured sparsity: that
share of a layer's weights is zero.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.errors import PatternError
from fxprune.geometry import LayerGeometry, flatten_weight

ROUNDING = 1e-6  # 10 * (1 - 0.9) is a little less than 1.


@dataclass(frozen=True)
class PatternCheck:
    """What `Pattern.check` found: `violations` of `units` (groups of M for N:M, layers for unstructured)."""

    violations: int
    units: int
    sparsity: float

    @property
    def ok(self) -> bool:
        """Whether the weight satisfies the pattern everywhere."""
        return self.violations == 0


class Pattern(ABC):
    """A rule for which weights of a layer are zero. Use `Pattern.parse`."""

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Parse "N:M" (N kept of M), a sparsity such as "0.9", or "mixed:0.6"; a Pattern is returned as it is.

        Raises:
            PatternError: if the text is neither, or N:M does not satisfy 0 < N < M.

        >>> Pattern.parse("2:4").sparsity
        0.5
        >>> str(Pattern.parse("0.90"))
        '0.9'
        """
        if isinstance(text, Pattern):
            return text
        text = str(text).strip()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = int(match[1]), int(match[2])
            if not 0 < n < m:
                raise PatternError(f"pattern {text!r} keeps {n} of every {m} weights; N:M needs 0 < N < M, as in '2:4'")
            return NMPattern(n, m)
        mixed = text.startswith("mixed:")
        try:
            sparsity = float(text.removeprefix("mixed:"))
        except ValueError:
            sparsity = -1.0
        if mixed and 0 < sparsity <= 0.75:
            return MixedPattern(sparsity)
        if mixed or not 0 < sparsity < 1:
            raise PatternError(
                f"cannot read the pattern {text!r}; write N:M, such as '2:4' (2 kept of every 4 input channels), "
                "a sparsity between 0 and 1, such as '0.9', or 'mixed:0.6' (dense, 2:4 and 1:4 layers, at most 0.75)"
            )
        return UnstructuredPattern(sparsity)

    @staticmethod
    def is_pattern(text: str) -> bool:
        """Whether a text is in the notation of patterns, be its figures in range or not."""
        return re.fullmatch(r"\d+:\d+|mixed:.*|[-+]?[\d.]+(e[-+]?\d+)?", text.strip()) is not None

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Share of weights that the pattern sets to zero."""

    def kept(self, numel: int) -> int:
        """How many of `numel` weights stay at most; rounded down, so that parts which keep to it do so together."""
        return math.floor(numel - numel * self.sparsity + ROUNDING)

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Boolean mask of the weights to keep: those with the largest scores that the pattern allows.

        Args:
            scores: (..., R, D) floating point, columns with the input channels innermost.
        """

    @abstractmethod
    def check(self, weight: Tensor) -> PatternCheck:
        """Count where a weight (R, C, *kernel) or (R, C) breaks the pattern."""

    @abstractmethod
    def decline(self, geometry: LayerGeometry) -> str | None:
        """Why a layer of this geometry cannot take the pattern, or None if it can."""

    @property
    def levels(self) -> tuple[Pattern | None, ...]:
        """What a layer may get when all layers share one budget; None is dense."""
        raise PatternError(
            f"pattern {self} is the same for every layer; a budget needs a sparsity such as '0.9', or 'mixed:0.6'"
        )

    def project(self, weight: Tensor, scores: Tensor | None = None) -> Tensor:
        """The weight with all but the best-scored entries set to zero.

        Args:
            weight: (R, C, *kernel) or (R, C).
            scores: same shape; the magnitude of the weight by default.
        """
        scores = weight.abs() if scores is None else scores
        mask = self.mask(flatten_weight(scores))
        return weight * _unflatten(mask, weight.shape)


def _two_of_four(groups: Tensor) -> Tensor | None:
    """Which are the two largest of four, (..., 4) -> (..., 4); None if ties leave it open. A quarter of top-k's time."""
    first, second, third, fourth = groups.unbind(-1)
    least = torch.maximum(  # The second largest of four is the larger of these.
        torch.minimum(torch.maximum(first, second), torch.maximum(third, fourth)),
        torch.maximum(torch.minimum(first, second), torch.minimum(third, fourth)),
    )
    kept = groups >= least.unsqueeze(-1)
    return kept if 2 * int(kept.sum()) == kept.numel() else None


@dataclass(frozen=True)
class NMPattern(Pattern):
    """At most `n` non-zeros in every `m` consecutive input channels."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:  # noqa: D102 - documented on Pattern
        return 1 - self.n / self.m

    def mask(self, scores: Tensor) -> Tensor:  # noqa: D102
        if scores.shape[-1] % self.m:
            raise PatternError(f"{scores.shape[-1]} columns are not a multiple of {self.m}, as pattern {self} needs")
        groups = scores.unflatten(-1, (-1, self.m))
        if (self.n, self.m) == (2, 4) and (found := _two_of_four(groups)) is not None:
            return found.flatten(-2)
        kept = groups.topk(self.n, dim=-1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)

    def check(self, weight: Tensor) -> PatternCheck:  # noqa: D102
        if weight.shape[1] % self.m:
            raise PatternError(
                f"a weight of shape {tuple(weight.shape)} has {weight.shape[1]} input channels, "
                f"not a multiple of {self.m}, so pattern {self} does not apply to it"
            )
        nonzero = flatten_weight(weight != 0).unflatten(1, (-1, self.m)).sum(-1)
        sparsity = float((weight == 0).double().mean())
        return PatternCheck(int((nonzero > self.n).sum()), nonzero.numel(), sparsity)

    def decline(self, geometry: LayerGeometry) -> str | None:  # noqa: D102
        if geometry.is_depthwise:
            return f"depthwise: each group reads one channel, so no {self.m} channels can share a group"
        channels = geometry.in_channels // geometry.groups
        if channels % self.m:
            of_group = " per group" if geometry.groups > 1 else ""
            return f"{channels} input channels{of_group} are not a multiple of {self.m}"
        return None


@dataclass(frozen=True)
class UnstructuredPattern(Pattern):
    """A share `fraction` of all weights of the layer is zero, wherever that costs least."""

    fraction: float

    def __str__(self) -> str:
        return str(self.fraction)

    @property
    def sparsity(self) -> float:  # noqa: D102
        return self.fraction

    @property
    def levels(self) -> tuple[Pattern | None, ...]:  # noqa: D102
        densities = [round((1 - self.fraction) * 2 ** (i / 2), 4) for i in range(-4, 5)]
        sparse = [UnstructuredPattern(round(1 - density, 4)) for density in densities if 0 < density < 1]
        return (*sparse, None)

    def mask(self, scores: Tensor) -> Tensor:  # noqa: D102
        kept = scores.flatten().topk(self.kept(scores.numel()), sorted=False).indices
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        return mask.scatter_(0, kept, True).reshape(scores.shape)

    def check(self, weight: Tensor) -> PatternCheck:  # noqa: D102
        nonzero = int(torch.count_nonzero(weight))
        return PatternCheck(int(nonzero > self.kept(weight.numel())), 1, 1 - nonzero / weight.numel())

    def decline(self, geometry: LayerGeometry) -> str | None:  # noqa: D102
        if geometry.is_depthwise:
            return "depthwise: few weights, and each one matters to its whole channel"
        if geometry.in_channels // geometry.groups < 4:
            channels = geometry.in_channels // geometry.groups
            return f"{channels} input channels: few weights with much effect, as in a layer that reads the image"
        return None


@dataclass(frozen=True)
class MixedPattern(Pattern):
    """Each layer dense, 2:4 or 1:4, together at least `fraction` zeros; only a budget over layers can say which."""

    fraction: float

    def __str__(self) -> str:
        return f"mixed:{self.fraction}"

    @property
    def sparsity(self) -> float:  # noqa: D102
        return self.fraction

    @property
    def levels(self) -> tuple[Pattern | None, ...]:  # noqa: D102
        return (None, NMPattern(2, 4), NMPattern(1, 4))

    def mask(self, scores: Tensor) -> Tensor:  # noqa: D102
        raise PatternError(f"pattern {self} is a choice over layers; a single weight needs '2:4' or '1:4'")

    def check(self, weight: Tensor) -> PatternCheck:  # noqa: D102
        return NMPattern(2, 4).check(weight)

    def decline(self, geometry: LayerGeometry) -> str | None:  # noqa: D102
        return NMPattern(2, 4).decline(geometry)


def _unflatten(rows: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `flatten_weight` for a weight of the given shape."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
