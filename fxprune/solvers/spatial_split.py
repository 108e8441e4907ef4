"""Spatial split: a ky x kx convolution as ky x 1 to r channels, then 1 x kx (Jaderberg et al. 2014, scheme 2).

    W'[o, y, x, c] = sum over r of V[o, x, r] U[r, y, c]

In the plain norm the best factors come from the SVD of W arranged as (y, c) by (o, x). Under the output norm ||(W* - W') L||
the two factors do not separate, so we alternate: V for given U is ordinary least squares; U for given V is a linear
system that conjugate gradients solve without forming it. The start is the SVD of W*, its rows weighted by the
Hessian's own blocks (averaged over x), which is exact where columns x of the kernel see uncorrelated inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.solvers.low_rank import checked_rank, solve_positive
from fxprune.solvers.problem import LayerProblem

ROUNDS = 6
CG_ITERATIONS = 8


@dataclass(frozen=True)
class SpatialFactors:
    """The two kernels of a spatial split.

    Attributes:
        first: U (r, ky, C), the ky x 1 kernel.
        second: V (R, kx, r), the 1 x kx kernel.
        spectrum: (min(ky C, kx R),) singular values, descending, of the arrangement that the start is taken from.
    """

    first: Tensor
    second: Tensor
    spectrum: Tensor

    @property
    def product(self) -> Tensor:
        """(R, ky kx C), channels innermost."""
        return torch.einsum("oxr,ryc->oyxc", self.second, self.first).flatten(1)


def plain_spatial_factors(weight: Tensor, kernel: tuple[int, int], rank: int) -> SpatialFactors:
    """Best split of a weight (R, ky kx C), channels innermost, in the Frobenius norm."""
    rows = arranged(weight, kernel)
    return _from_svd(rows, None, (*kernel, weight.shape[0]), rank)


def data_aware_spatial_factors(
    problem: LayerProblem, kernel: tuple[int, int], rank: int, *, rounds: int = ROUNDS
) -> SpatialFactors:
    """A split with small output error, by alternating least squares.

    Args:
        problem: damped problem of one group, columns ordered (ky, kx, C).
        kernel: (ky, kx).
        rank: r, from 1 to min(ky C, kx R).
        rounds: alternations; 0 gives the start with the second kernel fitted.
    """
    weight = problem.optimum()
    columns, metric = _metric(problem, kernel)
    start = _from_svd(arranged(weight, kernel), metric, (*kernel, len(weight)), rank)
    first, second = start.first, _second_given(problem, columns, start.first, kernel)
    for _ in range(rounds):
        first, second = _orthogonal(first, second)
        first = _first_given(problem, columns, first, second, metric, kernel)
        second = _second_given(problem, columns, first, kernel)
    return _balanced(replace(start, first=first, second=second))


def whitened_arrangement(problem: LayerProblem, kernel: tuple[int, int]) -> Tensor:
    """The matrix (ky C, kx R) whose SVD `data_aware_spatial_factors` starts from."""
    return _metric(problem, kernel)[1].mT @ arranged(problem.optimum(), kernel)


def spatial_errors(problem: LayerProblem, kernel: tuple[int, int], ranks: Sequence[int]) -> Tensor:
    """Error of `data_aware_spatial_factors` without any rounds, relative to what the dense optimum explains, (len(ranks),).

    The rounds lower it by a further tenth to a half.
    """
    weight = problem.optimum()
    columns, metric = _metric(problem, kernel)
    start = _from_svd(arranged(weight, kernel), metric, (*kernel, len(weight)), max(ranks))
    system, wanted = _normal_equations(problem, columns, start.first, kernel)
    explained = (weight * problem.target).sum()
    gained = []
    for rank in ranks:  # The start of a lower rank is the first part of that of a higher one.
        own = wanted[:, :rank].flatten(0, 1)
        second = solve_positive(system[:, :rank, :, :rank].flatten(2).flatten(0, 1), own)
        gained.append((second * own).sum())
    return (1 - torch.stack(gained) / explained).clamp(0, 1) if explained > 0 else weight.new_zeros(len(ranks))


def refit_second_kernel(problem: LayerProblem, kernel: tuple[int, int], first: Tensor) -> Tensor:
    """Least squares for V (R, kx, r), U (r, ky, C) given."""
    return _second_given(problem, _metric(problem, kernel)[0], first, kernel)


def _metric(problem: LayerProblem, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows of H at each kernel column x, (kx, ky C, D), and the lower factor of the mean over x of H_xx, (ky C, ky C)."""
    columns = problem.hessian.unflatten(0, (*kernel, -1)).transpose(0, 1).flatten(1, 2)
    own = [_columns_at(block, kernel, x) for x, block in enumerate(columns)]
    return columns, torch.linalg.cholesky(torch.stack(own).mean(0))


def arranged(weight: Tensor, kernel: tuple[int, int]) -> Tensor:
    """A weight (R, ky kx C), channels innermost, as (ky C, kx R): a spatial split of rank r is one of its rank r."""
    matrix: Tensor = weight.unflatten(1, (*kernel, -1)).permute(1, 3, 2, 0).flatten(2).flatten(0, 1)
    return matrix


def _from_svd(matrix: Tensor, metric: Tensor | None, sizes: tuple[int, int, int], rank: int) -> SpatialFactors:
    """Factors from the SVD of M^T A (ky C, kx R), M the lower factor of the rows' metric (None: the identity)."""
    ky, kx, outputs = sizes
    left, spectrum, right = torch.linalg.svd(matrix if metric is None else metric.mT @ matrix, full_matrices=False)
    rank = checked_rank(rank, len(spectrum))
    root = spectrum[:rank].sqrt()
    first = left[:, :rank] * root
    if metric is not None:
        first = torch.linalg.solve_triangular(metric.mT, first, upper=True)
    second = (root[:, None] * right[:rank]).unflatten(1, (kx, outputs)).permute(2, 1, 0)
    return SpatialFactors(first.mT.unflatten(1, (ky, -1)), second, spectrum)


def _columns_at(block: Tensor, kernel: tuple[int, int], x: int) -> Tensor:
    """Columns (n, D) at kernel column x, as (n, ky C)."""
    columns: Tensor = block.unflatten(1, (*kernel, -1))[:, :, x].flatten(1)
    return columns


def _second_given(problem: LayerProblem, columns: Tensor, first: Tensor, kernel: tuple[int, int]) -> Tensor:
    """V (R, kx, r): the least squares problem in the kx r features that U makes of a patch."""
    system, wanted = _normal_equations(problem, columns, first, kernel)
    solved = solve_positive(system.flatten(2).flatten(0, 1), wanted.flatten(0, 1))
    kernels: Tensor = solved.unflatten(0, (kernel[1], -1)).permute(2, 0, 1)
    return kernels


def _normal_equations(
    problem: LayerProblem, columns: Tensor, first: Tensor, kernel: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Products of the features with each other, (kx, r, kx, r), and with the target, (kx, r, R)."""
    flat = first.flatten(1)
    seen = (flat @ columns).unflatten(2, (*kernel, -1))  # U H: at (x, r), with every column
    system = torch.einsum("xryzc,syc->xrzs", seen, first)
    wanted = torch.einsum("oyxc,ryc->xro", problem.target.unflatten(1, (*kernel, -1)), first)
    return system, wanted


def _first_given(
    problem: LayerProblem, columns: Tensor, first: Tensor, second: Tensor, metric: Tensor, kernel: tuple[int, int]
) -> Tensor:
    """U (r, ky, C): conjugate gradients from the present one, preconditioned by the averaged own blocks.

    With orthonormal V the preconditioner is the system itself, but for products of different kernel columns.
    """
    overlap = torch.einsum("oxr,ozs->xzrs", second, second)  # V_x^T V_z
    wanted = torch.einsum("oxr,oyxc->ryc", second, problem.target.unflatten(1, (*kernel, -1))).flatten(1)

    def image(flat: Tensor) -> Tensor:
        seen = (flat @ columns).unflatten(2, (*kernel, -1))  # U H: at (z, s), with every column
        return torch.einsum("xzrs,zsyxc->ryc", overlap, seen).flatten(1)

    def preconditioned(residual: Tensor) -> Tensor:
        solved: Tensor = torch.cholesky_solve(residual.mT, metric).mT
        return solved

    flat = first.flatten(1)
    residual = wanted - image(flat)
    direction = preconditioned(residual)
    energy = (residual * direction).sum()
    for _ in range(CG_ITERATIONS):
        moved = image(direction)
        curvature = (direction * moved).sum()
        if curvature <= 0 or energy <= 0:
            break
        step = energy / curvature
        flat, residual = flat + step * direction, residual - step * moved
        solved = preconditioned(residual)
        energy, previous = (residual * solved).sum(), energy
        direction = solved + energy / previous * direction
    kernels: Tensor = flat.unflatten(1, (kernel[0], -1))
    return kernels


def _orthogonal(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal columns (o, x) in V."""
    basis, mixing = torch.linalg.qr(second.flatten(0, 1))
    return torch.einsum("rs,syc->ryc", mixing, first), basis.unflatten(0, second.shape[:2])


def _balanced(factors: SpatialFactors) -> SpatialFactors:
    """The same product with kernels of equal norm for each channel between them."""
    norms = [torch.linalg.vector_norm(factors.first, dim=(1, 2)), torch.linalg.vector_norm(factors.second, dim=(0, 1))]
    size = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[0] / norms[1]).sqrt(), 1.0)
    return replace(factors, first=factors.first / size[:, None, None], second=factors.second * size)


def first_hessian(problem: LayerProblem, kernel: tuple[int, int]) -> Tensor:
    """H of the ky x 1 kernel's inputs, (ky C, ky C): the mean over the kx places at which the second kernel reads it."""
    blocks = problem.hessian.unflatten(0, (*kernel, -1)).transpose(0, 1).flatten(1, 2)
    return torch.stack([_columns_at(block, kernel, x) for x, block in enumerate(blocks)]).mean(0)


def second_equations(problem: LayerProblem, first: Tensor, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """H (kx r, kx r) and T (R, kx r) of the 1 x kx kernel, U (r, ky, C) given."""
    system, wanted = _normal_equations(problem, _metric(problem, kernel)[0], first, kernel)
    return system.flatten(2).flatten(0, 1), wanted.flatten(0, 1).mT
