"""How far a layer's least squares may go, settled on images that the trial fit has not seen.

The target of a layer is T = W0 H + R: what its dense weights W0 give on the inputs as they are now, and the correction R of
what went wrong before it. With few images, R and the small eigenvalues of H are mostly noise: a layer that follows them repairs
these images and spoils all others. So the correction is tried on some of the images,

    W(lambda, alpha) = W0 + alpha R (H + lambda I)^-1

and judged on the others. For each lambda the best alpha has a closed form, since the error is quadratic in it. Pruning then
works with this lambda and the target W0 H + alpha R, and each row is rescaled to fit the whole target.

Ridge regression towards a prior, its constants chosen by validation (Hoerl & Kennard 1970; Stone 1974).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.solvers.problem import WIDE
from fxprune.solvers.shifted_systems import divided_by_shifts
from fxprune.statistics import Centred, Moments

DAMPINGS = (0.01, 0.1, 1.0, 10.0)  # Relative to the mean of H's diagonal.
WORTH = 1.05  # By so much a choice has to help more than the whole correction at the least damping: it has noise of its own.
LARGEST_FACTOR = 2.0
MIXTURES = 64


@dataclass(frozen=True)
class Shrinkage:
    """What is taken of a layer's problem.

    Attributes:
        damping: lambda / mean(diag H).
        strength: alpha, the share of the correction R that the target holds; 1 is the whole target.
    """

    damping: float
    strength: float = 1.0

    def target(self, target: Tensor, hessian: Tensor, dense: Tensor) -> Tensor:
        """W0 H + alpha R, for a target (..., R, D), H (..., D, D) and W0 (..., R, D)."""
        return target if self.strength == 1 else torch.lerp(dense @ hessian, target, self.strength)


def choose(dense: Tensor, whole: Moments, check: Moments, damping: float) -> Shrinkage:
    """The damping and strength whose correction leaves the least error on the images of `check`.

    Args:
        dense: (G, R/G, D) float64.
        whole: moments of all images.
        check: those of some of them.
        damping: the least; kept, with the whole correction, where nothing else is clearly better.
    """
    seen, unseen = whole.without(check), check.centred
    mix = _row_mixtures(dense)
    mixed = mix(dense)
    wanted = (mix(unseen.target) - mixed @ unseen.hessian).float()
    correction = (mix(seen.target) - mixed @ seen.hessian).float()
    hessian, fitted_hessian = unseen.hessian.float(), seen.hessian.float()
    scale = fitted_hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
    trials = sorted({max(damping, value) for value in DAMPINGS})
    best, chosen, whole_gain = 0.0, Shrinkage(damping, 0.0), -math.inf
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
            best, chosen = gain, Shrinkage(trial, strength)
    return Shrinkage(damping) if WORTH * whole_gain >= best and whole_gain > 0 else chosen


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
