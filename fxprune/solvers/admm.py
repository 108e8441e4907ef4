"""ADMM between the least-squares problem and the sparsity pattern (after ALPS, Meng et al. 2024).

B is dense and solves the damped problem, Z lies on the pattern, V is the multiplier that draws them together:

    B <- (Y - V + rho Z) (H^ + rho I)^-1        Z <- P(B + V / rho)        V <- V + rho (B - Z)

in coordinates scaled by s = sqrt(diag H), so that H^ = H / (s s^T) has a unit diagonal and |b| measures what a weight
is worth. All rows move together: an iteration is two matrix products and a top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.pattern import Pattern
from fxprune.solvers.problem import LayerProblem

START_RHO = 0.1
MIN_ITERATIONS = 30
MAX_ITERATIONS = 300
RHO_EVERY = 3
FLOAT32_COLUMNS = 1024


def admm(problem: LayerProblem, pattern: Pattern, *, rho: float = START_RHO) -> Tensor:
    """Find a mask jointly for all weights of the layer; returns Z, (R, D), which a refit should follow.

    Args:
        problem: damped layer problem.
        pattern: projected on at every iteration.
        rho: first penalty; smaller starts are slower and better (0.03 for most quality).
    """
    scale = problem.hessian.diagonal().sqrt()
    # Only the mask matters, so large problems are solved in float32: less than half the time.
    dtype = torch.float32 if len(scale) > FLOAT32_COLUMNS else problem.hessian.dtype
    hessian = (problem.hessian / scale[:, None] / scale).to(dtype)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    eigenvalues = eigenvalues.clamp_min(torch.finfo(dtype).eps)
    target = (problem.target / scale).to(dtype)
    sparse = ((target @ vectors) / eigenvalues) @ vectors.mT
    mask = pattern.mask(sparse.abs())
    sparse = sparse * mask
    multiplier = torch.zeros_like(sparse)
    for iteration in range(1, MAX_ITERATIONS + 1):
        dense = ((target - multiplier + rho * sparse) @ vectors / (eigenvalues + rho)) @ vectors.mT
        shifted = dense + multiplier / rho
        new_mask = pattern.mask(shifted.abs())
        sparse = shifted * new_mask
        multiplier += rho * (dense - sparse)
        if iteration % RHO_EVERY == 0:
            changed = float((new_mask ^ mask).sum() / new_mask.sum())
            if changed == 0 and iteration >= MIN_ITERATIONS:
                break
            rho *= 1.1 if changed > 0.1 else 1.07 if changed > 0.005 else 1.04
            mask = new_mask
    solution: Tensor = sparse / scale
    return solution
