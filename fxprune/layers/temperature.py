"""The scale of a classifier's logits that makes its softmax as sure as the dense model's is.

Least squares predicts from inexact features, and what it cannot predict it leaves out: logits come out too small, by a
factor of two on a mobile network with a few hundred images. A common factor leaves the order of the classes as it is, so only
the confidence suffers. The factor is found on images that the weights tried were not fitted to, as in temperature scaling (Guo
et al. 2017), with the dense model's softmax in place of labels.
"""

from __future__ import annotations

from torch import Tensor

from fxprune.runtime.processes import gathered

LARGEST = 4.0
STEPS = 30
TOLERANCE = 1e-4


def logit_scale(dense: Tensor, found: Tensor) -> float:
    """The s in [1, LARGEST] that minimises the mean KL(softmax(dense) || softmax(s found)) over all processes; convex in s.

    Args:
        dense: (N, classes) logits wanted.
        found: (N, classes) logits to be scaled.
    """
    wanted, found = dense.double().softmax(1), found.double()
    low, high = 1.0, LARGEST
    for _ in range(STEPS):  # Bisection on the sign of the slope.
        scale = (low + high) / 2
        slope = sum(gathered(float((((scale * found).softmax(1) - wanted) * found).sum())))
        low, high = (low, scale) if slope > 0 else (scale, high)
        if high - low < TOLERANCE:
            break
    return low if low > 1 + TOLERANCE else 1.0
