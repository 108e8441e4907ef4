"""X (H + rho I) = Y for many rho and one H of many columns: products with H, and one inverse that serves every rho.

A factorisation of each H + rho I would take most of the time of a wide layer. Here one inverse, of H + rho_0 I, is the
preconditioner of conjugate gradients for all of them: (H + rho I) (H + rho_0 I)^-1 has its eigenvalues between
min(1, rho / rho_0) and max(1, rho / rho_0), however badly conditioned H is. Neither has to be exact, so both factors are
held in bfloat16 where the processor multiplies in it.

H of few patches has a low rank. Then H = diag(d) + U U^T, products take a share k / D of the time, and the inverse is exact
for every rho, by the formula of Sherman, Morrison and Woodbury.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxprune.solvers.problem import LayerProblem

MIDDLE_RHO = 0.3  # rho_0, for rho from 0.1 to 1 and a diagonal of ones.
INVERSE_LEAF = 256
LOW_RANK = 8  # A rank of at most D / 8 pays.
LEFT_OUT = 1e-3  # Of the damping: by so much at most a low-rank form may differ from H, in the mean of its eigenvalues.


class ShiftedSystems(Protocol):
    """What is known of H + rho I, in float32."""

    def product(self, x: Tensor) -> Tensor:
        """X H, (R, D) -> (R, D)."""

    def divided(self, x: Tensor, rho: float) -> Tensor:
        """About X (H + rho I)^-1, (R, D) -> (R, D): linear in X, symmetric and positive definite."""


def systems_of(problem: LayerProblem) -> ShiftedSystems:
    """Those of a damped problem's H / (s s^T), s = sqrt(diag H), whose diagonal is ones."""
    scale = problem.hessian.diagonal().sqrt()
    if problem.shift is not None and problem.rank is not None and LOW_RANK * problem.rank <= len(scale):
        if (systems := low_rank_systems(problem.hessian, problem.shift, problem.rank, scale)) is not None:
            return systems
    hessian = problem.hessian / scale[:, None]
    hessian /= scale
    return DenseSystems(hessian.float())


class DenseSystems:
    """Of H as a matrix.

    Args:
        hessian: (D, D) float32, symmetric positive definite, with a diagonal of about ones.
    """

    def __init__(self, hessian: Tensor) -> None:
        shifted = hessian.clone()
        shifted.diagonal().add_(MIDDLE_RHO)
        self._dtype = product_dtype(hessian.device)
        self._inverse = inverse(shifted).to(self._dtype)
        self._hessian = hessian.to(self._dtype)

    def product(self, x: Tensor) -> Tensor:  # noqa: D102 - documented on ShiftedSystems
        return (x.to(self._dtype) @ self._hessian).to(x.dtype)

    def divided(self, x: Tensor, rho: float) -> Tensor:  # noqa: D102
        return (x.to(self._dtype) @ self._inverse).to(x.dtype)


@dataclass(frozen=True)
class LowRankSystems:
    """Of H = diag(d) + U U^T.

    Attributes:
        diagonal: (D,) d > 0.
        factor: (D, k) U.
    """

    diagonal: Tensor
    factor: Tensor

    def product(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * self.diagonal + (x @ self.factor) @ self.factor.mT

    def divided(self, x: Tensor, rho: float) -> Tensor:  # noqa: D102
        weighted = self.factor / (self.diagonal + rho)[:, None]
        inner = self.factor.mT @ weighted
        inner.diagonal().add_(1.0)
        x = x / (self.diagonal + rho)
        return x - torch.cholesky_solve((x @ self.factor).mT, torch.linalg.cholesky(inner)).mT @ weighted.mT

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of H^-1, (D,)."""
        weighted = self.factor / self.diagonal[:, None]
        inner = self.factor.mT @ weighted
        inner.diagonal().add_(1.0)
        solved = torch.cholesky_solve(weighted.mT, torch.linalg.cholesky(inner)).mT
        return 1 / self.diagonal - (weighted * solved).sum(1)


def conjugate_gradients(
    systems: ShiftedSystems,
    found: Tensor,
    image: Tensor,
    wanted: Tensor,
    rho: float,
    *,
    steps: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Bring X closer to the solution of X (H + rho I) = Y, every row with its own step lengths.

    Args:
        systems: H, and about (H + rho I)^-1.
        found: (R, D) X to start from.
        image: (R, D) X H.
        wanted: (R, D) Y.
        rho: at least 0.
        steps: at most so many, of one product and one division each.
        tolerance: of the residual's norm, relative to that of Y.

    Returns:
        X and X H.
    """
    found, image = found.clone(), image.clone()
    residual = (wanted - image).sub_(found, alpha=rho)
    enough = tolerance * wanted.norm()
    direction, energy = torch.zeros_like(found), None
    for _ in range(steps):
        if bool(residual.norm() <= enough):
            break
        divided = systems.divided(residual, rho)
        before, energy = energy, torch.linalg.vecdot(residual, divided)[:, None]
        direction = divided if before is None else divided.addcmul_(direction, _quotient(energy, before))
        product = systems.product(direction)
        curvature = torch.linalg.vecdot(direction, product) + rho * torch.linalg.vecdot(direction, direction)
        step = _quotient(energy, curvature[:, None])
        found.addcmul_(direction, step)
        image.addcmul_(product, step)
        residual.addcmul_(product.add_(direction, alpha=rho), -step)
    return found, image


def low_rank_systems(hessian: Tensor, shift: Tensor, rank: int, scale: Tensor) -> LowRankSystems | None:
    """H / (s s^T) as a diagonal and a few columns; None where H - diag(shift) has not so low a rank.

    The columns are a Nystrom approximation of H0 = H - diag(shift) from as many random columns as its rank: exact up to
    rounding, and certain, since H0 - U U^T is positive semidefinite and its trace says how large it is (Tropp et al. 2017).

    Args:
        hessian: (D, D) float64, positive definite.
        shift: (D,) float64, what damping has added to a positive semidefinite H0.
        rank: that H0 has at most.
        scale: (D,) float64, s.
    """
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(len(hessian), rank, generator=generator, dtype=torch.float64).to(hessian)
    columns = hessian @ sketch - shift[:, None] * sketch
    rounding = torch.finfo(columns.dtype).eps * columns.norm()
    columns += rounding * sketch
    factor, info = torch.linalg.cholesky_ex(sketch.mT @ columns)
    if info:
        return None
    columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    left_out = (hessian.diagonal() - shift).sum() - columns.square().sum()
    if bool(left_out.abs() > LEFT_OUT * shift.sum()):
        return None
    return LowRankSystems((shift / scale.square()).float(), (columns / scale[:, None]).float())


def inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric positive definite matrix (D, D), by halves, nearly all of it large products.

    With A and C its diagonal blocks, B above them at the right and S = C - B^T A^-1 B, the inverse has S^-1 below, -A^-1 B S^-1
    at the right, and A^-1 + A^-1 B S^-1 B^T A^-1 above.
    """
    if len(matrix) <= INVERSE_LEAF:
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    half = len(matrix) // 2
    above, beside = inverse(matrix[:half, :half]), matrix[:half, half:]
    solved = above @ beside
    below = inverse(torch.addmm(matrix[half:, half:], beside.mT, solved, alpha=-1))
    result = torch.empty_like(matrix)
    corner = torch.matmul(solved, below)
    torch.addmm(above, corner, solved.mT, out=result[:half, :half])
    result[:half, half:] = corner.neg_()
    result[half:, :half] = corner.mT
    result[half:, half:] = below
    return result


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, which takes less than half of float32's time; else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where there is nothing left to divide: a row that is solved exactly stays where it is."""
    return torch.where(denominator > 0, numerator / denominator, 0)
