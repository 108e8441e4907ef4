"""How far a layer's least squares may go, settled on images that the trial fits have not seen.

The target of a layer is T = W0 H + R: what its dense weights W0 give on the inputs as they are now, and the correction R of
what went wrong before it. With few images, R and the small eigenvalues of H are mostly noise: a layer that follows them repairs
these images and spoils all others. Two things are tried on some of the images, and judged on the others.

1. The correction. The weights wanted are

       W = W0 + alpha R (H + mu I)^-1

   and for each mu the best alpha has a closed form, since the error is quadratic in it.
2. The damping lambda under which the weights that stay make up for those that go. The target is W H, without noise, so that
   less damping is needed than for the correction: on ResNet-20 the least is best. One for both was tried, and cost 6% of KL
   there. Each lambda is tried on some rows of the layer, under a mask of its density.

Pruning then solves the problem whose dense optimum is W, with damping lambda, and each row is rescaled to fit the whole target.

Ridge regression towards a prior, its constants chosen by validation (Hoerl & Kennard 1970; Stone 1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxprune.solvers.problem import WIDE, LayerProblem, float32_factor
from fxprune.solvers.refit import refit
from fxprune.solvers.shifted_systems import divided_by_shifts
from fxprune.statistics import Centred, Moments

CORRECTION_DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # Relative to the mean of H's diagonal.
DAMPINGS = (0.1, 0.3, 1.0, 3.0)
WORTH = (
    1.05  # By so much a correction has to help more than the whole one at the least damping: it has noise of its own.
)
WORTH_OF_OUTPUT = 2e-3  # So much of the output's energy a damping has to save.
TRIAL_ROWS = 16
LARGEST_FACTOR = 2.0
MIXTURES = 64


@dataclass(frozen=True)
class Shrinkage:
    """What is taken of a layer's problem.

    Attributes:
        damping: lambda / mean(diag H), of the problem that pruning solves.
        correction_damping: mu / mean(diag H).
        strength: alpha.
    """

    damping: float
    correction_damping: float
    strength: float = 1.0

    def wanted(self, dense: Tensor, moments: Centred, factors: dict[Any, Any] | None = None) -> Tensor:
        """W = W0 + alpha R (H + mu I)^-1, (G, R/G, D) float64.

        Args:
            dense: W0, (G, R/G, D) float64.
            moments: H and T.
            factors: of H, shared by all that have it; see `LayerProblem.damped`.
        """
        if not self.strength:
            return dense
        correction = moments.target - dense @ moments.hessian
        problem = LayerProblem(moments.hessian, correction, torch.zeros_like(dense))
        return dense + self.strength * _optimum(problem.damped(self.correction_damping, factors))

    def problem(
        self,
        dense: Tensor,
        moments: Centred,
        factors: dict[Any, dict[Any, Any]] | None = None,
        rank: int | None = None,
    ) -> LayerProblem:
        """The damped problem whose dense optimum is `wanted`; arguments as there, with a dict of factors for each damping.

        `rank` is that of H, as in `LayerProblem`.
        """
        of = (lambda damping: None) if factors is None else (lambda damping: factors.setdefault((True, damping), {}))
        wanted = self.wanted(dense, moments, of(self.correction_damping))
        problem = LayerProblem(moments.hessian, wanted @ moments.hessian, wanted, rank=rank)
        return problem.damped(self.damping, of(self.damping))


def choose(dense: Tensor, whole: Moments, check: Moments, damping: float, sparsity: float) -> Shrinkage:
    """What leaves the least error on the images of `check`, fitted to the others.

    Args:
        dense: (G, R/G, D) float64.
        whole: moments of all images.
        check: those of some of them.
        damping: the least, for both; kept, with the whole correction, where nothing else is clearly better.
        sparsity: share of zeros that pruning will want; 0 leaves nothing to be made up for.
    """
    seen, unseen = whole.without(check), check.centred
    correction = _correction(dense, seen, unseen, damping)
    if not sparsity:
        return correction
    return _damped(correction, dense, seen, unseen, sparsity, rank=whole.inputs.count - check.inputs.count)


def _correction(dense: Tensor, seen: Centred, unseen: Centred, damping: float) -> Shrinkage:
    """The damping and strength of the correction, at the least damping of everything else."""
    mix = _row_mixtures(dense)
    mixed = mix(dense)
    wanted = (mix(unseen.target) - mixed @ unseen.hessian).float()
    correction = (mix(seen.target) - mixed @ seen.hessian).float()
    hessian, fitted_hessian = unseen.hessian.float(), seen.hessian.float()
    scale = fitted_hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    trials = sorted({max(damping, value) for value in CORRECTION_DAMPINGS})
    best, chosen, whole_gain = 0.0, Shrinkage(damping, damping, 0.0), -math.inf
    for trial, step in zip(trials, _steps(fitted_hessian, correction, scale, trials), strict=True):
        if step is None:
            continue
        along, curvature = float((wanted * step).sum()), float((step @ hessian * step).sum())
        if trial == damping:
            whole_gain = 2 * along - curvature
        if not (along > 0 and curvature > 0):
            continue
        strength = min(1.0, along / curvature)
        gain = 2 * strength * along - strength**2 * curvature
        if gain > best:
            best, chosen = gain, Shrinkage(damping, trial, strength)
    return Shrinkage(damping, damping) if WORTH * whole_gain >= best and whole_gain > 0 else chosen


def _damped(
    correction: Shrinkage, dense: Tensor, seen: Centred, unseen: Centred, sparsity: float, *, rank: int
) -> Shrinkage:
    """The same correction with the damping under which some rows, masked by size, do best on the unseen images."""
    rows = torch.linspace(0, dense.shape[1] - 1, min(dense.shape[1], TRIAL_ROWS), device=dense.device).round().long()
    wanted, target, dense = (x[:, rows] for x in (correction.wanted(dense, seen), unseen.target, dense))
    size = dense.abs() * seen.hessian.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, None]
    kept = max(1, round((1 - sparsity) * dense.shape[-1]))
    mask = torch.zeros_like(dense, dtype=torch.bool).scatter_(-1, size.topk(kept).indices, True)
    problem, wide = LayerProblem(seen.hessian, wanted @ seen.hessian, wanted, rank=rank), dense.shape[-1] >= WIDE

    def error(damping: float) -> float:
        # A wide H is not factored to see whether it can be: its re-fit is by conjugate gradients.
        damped = problem.damped_unchecked(damping) if wide else problem.damped(damping)
        weight = torch.stack([refit(group, own) for group, own in zip(damped.groups(), mask, strict=True)])
        return float((weight @ unseen.hessian * weight).sum() - 2 * (weight * target).sum())

    best, with_least = correction.damping, error(correction.damping)
    least_error = with_least
    for damping in (d for d in DAMPINGS if d > correction.damping):
        if (found := error(damping)) >= least_error:
            break  # Too little damping and too much are both worse than what lies between.
        best, least_error = damping, found
    energy = float((dense @ unseen.hessian * dense).sum())
    return replace(correction, damping=best) if with_least - least_error > WORTH_OF_OUTPUT * energy else correction


def _row_mixtures(dense: Tensor) -> Callable[[Tensor], Tensor]:
    """For layers of many columns and rows, a few random mixtures of the rows in their place, (G, R/G, D) -> (G, K, D).

    Gains are inner products summed over rows, and those of random mixtures are the same on average: with 64 they are off by
    a few percent, and they choose among dampings that are tenfold apart.
    """
    rows, columns = dense.shape[1:]
    if columns < WIDE or rows <= MIXTURES:
        return lambda matrix: matrix
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(MIXTURES, rows, generator=generator, dtype=torch.float64).to(dense) / MIXTURES**0.5
    return lambda matrix: mixing @ matrix


def _steps(hessian: Tensor, correction: Tensor, scale: Tensor, dampings: Sequence[float]) -> Iterator[Tensor | None]:
    """R (H + lambda I)^-1 for each damping, (G, R/G, D) float32; None where H + lambda I cannot be factored."""
    if hessian.shape[-1] >= WIDE:
        shifts = [damping * scale[:, None, None] for damping in dampings]
        yield from divided_by_shifts(hessian, correction, shifts)
        return
    for damping in dampings:
        shift = (damping * scale)[:, None].expand(-1, hessian.shape[-1])
        factor, info = torch.linalg.cholesky_ex(hessian + torch.diag_embed(shift))
        yield None if info.any() else torch.cholesky_solve(correction.mT, factor).mT


def _optimum(problem: LayerProblem) -> Tensor:
    """The dense minimiser (G, R/G, D); of a wide problem by a factor in float32, which will do for a correction of weights."""
    if problem.hessian.shape[-1] < WIDE:
        return problem.optimum()
    hessian = problem.hessian
    factor = problem.once("float32 factor", lambda: float32_factor(hessian))
    if factor is None:
        return problem.optimum()
    scale = hessian.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
    return torch.cholesky_solve((problem.target / scale).float().mT, factor).mT.double() / scale


def rescaled(weight: Tensor, moments: Centred) -> Tensor:
    """Each row times the factor in [1, LARGEST_FACTOR] with which it fits the whole target best: damping has made it too small.

    One number a row hardly overfits: it is the relaxed fit of Meinshausen (2007).

    Args:
        weight: (G, R/G, D).
        moments: H, undamped, and T with all of the correction.
    """
    along = (weight * moments.target).sum(-1, keepdim=True)
    curvature = (weight @ moments.hessian * weight).sum(-1, keepdim=True)
    return weight * torch.where(curvature > 0, along / curvature, 1.0).clamp(1.0, LARGEST_FACTOR)
