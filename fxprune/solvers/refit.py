"""Given a mask, the best weights on it: each row solves H_SS w = t_S on its own support S.

Small problems are solved by batched Cholesky factorisations of the gathered H_SS, large ones by conjugate gradients on
all rows at once, for inputs of unit variance and restricted to the mask, which needs no gathered copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.solvers.problem import LARGE_WORK, LayerProblem, largest_weight

CHUNK_BYTES = 256 * 2**20
CG_TOLERANCE = 1e-3  # At 3e-3 a layer's error was up to 2.6% higher, at the least damping.
CG_ITERATIONS = 100
FEWER = 0.7  # When so many of the rows are left they go on by themselves.
CG_COST = 20  # Iterations that conjugate gradients are expected to take: they start near the solution.
LARGE_CG_COST = 3  # The same, less what float32 and large products gain over many small factorisations.


def refit(problem: LayerProblem, mask: Tensor, *, start: Tensor | None = None) -> Tensor:
    """Least squares on the support of `mask` (R, D); returns (R, D), zero outside it.

    Args:
        problem: damped layer problem.
        mask: True where a weight may differ from zero.
        start: (R, D) weights from which conjugate gradients start.
    """
    support = max(problem.of_all(int(mask.sum(1).max())))
    if support == 0:
        return torch.zeros_like(problem.target)
    # Cholesky: S^3 / 3 MACs a row, at a lower rate than a large product; conjugate gradients: D^2 an iteration.
    rows = sum(problem.of_all(len(mask)))
    cost = CG_COST if rows * mask.shape[1] ** 2 <= LARGE_WORK else LARGE_CG_COST
    if support**3 / 3 > cost * mask.shape[1] ** 2:
        # float32 takes half the time, and its rounding errors are below the tolerance. With inputs of unit variance H needs no
        # other preconditioner, and with weights relative to about the largest, activations and outputs may be of any size.
        scale = problem.hessian.diagonal().sqrt()
        product: Callable[[Tensor], Tensor]
        product = problem.single.__rmatmul__ if problem.low_rank is None else problem.low_rank.product
        relative = scale / largest_weight(problem)
        target = (problem.target * (relative / scale.square())).float()
        start = None if start is None else (start * relative).float()
        return refit_by_conjugate_gradients(product, target, mask, start=start).to(scale) / relative
    return refit_by_cholesky(problem, mask)


def refit_by_cholesky(problem: LayerProblem, mask: Tensor) -> Tensor:
    """Gather H_SS for a chunk of rows and factor the chunk at once."""
    weight = torch.zeros_like(problem.target)
    sizes, order = mask.sum(1).sort(descending=True)  # Rows of like support together: little padding.
    at = 0
    while at < len(order) and sizes[at] > 0:
        size = int(sizes[at])
        rows = order[at : at + max(1, CHUNK_BYTES // (size * size * 2 * mask.element_size() * 8))]
        # Indices of the kept columns first; shorter rows are padded with columns turned into the identity.
        valid, columns = mask[rows].sort(dim=1, descending=True, stable=True)
        valid, columns = valid[:, :size], columns[:, :size]
        system = problem.hessian[columns[:, :, None], columns[:, None, :]]
        system *= valid[:, :, None] & valid[:, None, :]
        system.diagonal(dim1=1, dim2=2)[~valid] = 1
        wanted = problem.target[rows].gather(1, columns) * valid
        solved = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        weight[rows] = weight[rows].scatter_(1, columns, solved)
        at += len(rows)
    return weight * mask


def refit_by_conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    target: Tensor,
    mask: Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float = CG_TOLERANCE,
) -> Tensor:
    """Conjugate gradients on H_SS w = t_S, every row its own step lengths; a row stops at a relative residual of `tolerance`.

    Args:
        product: X -> X H, (n, D) -> (n, D), H with a diagonal of ones.
        target: (R, D) T.
        mask: True where a weight may differ from zero.
        start: (R, D) weights to start from.
        tolerance: of each row's residual.
    """
    found = torch.zeros_like(target) if start is None else start * mask
    residual = target - product(found) if start is not None else target.clone()
    residual *= mask
    wanted, energy = tolerance**2 * (target * mask).square().sum(1), residual.square().sum(1)
    rows, weight, direction = torch.arange(len(target), device=target.device), found.clone(), residual.clone()
    for _ in range(CG_ITERATIONS):
        left = energy > wanted
        if (count := int(left.sum())) <= FEWER * len(rows):  # Most rows need few iterations, and some need many.
            found[rows] = weight
            rows, weight, residual, direction = rows[left], weight[left], residual[left], direction[left]
            mask, wanted, energy, left = mask[left], wanted[left], energy[left], left[left]
        if not count:
            break
        image = product(direction).mul_(mask)
        curvature = torch.linalg.vecdot(direction, image)
        step = torch.where(left & (curvature > 0), energy / curvature, 0)[:, None]
        weight.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        energy, previous = residual.square().sum(1), energy
        direction.mul_(torch.where(previous > 0, energy / previous, 0)[:, None]).add_(residual)
    found[rows] = weight
    return found
