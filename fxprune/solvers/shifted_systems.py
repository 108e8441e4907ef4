"""X (H + rho I) = Y for many rho and one H of many columns: products with H, and one inverse that serves every rho.

A factorisation of each H + rho I would take most of the time of a wide layer. Here one inverse, of H + rho_0 I, is the
preconditioner of conjugate gradients for all of them: (H + rho I) (H + rho_0 I)^-1 has its eigenvalues between
min(1, rho / rho_0) and max(1, rho / rho_0), however badly conditioned H is. Neither has to be exact, so both factors are
held in bfloat16 where the processor multiplies in it. H of few patches is `few_columns.LowRankSystems`, exact for every rho.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fxprune.solvers.problem import WIDE, LayerProblem, unit_diagonal

MIDDLE_RHO = 0.3  # rho_0, for rho from 0.1 to 1 and a diagonal of ones.
INVERSE_LEAF = 256
SHIFTS_STEPS, SHIFTS_TOLERANCE = 60, 1e-2  # For gains of which only the order counts.


class ShiftedSystems(Protocol):
    """What is known of H + rho I, in float32."""

    def product(self, x: Tensor) -> Tensor:
        """X H, (R, D) -> (R, D)."""

    def divided(self, x: Tensor, rho: float) -> Tensor:
        """About X (H + rho I)^-1, (R, D) -> (R, D): linear in X, symmetric and positive definite."""


def systems_of(problem: LayerProblem) -> ShiftedSystems:
    """Those of a damped problem's H / (s s^T), s = sqrt(diag H), whose diagonal is ones."""
    return problem.low_rank or DenseSystems(problem.single)


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


def divided_by_shifts(hessian: Tensor, wanted: Tensor, shifts: Sequence[Tensor]) -> list[Tensor]:
    """Y (H + sigma I)^-1 for several sigma, by conjugate gradients for the least of them.

    The residuals of the others are multiples of its own, so that one product with H serves all (Jegerlehner 1996).

    Args:
        hessian: (..., D, D) symmetric positive semidefinite.
        wanted: (..., R, D) Y.
        shifts: sigma > 0, ascending, of shape (..., 1, 1).

    Returns:
        (..., R, D) for each sigma.
    """
    least, more = shifts[0], [shift - shifts[0] for shift in shifts]
    residual, direction = wanted.clone(), wanted
    found, directions = [torch.zeros_like(wanted) for _ in shifts], [wanted for _ in shifts]
    energy = torch.linalg.vecdot(residual, residual)[..., None]
    enough = SHIFTS_TOLERANCE**2 * energy.sum()
    ones = torch.ones_like(energy)
    size, growth = ones, torch.zeros_like(energy)  # Of the last step, and of the last direction.
    multiples, before = [ones for _ in shifts], [ones for _ in shifts]  # Of the residual, now and a step ago.
    for _ in range(SHIFTS_STEPS):
        if bool(energy.sum() <= enough):
            break
        image = direction @ hessian + least * direction
        last, size = size, _quotient(energy, torch.linalg.vecdot(direction, image)[..., None])
        residual = residual - size * image
        previous, energy = energy, torch.linalg.vecdot(residual, residual)[..., None]
        last_growth, growth = growth, _quotient(energy, previous)
        direction = residual + growth * direction
        for j, shift in enumerate(more):
            now = multiples[j]
            then = size * last_growth * (before[j] - now) + last * before[j] * (1 + shift * size)
            ahead = torch.where(then > 0, now * before[j] * last / then, 0)
            share = torch.where(now > 0, ahead / now, 0)
            found[j] = found[j] + size * share * directions[j]
            directions[j] = ahead * residual + growth * share.square() * directions[j]
            before[j], multiples[j] = now, ahead
    return found


def inverse_diagonal(problem: LayerProblem) -> Tensor:
    """The diagonal of H^-1, (D,) float64, of one group's damped problem; of many columns by float32, if that can factor H."""
    low_rank = problem.low_rank
    scale = problem.hessian.diagonal().sqrt()
    if low_rank is not None:
        return low_rank.inverse_diagonal().to(scale) / scale.square()
    factor = problem.single_factor if len(scale) >= WIDE else None
    if factor is None:
        factor = torch.linalg.cholesky(unit_diagonal(problem.hessian))
    return inverse_of_lower(factor).square_().sum(0).to(scale) / scale.square()


def inverse_of_lower(matrix: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix (D, D), by halves: with B below A and beside C, -C^-1 B A^-1 is below A^-1."""
    if len(matrix) <= INVERSE_LEAF:
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        solved: Tensor = torch.linalg.solve_triangular(matrix, identity, upper=False)
        return solved
    half = len(matrix) // 2
    above, below = inverse_of_lower(matrix[:half, :half]), inverse_of_lower(matrix[half:, half:])
    result = torch.zeros_like(matrix)
    result[:half, :half], result[half:, half:] = above, below
    result[half:, :half] = (below @ matrix[half:, :half] @ above).neg_()
    return result


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
