"""Magnitude pruning: keep the largest weights, change none. The baseline."""

from __future__ import annotations

from torch import Tensor

from fxprune.pattern import Pattern
from fxprune.solvers.problem import LayerProblem


def magnitude(problem: LayerProblem, pattern: Pattern) -> Tensor:
    """Zero the smallest |w| that the pattern asks for; returns (R, D). Reads the problem's weight alone."""
    return problem.weight * pattern.mask(problem.weight.abs())
