"""The layer problem that every solver solves, and its damping.

minimise over sparse W (R x D)    tr(W H W^T) - 2 tr(T W^T)

With H = X X^T and T = W_dense X X^T this is ||W_dense X - W X||^2 (Frantar & Alistarh 2023, eq. 1). With another target Y,
T = Y X^T, it is ||Y - W X||^2, whose dense optimum W* = T H^-1 need not be W_dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxprune.errors import SolverError
from fxprune.solvers.few_columns import LowRankSystems, low_rank_systems

T = TypeVar("T")


def _only(figure: Any) -> list[Any]:
    return [figure]


DAMPING_TRIES = 6
SMALLEST_DAMPING = 1e-6
LARGE_WORK = 3 * 10**7  # MACs of one product R x D x D, above which products take the place of decompositions.
WIDE = 1024  # Columns from which float32 takes part in what only has to be nearly exact.


@dataclass(frozen=True)
class LayerProblem:
    """One layer's least-squares problem; a leading dimension G, if there is one, counts the groups of a grouped convolution.

    Attributes:
        hessian: (..., D, D) H, symmetric; positive definite after `damped`.
        target: (..., R, D) T, the cross term of the target with the input.
        weight: (..., R, D) the dense weights, towards which damping pulls.
        damping: the largest damping in `hessian`, relative to the mean of its diagonal.
        shift: (..., D) what damping has added to H's diagonal, or None.
        rank: that H has at most before damping: the patches it is taken from; None where that is not known.
        factors: what solvers have computed from H alone (`once`); problems of layers that share H share it.
        of_all: a figure of these rows -> that of all the parts in which the rows of the layer are solved at the same time.
    """

    hessian: Tensor
    target: Tensor
    weight: Tensor
    damping: float = 0.0
    shift: Tensor | None = None
    rank: int | None = None
    factors: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    of_all: Callable[[Any], list[Any]] = field(default=_only, repr=False, compare=False)

    @classmethod
    def of_weights(cls, weight: Tensor) -> LayerProblem:
        """The problem of a layer of which nothing was observed, for solvers that read its weight (..., R, D) alone.

        H and T are views of a single NaN: they take no memory, and a solver that reads them by mistake gives NaN.
        """
        unknown = weight.new_tensor(torch.nan)
        hessian = unknown.expand(*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
        return cls(hessian=hessian, target=unknown.expand_as(weight), weight=weight)

    @property
    def is_observed(self) -> bool:
        """Whether H and T are known (`of_weights`)."""
        return not bool(torch.isnan(self.hessian[..., 0, 0]).any())

    def damped(self, damping: float, factors: dict[Any, Any] | None = None) -> LayerProblem:
        """(H + lambda I, T + lambda W) with lambda = damping * mean(diag H), positive definite.

        If a Cholesky factorisation fails, the damping is raised tenfold, up to five times. An input that is always zero
        (H_jj = 0) costs nothing; under damping its weight stays as it was unless the pattern wants a zero there.

        Args:
            damping: relative to the mean of H's diagonal.
            factors: shared by the problems that have this H and damping: what one of them computes, the others find there.

        Raises:
            SolverError: if H or T is not finite, or no damping tried makes H positive definite.
        """
        # What is not finite makes the sum so.
        if not (torch.isfinite(self.hessian.sum()) and torch.isfinite(self.target.sum())):
            raise SolverError("the layer's statistics hold NaN or infinite values; check the calibration data")
        factors = {} if factors is None else factors
        if "damped" not in factors:
            factors["damped"] = self._damped(damping, factors)
        hessian, shift, damping = factors["damped"]
        return self._with(hessian, shift, damping, factors)

    def _damped(self, damping: float, factors: dict[Any, Any]) -> tuple[Tensor, Tensor, float]:
        """H + diag(shift), shift (..., D), and the damping that it took; what shows that H can be factored is kept."""
        for _ in range(DAMPING_TRIES):
            hessian, shift = self._shifted(damping)
            found = replace(self, hessian=hessian, shift=shift, factors=factors)
            if found._is_positive_definite():
                return hessian, shift, damping
            factors.clear()
            damping = max(10 * damping, SMALLEST_DAMPING)
        raise SolverError(
            f"the Hessian ({self.hessian.shape[-1]} columns) is not positive definite even with damping "
            f"{damping / 10:g}; use more calibration images, or more damping"
        )

    def _shifted(self, damping: float) -> tuple[Tensor, Tensor]:
        """H + diag(shift), whether it can be factored or not, and shift (..., D)."""
        shift = shift_of(self.hessian.diagonal(dim1=-2, dim2=-1), damping)
        hessian = self.hessian.clone()
        hessian.diagonal(dim1=-2, dim2=-1).add_(shift)
        return hessian, shift

    def _is_positive_definite(self) -> bool:
        """Whether H can be factored, as a wide one of few columns surely can.

        Other wide ones are tried in float32 first, which takes half the time: what it can factor with a unit diagonal has no
        eigenvalue below a rounding error of float32, in which such problems are solved. What it cannot factor may still be
        positive definite in float64.
        """
        if self.hessian.shape[-1] >= WIDE:
            groups = [self] if self.hessian.dim() == 2 else self.groups()
            if all(group.low_rank is not None for group in groups) or self.single_factor is not None:
                return True
        return not bool(torch.linalg.cholesky_ex(self.hessian).info.any())

    @property
    def low_rank(self) -> LowRankSystems | None:
        """H / (s s^T) of one group, s = sqrt(diag H), as a diagonal and a few columns in float32, or None."""
        return self.once("few columns", lambda: low_rank_systems(self.hessian, self.shift, self.rank))

    @property
    def single(self) -> Tensor:
        """H / (s s^T), (..., D, D) float32."""
        return self.once("float32", lambda: unit_diagonal(self.hessian).float())

    @property
    def single_factor(self) -> Tensor | None:
        """The Cholesky factor of H / (s s^T), (..., D, D) float32; None if it cannot be factored so."""
        return self.once("float32 factor", lambda: float32_factor(self.hessian))

    def image(self, weight: Tensor) -> Tensor:
        """W H, (..., R, D); for many columns in float32, relative to the inputs' deviations, or by few columns."""
        if self.hessian.shape[-1] < WIDE:
            return weight @ self.hessian
        if self.hessian.dim() == 3:
            return torch.stack([group.image(own) for group, own in zip(self.groups(), weight, strict=True)])
        scale = self.hessian.diagonal().sqrt()
        relative = weight * scale
        largest = relative.abs().max().clamp_min(torch.finfo(relative.dtype).tiny)
        relative = (relative / largest).float()
        product = self.single.__rmatmul__ if self.low_rank is None else self.low_rank.product
        found: Tensor = product(relative).to(scale)
        return found * (scale * largest)

    def _with(self, hessian: Tensor, shift: Tensor, damping: float, factors: dict[Any, Any]) -> LayerProblem:
        target = self.target + self.weight * shift[..., None, :]
        return replace(self, hessian=hessian, target=target, damping=damping, shift=shift, factors=factors)

    def groups(self) -> Iterator[LayerProblem]:
        """The problem of each group, (D, D) and (R, D)."""
        for g, (hessian, target, weight) in enumerate(zip(self.hessian, self.target, self.weight, strict=True)):
            factors = self.factors.setdefault(g, {})
            shift = None if self.shift is None else self.shift[g]
            yield replace(self, hessian=hessian, target=target, weight=weight, shift=shift, factors=factors)

    def rows(self, chosen: Tensor) -> LayerProblem:
        """The problem (D, D), (R, D) of some rows, given by their numbers."""
        return replace(self, target=self.target[chosen], weight=self.weight[chosen])

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What a solver computes from H alone: the first layer with this H computes it, the others find it."""
        if name not in self.factors:
            self.factors[name] = compute()
        result: T = self.factors[name]
        return result

    def optimum(self) -> Tensor:
        """W* = T H^-1, (..., R, D), the dense minimiser."""
        factor = self.once("Cholesky factor", lambda: torch.linalg.cholesky(self.hessian))
        return torch.cholesky_solve(self.target.mT, factor).mT

    def loss(self, weight: Tensor) -> Tensor:
        """tr(W H W^T) - 2 tr(T W^T), (...): the squared output error up to a constant."""
        return self.losses(weight).sum(-1)

    def losses(self, weight: Tensor) -> Tensor:
        """Of each row, (..., R)."""
        return ((self.image(weight) - 2 * self.target) * weight).sum(-1)


def shift_of(diagonal: Tensor, damping: float) -> Tensor:
    """What damping adds to H's diagonal, (..., D)."""
    # Of inputs that are the same for all images the centred diagonal is rounding, of either sign.
    scale = diagonal.abs().mean(-1, keepdim=True)
    # A group whose inputs are all dead has nothing to learn from: lambda = 1 keeps its weights.
    shift = torch.where(scale > 0, damping * scale, 1.0).expand_as(diagonal)
    return shift if damping else torch.where(diagonal == 0, 1.0, shift)


def float32_factor(hessian: Tensor) -> Tensor | None:
    """The Cholesky factor (..., D, D) of H / (s s^T), s = sqrt(diag H), in float32; None if it cannot be factored so."""
    factor, info = torch.linalg.cholesky_ex(unit_diagonal(hessian).float())
    return None if info.any() else factor


def unit_diagonal(hessian: Tensor) -> Tensor:
    """H / (s s^T), (..., D, D), s = sqrt(diag H)."""
    scale = hessian.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = hessian / scale[..., None]
    scaled /= scale[..., None, :]
    return scaled


def largest_weight(problem: LayerProblem) -> Tensor:
    """About the largest weight times its input's deviation, max |t_j| / sqrt(h_jj), a scalar: to divide by before float32."""
    scaled = problem.target / problem.hessian.diagonal().sqrt()
    return scaled.abs().max().clamp_min(torch.finfo(scaled.dtype).tiny)
