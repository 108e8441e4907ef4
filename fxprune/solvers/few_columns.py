"""H of few patches: a diagonal and a few columns, H = diag(d) + U U^T, in which products and inverses take a share k / D."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOW_RANK = 8  # A rank of at most D / 8 pays.
LEFT_OUT = 1e-2  # Of the damping: by so much at most a low-rank form may differ from H, in the mean of its eigenvalues.


@dataclass(frozen=True)
class LowRankSystems:
    """Of H = diag(d) + U U^T; they are `shifted_systems.ShiftedSystems`.

    Attributes:
        diagonal: (D,) d > 0.
        factor: (D, k) U.
    """

    diagonal: Tensor
    factor: Tensor

    def product(self, x: Tensor) -> Tensor:
        """X H, (R, D) -> (R, D)."""
        return (x * self.diagonal).addmm_(x @ self.factor, self.factor.mT)

    def divided(self, x: Tensor, rho: float) -> Tensor:
        """X (H + rho I)^-1, (R, D) -> (R, D), by the formula of Sherman, Morrison and Woodbury."""
        weighted = self.factor / (self.diagonal + rho)[:, None]
        inner = self.factor.mT @ weighted
        inner.diagonal().add_(1.0)
        x = x / (self.diagonal + rho)
        solved = torch.cholesky_solve((x @ self.factor).mT, torch.linalg.cholesky(inner))
        return x.addmm_(solved.mT, weighted.mT, alpha=-1)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of H^-1, (D,)."""
        weighted = self.factor / self.diagonal[:, None]
        inner = self.factor.mT @ weighted
        inner.diagonal().add_(1.0)
        solved = torch.cholesky_solve(weighted.mT, torch.linalg.cholesky(inner)).mT
        return 1 / self.diagonal - (weighted * solved).sum(1)


def low_rank_systems(hessian: Tensor, shift: Tensor | None, rank: int | None) -> LowRankSystems | None:
    """H / (s s^T), s = sqrt(diag H), of H = H0 + diag(shift); None where it is not known to have so low a rank.

    Args:
        hessian: (D, D) float64 H.
        shift: (D,) what damping has added to the diagonal.
        rank: that H0 has at most.
    """
    if shift is None or not bool((shift > 0).all()):
        return None
    factor = columns_of(hessian, shift, rank, LEFT_OUT * float(shift.sum()))
    if factor is None:
        return None
    diagonal = hessian.diagonal()
    return LowRankSystems((shift / diagonal).float(), (factor / diagonal.sqrt()[:, None]).float())


def columns_of(hessian: Tensor, taken: Tensor, rank: int | None, allowed: float) -> Tensor | None:
    """U (D, k) with U U^T = H - diag(taken), positive semidefinite of at most this rank; None if so few columns do not do.

    They are a Nystrom approximation from as many random columns as the rank: exact up to rounding, and certain, since what
    they leave out is positive semidefinite too and its trace says how large it is (Tropp et al. 2017).

    Args:
        hessian: (D, D) float64.
        taken: (D,) from its diagonal.
        rank: k; None if it is not known.
        allowed: trace of what is left out.
    """
    if rank is None or LOW_RANK * rank > len(hessian):
        return None
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(len(hessian), rank, generator=generator, dtype=torch.float64).to(hessian)
    columns = hessian @ sketch - taken[:, None] * sketch
    values, vectors = torch.linalg.eigh(sketch.mT @ columns)
    # About means the rank is one less: that eigenvalue is what products in float32 have made of zero.
    some = values > torch.finfo(torch.float32).eps * values[-1].clamp_min(0)
    columns = columns @ (vectors[:, some] / values[some].sqrt())
    left_out = (hessian.diagonal() - taken).sum() - columns.square().sum()
    return None if bool(left_out.abs() > allowed) else columns
