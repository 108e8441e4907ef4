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

from fxprune.solvers.few_columns import columns_of
from fxprune.solvers.problem import WIDE, LayerProblem
from fxprune.solvers.refit import refit, refit_by_conjugate_gradients
from fxprune.solvers.shifted_systems import conjugate_gradients, divided_by_shifts
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
LEFT_OUT = 1e-4  # Of the trace of a Hessian, where a trial takes it for one of few columns.


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

    def wanted(
        self, dense: Tensor, moments: Centred, factors: dict[Any, Any] | None = None, rank: int | None = None
    ) -> Tensor:
        """W = W0 + alpha R (H + mu I)^-1, (G, R/G, D) float64.

        Args:
            dense: W0, (G, R/G, D) float64.
            moments: H and T.
            factors: of H, shared by all that have it; see `LayerProblem.damped`.
            rank: of H, as in `LayerProblem`.
        """
        if not self.strength:
            return dense
        problem = LayerProblem(moments.hessian, moments.target, dense, rank=rank)
        problem = problem.damped(self.correction_damping, factors)
        correction = problem.target - problem.image(dense)
        return dense + self.strength * _optimum(replace(problem, target=correction))

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
        wanted = self.wanted(dense, moments, of(self.correction_damping), rank)
        problem = LayerProblem(moments.hessian, wanted, wanted, rank=rank).damped(self.damping, of(self.damping))
        return replace(problem, target=problem.image(wanted))


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
    wide, chosen, target = dense.shape[-1] >= WIDE, dense[:, rows], unseen.target[:, rows]
    size = chosen.abs() * seen.hessian.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, None]
    kept = max(1, round((1 - sparsity) * dense.shape[-1]))
    mask = torch.zeros_like(chosen, dtype=torch.bool).scatter_(-1, size.topk(kept).indices, True)
    if wide:
        fitted = _wide_fits(correction, chosen, replace(seen, target=seen.target[:, rows]), mask, rank)
    else:
        fitted = _fits(correction.wanted(dense, seen)[:, rows], seen, mask)
    dense, hessian = chosen, unseen.hessian.float() if wide else unseen.hessian

    def error(damping: float) -> float:
        weight = fitted(damping)
        return float((_times(weight, hessian) * weight).sum() - 2 * (weight * target).sum())

    best, with_least = correction.damping, error(correction.damping)
    least_error = with_least
    for damping in (d for d in DAMPINGS if d > correction.damping):
        if (found := error(damping)) >= least_error:
            break  # Too little damping and too much are both worse than what lies between.
        best, least_error = damping, found
    energy = float((_times(dense, hessian) * dense).sum())
    return replace(correction, damping=best) if with_least - least_error > WORTH_OF_OUTPUT * energy else correction


def _fits(wanted: Tensor, seen: Centred, mask: Tensor) -> Callable[[float], Tensor]:
    """For a damping, the best weights (G, K, D) on a mask, of which `wanted` are to be what they are without one."""
    problem = LayerProblem(seen.hessian, wanted @ seen.hessian, wanted)

    def fitted(damping: float) -> Tensor:
        groups = problem.damped(damping).groups()
        return torch.stack([refit(group, own) for group, own in zip(groups, mask, strict=True)])

    return fitted


def _wide_fits(
    correction: Shrinkage, dense: Tensor, seen: Centred, mask: Tensor, rank: int
) -> Callable[[float], Tensor]:
    """The same for some rows (G, K, D) of a layer of many columns, nearly: no H is copied or factored for any damping.

    Conjugate gradients multiply with H in float32, or with the few columns that H of few patches, at most `rank`, is made of.
    """
    diagonal = seen.hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    hessian, wanted = seen.hessian.float(), dense
    if correction.strength:
        shift = (correction.correction_damping * mean).clamp_min(torch.finfo(torch.float32).tiny).float()[:, :, None]
        left = (seen.target - _times(dense, hessian)).float()
        wanted = dense + correction.strength * divided_by_shifts(hessian, left, [shift])[0]
    products = [_product(*of_group, rank) for of_group in zip(seen.hessian, hessian, strict=True)]

    def fitted_group(g: int, shift: Tensor) -> Tensor:
        # For inputs of unit variance and weights of about 1, as in `refit`.
        scale = (diagonal[g] + shift).sqrt()
        relative = wanted[g] * scale
        largest = relative.abs().max().clamp_min(torch.finfo(relative.dtype).tiny)
        of_inputs, of_shift = scale.float(), (shift / scale.square()).float()

        def product(x: Tensor) -> Tensor:
            return (products[g](x / of_inputs) / of_inputs).addcmul_(x, of_shift)

        target = product((relative / largest).float())
        return refit_by_conjugate_gradients(product, target, mask[g]).to(scale) / scale * largest

    def fitted(damping: float) -> Tensor:
        shifts = torch.where(mean > 0, damping * mean, 1.0).expand_as(diagonal)  # As `LayerProblem.damped` has it.
        return torch.stack([fitted_group(g, shift) for g, shift in enumerate(shifts)])

    return fitted


def _product(hessian: Tensor, single: Tensor, rank: int) -> Callable[[Tensor], Tensor]:
    """X -> X H in float32, of H (D, D) in float64 and in float32."""
    diagonal = hessian.diagonal()
    columns = columns_of(hessian, torch.zeros_like(diagonal), rank, LEFT_OUT * float(diagonal.sum()))
    if columns is None:
        return single.__rmatmul__
    few = columns.float()
    return lambda x: x @ few @ few.mT


def _times(weight: Tensor, hessian: Tensor) -> Tensor:
    """W H, in the precision of H."""
    return (weight.to(hessian.dtype) @ hessian).to(weight.dtype)


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
    """The dense minimiser (G, R/G, D); of a wide problem nearly, which will do for a correction of weights."""
    if problem.hessian.shape[-1] < WIDE:
        return problem.optimum()
    groups = list(problem.groups())
    if all(group.low_rank is not None for group in groups):
        return torch.stack([_by_few_columns(group) for group in groups])
    if (factor := problem.single_factor) is None:
        return problem.optimum()
    scale = problem.hessian.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :]
    return torch.cholesky_solve((problem.target / scale).float().mT, factor).mT.double() / scale


def _by_few_columns(problem: LayerProblem) -> Tensor:
    """The dense minimiser (R, D) of one group whose H has a low rank."""
    systems, scale = problem.low_rank, problem.hessian.diagonal().sqrt()
    assert systems is not None
    target = (problem.target / scale).float()
    start = torch.zeros_like(target)
    # The first step is the solution but for rounding, of which the others leave less.
    found, _ = conjugate_gradients(systems, start, start, target, 0.0, steps=3, tolerance=1e-4)
    return found.to(scale) / scale


def rescaled(weight: Tensor, moments: Centred, problem: LayerProblem) -> Tensor:
    """Each row times the factor in [1, LARGEST_FACTOR] with which it fits the whole target best: damping has made it too small.

    One number a row hardly overfits: it is the relaxed fit of Meinshausen (2007).

    Args:
        weight: (G, R/G, D).
        moments: H, undamped, and T with all of the correction.
        problem: of the same H, damped.
    """
    assert problem.shift is not None
    along = (weight * moments.target).sum(-1, keepdim=True)
    image = problem.image(weight) - weight * problem.shift[..., None, :]
    curvature = (image * weight).sum(-1, keepdim=True)
    return weight * torch.where(curvature > 0, along / curvature, 1.0).clamp(1.0, LARGEST_FACTOR)
