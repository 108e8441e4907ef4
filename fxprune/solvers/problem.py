"""The layer problem that every solver solves, and its damping.

minimise over sparse W (R x D)    tr(W H W^T) - 2 tr(T W^T)

With H = X X^T and T = W_dense X X^T this is ||W_dense X - W X||^2 (Frantar & Alistarh 2023, eq. 1). With another wanted
output Y, T = Y X^T, it is ||Y - W X||^2, whose dense optimum W* = T H^-1 need not be W_dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.errors import SolverError

DAMPING_TRIES = 6
SMALLEST_DAMPING = 1e-6


@dataclass(frozen=True)
class LayerProblem:
    """One layer's least-squares problem; a leading dimension G, if there is one, holds the groups of a grouped conv.

    Attributes:
        hessian: (..., D, D) H, symmetric; positive definite after `damped`.
        target: (..., R, D) T, the cross term of the wanted output with the input.
        weight: (..., R, D) the dense weights, towards which damping pulls.
        damping: the largest damping in `hessian`, relative to the mean of its diagonal.
        pull: (..., R, D) what damping has added to the target, or None.
    """

    hessian: Tensor
    target: Tensor
    weight: Tensor
    damping: float = 0.0
    pull: Tensor | None = None

    def damped(self, damping: float) -> LayerProblem:
        """(H + lambda I, T + lambda W) with lambda = damping * mean(diag H), positive definite.

        If a Cholesky factorisation fails, the damping is raised tenfold, up to five times. An input that is always zero
        (H_jj = 0) costs nothing; under damping its weight stays as it was unless the pattern wants a zero there.

        Raises:
            SolverError: if H or T is not finite, or no damping tried makes H positive definite.
        """
        if not (torch.isfinite(self.hessian).all() and torch.isfinite(self.target).all()):
            raise SolverError("the layer's statistics hold NaN or infinite values; check the calibration data")
        diagonal = self.hessian.diagonal(dim1=-2, dim2=-1)
        scale = diagonal.mean(-1, keepdim=True)
        for _ in range(DAMPING_TRIES):
            # A group whose inputs are all dead has nothing to learn from: lambda = 1 keeps its weights.
            shift = torch.where(scale > 0, damping * scale, 1.0).expand_as(diagonal)
            if damping == 0:
                shift = torch.where(diagonal == 0, 1.0, shift)
            hessian = self.hessian + torch.diag_embed(shift)
            if not torch.linalg.cholesky_ex(hessian).info.any():
                pull = self.weight * shift[..., None, :]
                return replace(self, hessian=hessian, target=self.target + pull, damping=damping, pull=pull)
            damping = max(10 * damping, SMALLEST_DAMPING)
        raise SolverError(
            f"the Hessian ({self.hessian.shape[-1]} columns) is not positive definite even with damping "
            f"{damping / 10:g}; use more calibration images, or more damping"
        )

    def groups(self) -> Iterator[LayerProblem]:
        """The problem of each group, (D, D) and (R, D)."""
        for hessian, target, weight in zip(self.hessian, self.target, self.weight, strict=True):
            yield replace(self, hessian=hessian, target=target, weight=weight, pull=None)

    def retargeted(self, target: Tensor) -> LayerProblem:
        """The same inputs and damping with another cross term T, (..., R, D), given undamped."""
        return replace(self, target=target if self.pull is None else target + self.pull)

    def optimum(self) -> Tensor:
        """W* = T H^-1, (..., R, D), the dense minimiser."""
        factor = torch.linalg.cholesky(self.hessian)
        return torch.cholesky_solve(self.target.mT, factor).mT

    def loss(self, weight: Tensor) -> Tensor:
        """tr(W H W^T) - 2 tr(T W^T), (...): the squared output error up to a constant."""
        return ((weight @ self.hessian - 2 * self.target) * weight).sum((-2, -1))
