"""ADMM between the least-squares problem and the sparsity pattern (after ALPS, Meng et al. 2024).

B is dense and solves the damped problem, Z lies on the pattern, V is the multiplier that draws them together:

    B <- (Y - V + rho Z) (H^ + rho I)^-1        Z <- P(B + V / rho)        V <- V + rho (B - Z)

in coordinates scaled by s = sqrt(diag H), so that H^ = H / (s s^T) has a unit diagonal and |b| measures what a weight
is worth. All rows move together: an iteration is two matrix products and a top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxprune.pattern import Pattern
from fxprune.solvers.problem import LayerProblem

START_RHO = 0.03  # From 0.1 on, a layer's error is 1% higher.
MIN_ITERATIONS = 30
MAX_ITERATIONS = 300
RHO_EVERY = 3
# Large problems: rho moves seldom and far, so that it can be factored in; a third of the iterations for 1% more error.
LARGE_WORK = 3 * 10**7  # MACs of one product R x D x D.
LARGE_START_RHO = 0.1
LARGE_RHO_EVERY = 5
LARGE_RHO_STEP = 1.6
LARGE_MIN_ITERATIONS = 15
LARGE_STOP = 1e-3


def admm(problem: LayerProblem, pattern: Pattern, *, rho: float | None = None) -> Tensor:
    """Find a mask jointly for all weights of the layer; returns Z, (R, D), which a refit should follow.

    Args:
        problem: damped layer problem.
        pattern: projected on at every iteration.
        rho: first penalty; smaller starts are slower and better. None: START_RHO, or LARGE_START_RHO for large problems.
    """
    scale = problem.hessian.diagonal().sqrt()
    large = sum(problem.of_all(problem.target.shape[0])) * len(scale) ** 2 > LARGE_WORK
    if rho is None:
        rho = LARGE_START_RHO if large else START_RHO
    every, stop, least = (
        (LARGE_RHO_EVERY, LARGE_STOP, LARGE_MIN_ITERATIONS) if large else (RHO_EVERY, 0.0, MIN_ITERATIONS)
    )
    hessian = problem.hessian / scale[:, None] / scale
    solve = (
        _by_factorisation(hessian.float()) if large else problem.once("eigenvectors", lambda: _by_eigenvectors(hessian))
    )
    target = (problem.target / scale).float()  # Only the mask matters, and the steps take half the time in float32.
    sparse = solve(target, 0.0)
    mask = pattern.mask(sparse.abs())
    sparse = sparse * mask
    multiplier = torch.zeros_like(sparse)
    for iteration in range(1, MAX_ITERATIONS + 1):
        dense = solve(target - multiplier + rho * sparse, rho)
        shifted = dense + multiplier / rho
        new_mask = pattern.mask(shifted.abs())
        sparse = shifted * new_mask
        multiplier += rho * (dense - sparse)
        if iteration % every == 0:
            counts = [(new_mask ^ mask).sum().item(), new_mask.sum().item()]
            others, kept = torch.tensor(problem.of_all(counts)).sum(0)
            changed = float(others / kept)
            if changed <= stop and iteration >= least:
                break
            rho *= LARGE_RHO_STEP if large else 1.15 if changed > 0.1 else 1.1
            mask = new_mask
    return sparse.to(scale) / scale


def _by_eigenvectors(hessian: Tensor) -> Callable[[Tensor, float], Tensor]:
    """X (H + rho I) = Y solved for X: one decomposition for every rho, then two products."""
    eigenvalues, vectors = (found.float() for found in torch.linalg.eigh(hessian))
    eigenvalues = eigenvalues.clamp_min(torch.finfo(eigenvalues.dtype).eps)
    return lambda wanted, rho: (wanted @ vectors / (eigenvalues + rho)) @ vectors.mT


def _by_factorisation(hessian: Tensor) -> Callable[[Tensor, float], Tensor]:
    """The same by a Cholesky factor for each rho: for many columns, a small part of the cost of a decomposition."""
    factors: dict[float, Tensor] = {}

    def solve(wanted: Tensor, rho: float) -> Tensor:
        if rho not in factors:
            factors.clear()
            shifted = hessian.clone()
            shifted.diagonal().add_(max(rho, torch.finfo(hessian.dtype).eps * len(hessian)))
            factors[rho] = torch.linalg.cholesky(shifted)
        return torch.cholesky_solve(wanted.mT, factors[rho]).mT

    return solve
