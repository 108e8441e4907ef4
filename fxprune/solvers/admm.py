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
from fxprune.solvers.few_columns import LowRankSystems
from fxprune.solvers.problem import LARGE_WORK, LayerProblem
from fxprune.solvers.shifted_systems import conjugate_gradients, systems_of

SINGLE_DAMPING = 1e-3  # From here on float32 tells the smallest eigenvalues from rounding.
START_RHO = 0.03  # From 0.1 on, a layer's error is 1% higher.
MIN_ITERATIONS = 30
MAX_ITERATIONS = 300
RHO_EVERY = 3
# Large problems: a set number of over-relaxed iterations, with rho on its way up from the first to the last.
LARGE_RHOS = (0.1, 1.0)
LARGE_ITERATIONS = 20
LARGE_STEPS = 3  # Of conjugate gradients, at most, in an iteration.
LARGE_TOLERANCE = 0.03  # Of their residual. A mask from steps that are less exact costs percents.
OVER_RELAXATION = 1.6
ROUNDING = 1e-5


def admm(problem: LayerProblem, pattern: Pattern, *, rho: float | None = None) -> Tensor:
    """Find a mask jointly for all weights of the layer; returns Z, (R, D), which a refit should follow.

    Args:
        problem: damped layer problem.
        pattern: projected on at every iteration.
        rho: first penalty; smaller starts are slower and better. None: START_RHO, or that of LARGE_RHOS for large problems.
    """
    rows, columns = sum(problem.of_all(problem.target.shape[0])), problem.target.shape[1]
    if rows * columns**2 > LARGE_WORK:
        return admm_by_products(problem, pattern, rho=rho)
    rho = START_RHO if rho is None else rho
    scale = problem.hessian.diagonal().sqrt()
    is_exact = problem.damping < SINGLE_DAMPING
    solve = problem.once("eigenvectors", lambda: _by_eigenvectors(problem.hessian / scale[:, None] / scale, is_exact))
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
        if iteration % RHO_EVERY == 0:
            counts = [(new_mask ^ mask).sum().item(), new_mask.sum().item()]
            others, kept = torch.tensor(problem.of_all(counts)).sum(0)
            changed = float(others / kept)
            if not changed and iteration >= MIN_ITERATIONS:
                break
            rho *= 1.15 if changed > 0.1 else 1.1
            mask = new_mask
    return sparse.to(scale) / scale


def admm_by_products(problem: LayerProblem, pattern: Pattern, *, rho: float | None = None) -> Tensor:
    """The same for many columns, where decompositions would take most of the time; see `shifted_systems`.

    B is held as W + X, W being the dense weights. So what is divided by H + rho I is small beside T, and so are the errors of
    products in few digits. X starts from where the last iteration left it.

    Args:
        problem: damped layer problem.
        pattern: projected on at every iteration.
        rho: first penalty, the last being LARGE_RHOS's or twice as much; None: LARGE_RHOS's.
    """
    scale = problem.hessian.diagonal().sqrt()
    first = LARGE_RHOS[0] if rho is None else rho
    growth = (max(LARGE_RHOS[1], 2 * first) / first) ** (1 / (LARGE_ITERATIONS - 1))
    systems = problem.once("systems", lambda: systems_of(problem))
    is_exact = isinstance(systems, LowRankSystems)
    weight = (problem.weight * scale).float()
    left = (problem.target - problem.image(problem.weight)) / scale
    # Of a target that the dense weights meet, rounding is all that is left.
    steps = 0 if bool(left.norm() <= ROUNDING * (problem.target / scale).norm()) else 20
    left = left.float()
    change, image = conjugate_gradients(
        systems, torch.zeros_like(weight), torch.zeros_like(weight), left, 0.0, steps=steps, tolerance=LARGE_TOLERANCE
    )
    dense = weight + change
    sparse = dense * pattern.mask(dense.abs())
    multiplier = torch.zeros_like(sparse)
    for iteration in range(LARGE_ITERATIONS):
        rho = first * growth**iteration
        wanted = left - multiplier + rho * (sparse - weight)
        if is_exact:
            change = systems.divided(wanted, rho)
        else:
            change, image = conjugate_gradients(
                systems, change, image, wanted, rho, steps=LARGE_STEPS, tolerance=LARGE_TOLERANCE
            )
        shifted = OVER_RELAXATION * (weight + change) + (1 - OVER_RELAXATION) * sparse + multiplier / rho
        sparse = shifted * pattern.mask(shifted.abs())
        multiplier = rho * (shifted - sparse)
    return sparse.to(scale) / scale


def _by_eigenvectors(hessian: Tensor, is_exact: bool) -> Callable[[Tensor, float], Tensor]:
    """X (H + rho I) = Y solved for X: one decomposition for every rho, in float64 if it is to be exact, then two products."""
    eigenvalues, vectors = (x.float() for x in torch.linalg.eigh(hessian if is_exact else hessian.float()))
    eigenvalues = eigenvalues.clamp_min(torch.finfo(eigenvalues.dtype).eps)
    return lambda wanted, rho: (wanted @ vectors / (eigenvalues + rho)) @ vectors.mT
