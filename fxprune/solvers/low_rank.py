"""Low-rank factors of a layer's weight, plain and data-aware, for a channel split.

Plain SVD is the best rank-r W' for ||W - W'||. What counts is the output: minimise ||Y - W' X|| over W' of rank r. With
H = X X^T = L L^T, T = Y X^T and the dense optimum W* = T H^-1,

    ||Y - W' X||^2 = ||(W* - W') L||^2 + const,

so keep the r largest singular values of W* L = T L^-T = P S Q^T and take W' = P_r S_r Q_r^T L^-1 = P_r (P_r^T W*): reduced-rank
regression (Izenman 1975). With Y = W X it is the response-aware factorisation of Zhang et al. 2015, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.errors import SolverError
from fxprune.solvers.problem import LayerProblem

RIDGE = 1e-11


@dataclass(frozen=True)
class Factors:
    """W' = second @ first.

    Attributes:
        first: (r, D), what reads the input.
        second: (R, r), what gives the output.
        spectrum: (min(R, D),) all singular values, descending: of W, or of W* L.
    """

    first: Tensor
    second: Tensor
    spectrum: Tensor

    @property
    def product(self) -> Tensor:
        """(R, D)."""
        return self.second @ self.first


def plain_factors(weight: Tensor, rank: int) -> Factors:
    """Best approximation of a weight (R, D) in the Frobenius norm (Eckart & Young 1936)."""
    left, spectrum, right = torch.linalg.svd(weight, full_matrices=False)
    rank = checked_rank(rank, len(spectrum))
    root = spectrum[:rank].sqrt()
    return Factors(root[:, None] * right[:rank], left[:, :rank] * root, spectrum)


def data_aware_factors(problem: LayerProblem, rank: int) -> Factors:
    """Best approximation of the target.

    Args:
        problem: damped problem of one group, (D, D) and (R, D).
        rank: r, from 1 to min(R, D).
    """
    left, spectrum, _ = torch.linalg.svd(whitened_target(problem), full_matrices=False)
    rank = checked_rank(rank, len(spectrum))
    left = left[:, :rank]
    # Both factors share the size of W', so that the channels between them neither vanish nor overflow in half precision.
    first = left.mT @ problem.optimum()
    size = torch.linalg.vector_norm(first, dim=1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    return Factors(first / size[:, None], left * size, spectrum)


def refit_second(problem: LayerProblem, first: Tensor) -> Tensor:
    """Least squares for the second factor (R, r), the first (r, D) given: T F^T (F H F^T)^-1."""
    second: Tensor = solve_positive(first @ problem.hessian @ first.mT, first @ problem.target.mT).mT
    return second


def solve_positive(system: Tensor, wanted: Tensor) -> Tensor:
    """Solve a symmetric system (n, n) for (n, m) that is positive semi-definite; a small ridge settles what it leaves open.

    Raises:
        SolverError: it is indefinite, or not finite.
    """
    ridge = RIDGE * system.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(system + ridge * torch.eye(len(system)).to(system))
    if (ridge > 0 and info.any()) or not torch.isfinite(ridge):
        raise SolverError("a factor's least-squares problem is not positive definite; use more damping")
    solved: Tensor = torch.cholesky_solve(wanted, factor) if ridge > 0 else torch.zeros_like(wanted)
    return solved


def whitened_target(problem: LayerProblem) -> Tensor:
    """T L^-T (R, D) with H = L L^T; its squared norm is what the dense optimum explains of the output."""
    factor = torch.linalg.cholesky(problem.hessian)
    whitened: Tensor = torch.linalg.solve_triangular(factor, problem.target.mT, upper=False).mT
    return whitened


def tail_energy(spectrum: Tensor) -> Tensor:
    """Share of the squared singular values that rank 0, 1, ..., n leaves out, (n + 1,); 0 for a spectrum of zeros."""
    energy = spectrum.double().square()
    left_out = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    shares: Tensor = left_out / left_out[0] if left_out[0] > 0 else left_out
    return shares


def checked_rank(rank: int, full: int) -> int:
    """The rank, if it lies between 1 and the full rank.

    Raises:
        SolverError: otherwise.
    """
    if not 1 <= rank <= full:
        raise SolverError(f"rank {rank} was asked for; this weight has ranks from 1 to {full}")
    return rank
