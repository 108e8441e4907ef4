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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxprune.solvers.few_columns import LowRankSystems, columns_of
from fxprune.solvers.problem import WIDE, LayerProblem, shift_of
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
TRIAL_TOLERANCE = 3e-3  # At 1e-2 more damping seemed better than it is.
LARGEST_FACTOR = 2.0
MIXTURES = 32
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
    unseen_rank = check.inputs.count
    seen = _Images(whole.without(check), whole.inputs.count - unseen_rank)
    unseen = _Images(check.centred, unseen_rank)
    correction = _correction(dense, seen, unseen, damping)
    return _damped(correction, dense, seen, unseen, sparsity) if sparsity else correction


class _Images:
    """The moments of some images, and products with their H.

    Where H has many columns, products are in float32, or with the few columns that H of few patches is made of.

    Attributes:
        moments: of the images.
        few: U (G, D, k) float32, H = U U^T, or None.
        hessian: H (G, D, D) float32.
    """

    def __init__(self, moments: Centred, rank: int) -> None:
        self.moments = moments
        self.few = _few_columns(moments.hessian, rank) if moments.hessian.shape[-1] >= WIDE else None

    @cached_property
    def hessian(self) -> Tensor:
        return self.moments.hessian.float()

    def product(self, x: Tensor) -> Tensor:
        """X H, (G, K, D) -> (G, K, D), as exact as X has it; of many columns in float32."""
        if self.few is not None:
            return (x.float() @ self.few @ self.few.mT).to(x)
        exact = x.dtype == torch.float64 and x.shape[-1] < WIDE
        return (x.to(self.hessian) @ self.hessian).to(x) if not exact else x @ self.moments.hessian

    def divided(self, x: Tensor, shifts: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """X (H + sigma I)^-1 for several sigma (G, 1, 1), ascending; None where that cannot be factored."""
        if self.few is not None:
            for shift in shifts:
                divided = [
                    LowRankSystems(own.flatten().expand(len(few)), few).divided(of_group, 0.0)
                    for own, few, of_group in zip(shift, self.few, x, strict=True)
                ]
                yield torch.stack(divided)
        elif x.shape[-1] >= WIDE:
            yield from divided_by_shifts(self.hessian, x, shifts)
        else:
            for shift in shifts:
                shifted = self.hessian.clone()
                shifted.diagonal(dim1=1, dim2=2).add_(shift[:, :, 0])
                factor, info = torch.linalg.cholesky_ex(shifted)
                yield None if info.any() else torch.cholesky_solve(x.mT, factor).mT


def _few_columns(hessian: Tensor, rank: int) -> Tensor | None:
    """U (G, D, k) float32 with H = U U^T for every group, or None."""
    found = []
    for own in hessian:
        diagonal = own.diagonal()
        columns = columns_of(own, torch.zeros_like(diagonal), rank, LEFT_OUT * float(diagonal.sum()))
        if columns is None:
            return None
        found.append(columns.float())
    most = max(columns.shape[1] for columns in found)
    return torch.stack([torch.nn.functional.pad(columns, (0, most - columns.shape[1])) for columns in found])


def _correction(dense: Tensor, seen: _Images, unseen: _Images, damping: float) -> Shrinkage:
    """The damping and strength of the correction, at the least damping of everything else."""
    mix = _row_mixtures(dense)
    mixed = mix(dense)
    wanted = (mix(unseen.moments.target) - unseen.product(mixed)).float()
    correction = (mix(seen.moments.target) - seen.product(mixed)).float()
    scale = _mean_variance(seen.moments.hessian)
    trials = sorted({max(damping, value) for value in CORRECTION_DAMPINGS})
    best, chosen, whole_gain = 0.0, Shrinkage(damping, damping, 0.0), -math.inf
    steps = seen.divided(correction, [trial * scale for trial in trials])
    for trial, step in zip(trials, steps, strict=True):
        if step is None:
            continue
        along, curvature = float((wanted * step).sum()), float((unseen.product(step) * step).sum())
        if trial == damping:
            whole_gain = 2 * along - curvature
        if not (along > 0 and curvature > 0):
            continue
        strength = min(1.0, along / curvature)
        gain = 2 * strength * along - strength**2 * curvature
        if gain > best:
            best, chosen = gain, Shrinkage(damping, trial, strength)
    return Shrinkage(damping, damping) if WORTH * whole_gain >= best and whole_gain > 0 else chosen


def _mean_variance(hessian: Tensor) -> Tensor:
    """The mean of H's diagonal, (G, 1, 1) float32, above 0."""
    mean = hessian.diagonal(dim1=1, dim2=2).float().mean(1)
    return mean.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]


def _damped(correction: Shrinkage, dense: Tensor, seen: _Images, unseen: _Images, sparsity: float) -> Shrinkage:
    """The same correction with the damping under which some rows, masked by size, do best on the unseen images."""
    rows = torch.linspace(0, dense.shape[1] - 1, min(dense.shape[1], TRIAL_ROWS), device=dense.device).round().long()
    chosen, target = dense[:, rows], unseen.moments.target[:, rows]
    size = chosen.abs() * seen.moments.hessian.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()[:, None]
    kept = max(1, round((1 - sparsity) * dense.shape[-1]))
    mask = torch.zeros_like(chosen, dtype=torch.bool).scatter_(-1, size.topk(kept).indices, True)
    if dense.shape[-1] >= WIDE:
        fitted = _wide_fits(correction, chosen, seen, seen.moments.target[:, rows], mask)
    else:
        fitted = _fits(correction.wanted(dense, seen.moments)[:, rows], seen.moments, mask)

    def error(damping: float) -> float:
        weight = fitted(damping)
        return float((unseen.product(weight) * weight).sum() - 2 * (weight * target).sum())

    best, with_least = correction.damping, error(correction.damping)
    least_error = with_least
    for damping in (d for d in DAMPINGS if d > correction.damping):
        if (found := error(damping)) >= least_error:
            break  # Too little damping and too much are both worse than what lies between.
        best, least_error = damping, found
    energy = float((unseen.product(chosen) * chosen).sum())
    return replace(correction, damping=best) if with_least - least_error > WORTH_OF_OUTPUT * energy else correction


def _fits(wanted: Tensor, seen: Centred, mask: Tensor) -> Callable[[float], Tensor]:
    """For a damping, the best weights (G, K, D) on a mask, of which `wanted` are to be what they are without one."""
    problem = LayerProblem(seen.hessian, wanted @ seen.hessian, wanted)

    def fitted(damping: float) -> Tensor:
        groups = problem.damped(damping).groups()
        return torch.stack([refit(group, own) for group, own in zip(groups, mask, strict=True)])

    return fitted


def _wide_fits(
    correction: Shrinkage, dense: Tensor, seen: _Images, target: Tensor, mask: Tensor
) -> Callable[[float], Tensor]:
    """The same for some rows (G, K, D) of a layer of many columns, nearly: no H is copied or factored for any damping."""
    diagonal = seen.moments.hessian.diagonal(dim1=1, dim2=2)
    wanted = dense
    if correction.strength:
        shift = correction.correction_damping * _mean_variance(seen.moments.hessian)
        (step,) = seen.divided((target - seen.product(dense)).float(), [shift])
        assert step is not None
        wanted = dense + correction.strength * step
    hessians = seen.hessian if seen.few is None else seen.few

    def product_of(g: int, x: Tensor) -> Tensor:
        return x @ hessians[g] if seen.few is None else x @ hessians[g] @ hessians[g].mT

    def fitted_group(g: int, shift: Tensor, start: Tensor | None) -> Tensor:
        # For inputs of unit variance and weights of about 1, as in `refit`.
        scale = (diagonal[g] + shift).sqrt()
        relative = wanted[g] * scale
        largest = relative.abs().max().clamp_min(torch.finfo(relative.dtype).tiny)
        of_inputs, of_shift = scale.float(), (shift / scale.square()).float()

        def product(x: Tensor) -> Tensor:
            return (product_of(g, x / of_inputs) / of_inputs).addcmul_(x, of_shift)

        target = product((relative / largest).float())
        if start is not None:
            start = (start * scale / largest).float()
        found = refit_by_conjugate_gradients(product, target, mask[g], start=start, tolerance=TRIAL_TOLERANCE)
        return found.to(scale) / scale * largest

    last: list[Tensor] = []  # What the damping before has given is near to what the next one gives.

    def fitted(damping: float) -> Tensor:
        shifts = shift_of(diagonal, damping)
        starts: Sequence[Tensor | None] = last or [None] * len(shifts)
        last[:] = [fitted_group(g, shift, start) for g, (shift, start) in enumerate(zip(shifts, starts, strict=True))]
        return torch.stack(last)

    return fitted


def _row_mixtures(dense: Tensor) -> Callable[[Tensor], Tensor]:
    """For layers of many columns and rows, a few random mixtures of the rows in their place, (G, R/G, D) -> (G, K, D).

    Gains are inner products summed over rows, and those of random mixtures are the same on average: with 32 they are off by
    some percent, and they choose among dampings that are tenfold apart.
    """
    rows, columns = dense.shape[1:]
    if columns < WIDE or rows <= MIXTURES:
        return lambda matrix: matrix
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(MIXTURES, rows, generator=generator, dtype=torch.float64).to(dense) / MIXTURES**0.5
    return lambda matrix: mixing @ matrix


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
