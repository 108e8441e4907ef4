"""Given a mask, the best weights on it: each row solves H_SS w = t_S on its own support S.

Small problems are solved by batched Cholesky factorisations of the gathered H_SS, large ones by conjugate gradients on
all rows at once (Jacobi preconditioned, restricted to the mask), which needs no gathered copies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxprune.solvers.problem import LayerProblem

CHUNK_BYTES = 256 * 2**20
CG_TOLERANCE = 3e-3  # Leaves less than 1e-3 of the layer error: 5e-6 of the output's energy, of which 1e-2 is lost.
CG_ITERATIONS = 100
CG_COST = 20  # Iterations that conjugate gradients are expected to take: they start near the solution.


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
    if support**3 / 3 > CG_COST * mask.shape[1] ** 2:
        # float32 takes half the time, and its rounding errors are below the tolerance. Scaling by a power of two is exact, and
        # keeps H within float32's range whatever the size of the activations.
        scale = torch.exp2(-problem.hessian.diagonal().max().log2().round())
        hessian, target = (problem.hessian * scale).float(), (problem.target * scale).float()
        single = replace(problem, hessian=hessian, target=target, factors={})
        start = None if start is None else start.float()
        return refit_by_conjugate_gradients(single, mask, start=start).to(problem.target.dtype)
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
    problem: LayerProblem, mask: Tensor, *, start: Tensor | None = None, tolerance: float = CG_TOLERANCE
) -> Tensor:
    """Conjugate gradients on H_SS w = t_S, every row its own step lengths; stops at a relative residual of `tolerance`."""
    scale = 1 / problem.hessian.diagonal()  # Jacobi preconditioner
    weight = torch.zeros_like(problem.target) if start is None else start * mask
    residual = (problem.target - weight @ problem.hessian) * mask
    wanted = tolerance**2 * ((problem.target * mask) ** 2 * scale).sum(1)
    preconditioned = residual * scale
    direction, energy = preconditioned, (residual * preconditioned).sum(1)
    for _ in range(CG_ITERATIONS):
        if all(problem.of_all(bool((energy <= wanted).all()))):
            break
        image = (direction @ problem.hessian) * mask
        curvature = (direction * image).sum(1)
        step = torch.where(curvature > 0, energy / curvature, 0)[:, None]
        weight = weight + step * direction
        residual = residual - step * image
        preconditioned = residual * scale
        energy, previous = (residual * preconditioned).sum(1), energy
        direction = preconditioned + torch.where(previous > 0, energy / previous, 0)[:, None] * direction
    return weight * mask
