"""The scale of a classifier's logits that makes its softmax as sure as the dense model's is.

Two things go wrong with a pruned classifier's confidence. What least squares cannot predict from inexact features it leaves
out, so that logits come out too small: by a third on a mobile network with a few hundred images. And where the pruned model
errs, it is as sure as where it does not: for images that nothing was fitted to, the logits of ResNet-20 at 1:4 are twice too
large. A common factor leaves the order of the classes as it is. It is found as in temperature scaling (Guo et al. 2017, On
Calibration of Modern Neural Networks), with the dense model's softmax in place of labels.

It has to be found on images on which the pruned model errs as it does on new ones. The calibration images are no such images:
layers are fitted to them, and most users take them from the training set, on which the dense model is surer than anywhere
else. So it is found on mixtures of them (`fxprune.calibration.mixtures`), to which nothing was fitted.

Where there are none, the images themselves have to do. Few of them are unsure, and these decide the best factor, which on
others can do harm: so the one nearest to 1 is taken that is worse than the best by no more than a standard error of the
difference (the rule of Breiman et al. 1984, section 3.4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.consumers import puts_out
from fxprune.graph import module_of
from fxprune.layers.logits import ClassInformation, log_probabilities, rows_cancel
from fxprune.runtime.processes import gathered

LARGEST = 4.0
ROUNDING = 1e-9  # Nats: logits that are right stay as they are, bit for bit.
STEPS = 30


def puts_out_scores(layer: Node) -> bool:
    """Whether the model puts out what a Linear layer does, two numbers at least: perhaps logits (`BothLogits.are_logits`)."""
    module = module_of(layer)
    return isinstance(module, nn.Linear) and module.out_features > 1 and puts_out(layer)


@dataclass(frozen=True)
class BothLogits:
    """What the dense model and another put out for the same images, (N, classes) each; and whether these are mixtures."""

    dense: Tensor
    found: Tensor
    mixed: bool

    def are_logits(self, weight: Tensor) -> bool:
        """Whether they are a softmax classifier's: else no factor may change them. In all processes together.

        Either the weights tell, or the dense model's outputs. (`Options(temperature=False)` leaves those alone that look like
        a classifier's and are none.)

        Args:
            weight: (classes, D) of the dense layer that puts them out.
        """
        if rows_cancel(weight):
            return True
        information = ClassInformation()
        information.add(*log_probabilities(self.dense))
        return information.summed().is_a_classifiers


def logit_scale(logits: BothLogits) -> float:
    """The s with the least mean KL(softmax(dense) || softmax(s found)) over all processes, which is convex in s.

    Of images that are no mixtures the one nearest to 1 that is as good but for a standard error; of a single one, 1. Images
    with infinite logits, or NaN, say nothing.

    Returns:
        s, from 1 / LARGEST to LARGEST.
    """
    finite = torch.isfinite(logits.dense).all(1) & torch.isfinite(logits.found).all(1)
    dense, found = logits.dense[finite].double(), logits.found[finite].double()
    wanted = dense.softmax(1)

    def too_large(s: float) -> bool:
        return _summed((((s * found).softmax(1) - wanted) * found).sum())[0] > 0

    def cross_entropy(s: float) -> Tensor:
        return -(wanted * (s * found).log_softmax(1)).sum(1)

    (images,) = _summed(len(found))
    best = _boundary(1 / LARGEST, LARGEST, too_large)
    least = cross_entropy(best)

    def near_enough(s: float) -> bool:
        more = cross_entropy(s) - least
        total, squares = _summed(more.sum(), more.square().sum())
        variance = max(0.0, squares - total**2 / images) / (images - 1)
        return total / images <= max(ROUNDING, 0.0 if logits.mixed else math.sqrt(variance / images))

    if images < 2 or near_enough(1.0):
        return 1.0
    return best if logits.mixed else _boundary(1.0, best, near_enough)


def _summed(*values: Tensor | float) -> list[float]:
    """Each over all processes."""
    return [sum(of_each) for of_each in zip(*gathered([float(value) for value in values]), strict=True)]


def _boundary(low: float, high: float, beyond: Callable[[float], bool]) -> float:
    """Where, on the way from `low` to `high`, a question turns from no to yes, by bisection; `high` where it never does."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
