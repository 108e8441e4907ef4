"""The scale of a classifier's logits that makes its softmax as sure as the dense model's is.

Least squares predicts from inexact features, and what it cannot predict it leaves out: logits come out too small, by a
factor of two on a mobile network with a few hundred images. A common factor leaves the order of the classes as it is, so only
the confidence suffers. The factor is found on images that the weights tried were not fitted to, as in temperature scaling (Guo
et al. 2017), with the dense model's softmax in place of labels.

A few unsure images decide the best factor, and on others it can do harm. So the one nearest to 1 is taken that is worse
than the best by no more than a standard error of the difference (the rule of Breiman et al. 1984, section 3.4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fxprune.runtime.processes import gathered

LARGEST = 4.0
STEPS = 30


def logit_scale(dense: Tensor, found: Tensor) -> float:
    """An s in [1, LARGEST] whose mean KL(softmax(dense) || softmax(s found)) over all processes is near the least; convex in s.

    Args:
        dense: (N, classes) logits wanted.
        found: (N, classes) logits to be scaled. Of one image alone none are.
    """
    dense, found = dense.double(), found.double()
    wanted = dense.softmax(1)

    def too_large(s: float) -> bool:
        return _summed((((s * found).softmax(1) - wanted) * found).sum())[0] > 0

    def cross_entropy(s: float) -> Tensor:
        return -(wanted * (s * found).log_softmax(1)).sum(1)

    (images,) = _summed(len(found))
    best = _boundary(1.0, LARGEST, too_large)
    least = cross_entropy(best)

    def near_enough(s: float) -> bool:
        more = cross_entropy(s) - least
        total, squares = _summed(more.sum(), more.square().sum())
        variance = max(0.0, squares - total**2 / images) / (images - 1)
        return total / images <= math.sqrt(variance / images)

    return 1.0 if images < 2 or near_enough(1.0) else _boundary(1.0, best, near_enough)


def _summed(*values: Tensor | float) -> list[float]:
    """Each over all processes."""
    return [sum(of_each) for of_each in zip(*gathered([float(value) for value in values]), strict=True)]


def _boundary(low: float, high: float, beyond: Callable[[float], bool]) -> float:
    """Where a question turns from no to yes, by bisection; `high` where it never does."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
