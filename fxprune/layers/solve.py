"""Solves one layer under its chain of constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.errors import SolverError
from fxprune.geometry import LayerGeometry, MatrixLayer
from fxprune.layers.constraint import Chain, Part
from fxprune.layers.problem import dead_inputs, fitted_bias, mean_product, pose_problem, weights_alone
from fxprune.layers.shrinkage import Shrinkage, choose, rescaled
from fxprune.layers.temperature import BothLogits, logit_scale
from fxprune.options import Method
from fxprune.solvers.problem import LayerProblem
from fxprune.statistics import CrossStatistics, InputStatistics, Moments


@dataclass(frozen=True)
class SolvedPart:
    """New parameters of a layer, or of one of the layers that take its place.

    Attributes:
        geometry: of the layer.
        weight: (R, C/G, *kernel).
        bias: (R,) or None.
        pattern: that the weight satisfies, or "".
        suffix: of its module's name; "" for the layer itself.
    """

    geometry: LayerGeometry
    weight: Tensor
    bias: Tensor | None
    pattern: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class SolvedLayer:
    """What takes a layer's place, from its input to its output, and how it came about.

    Attributes:
        parts: one, or several whose composition is the layer.
        damping: relative to the mean of the Hessian's diagonal; None where no problem was posed.
        correction: share of the target's correction that is followed, see `Shrinkage`; None where it was not chosen.
        logit_scale: what its output has been scaled by.
        dead_inputs: columns whose input was zero throughout.
        seconds: that solving took.
    """

    parts: tuple[SolvedPart, ...]
    damping: float | None = None
    dead_inputs: int = 0
    seconds: float = 0.0
    correction: float | None = None
    logit_scale: float = 1.0

    def scaled(self, factor: float) -> SolvedLayer:
        """A layer of one part that puts out so much more."""
        (part,) = self.parts
        bias = None if part.bias is None else factor * part.bias
        part = replace(part, weight=factor * part.weight, bias=bias)
        return replace(self, parts=(part,), logit_scale=factor * self.logit_scale)


def solve_layer(
    module: MatrixLayer,
    geometry: LayerGeometry,
    chain: Chain,
    method: Method,
    inputs: InputStatistics | None,
    cross: CrossStatistics | None = None,
    relu_aware: Callable[[SolvedLayer], CrossStatistics] | None = None,
    check: Moments | None = None,
    logits: Callable[[SolvedLayer, bool], BothLogits] | None = None,
) -> SolvedLayer:
    """Pose a layer's problem, solve it under the constraints, fit the bias.

    Args:
        module: the layer, with its dense weights.
        geometry: of the layer.
        chain: constraints, in order; an empty one re-fits the layer.
        method: solver and options.
        inputs: moments of the patches; None where the method needs no statistics.
        cross: cross moment of the target, or None where that is the layer's own output on those inputs.
        relu_aware: the cross term of the target once given weights are known, where a rectifier follows the layer; the
            weights on the mask are then fitted to it, once: a second time gains a percent or two of KL at 1:4.
        check: the moments of some of the images, on which damping and the correction's strength are settled; None takes the
            damping of the options and the whole correction.
        logits: what the dense layer and one with given parameters put out, where that is the model's output; on mixtures
            of images if there are any, else on those of `check` alone, or all.
    """
    options = method.options
    moments = None if inputs is None or cross is None else Moments(inputs, cross)
    # Without bias correction nothing is centred, and there is nothing to choose.
    check = check if options.bias_correction and moments is not None else None
    shrinks = bool(options.shrink) and check is not None
    dense = geometry.to_matrix(module.weight.detach()).double()
    shrinkage = Shrinkage(options.damping, options.damping)
    if shrinks and moments is not None and check is not None:
        shrinkage = choose(dense, moments, check, options.damping, _sparsity(chain))

    def posed(inputs: InputStatistics, cross: CrossStatistics | None) -> LayerProblem:
        if shrinks and cross is not None:
            return shrinkage.problem(dense, Moments(inputs, cross).centred, inputs.factors, inputs.count)
        return pose_problem(module, geometry, inputs, cross, options)

    problem = weights_alone(module, geometry) if inputs is None else posed(inputs, cross)
    whole = Part(geometry, problem, problem.optimum() if inputs is not None and not chain else dense)
    parts = solve_chain(whole, chain, method)
    damping = None if inputs is None else problem.damping

    def solved(parts: Sequence[Part], moments: Moments | None) -> SolvedLayer:
        if shrinks and moments is not None and len(parts) == 1:
            parts = [replace(parts[0], matrix=rescaled(parts[0].matrix, moments.centred, problem))]
        matrix = product(geometry, parts)
        if not torch.isfinite(matrix).all():
            raise SolverError("the solution holds NaN or infinite values; use more calibration images, or more damping")
        bias = (
            module.bias
            if inputs is None
            else fitted_bias(module, geometry, matrix, inputs, None if moments is None else moments.cross, options)
        )
        biases = [None] * (len(parts) - 1) + [None if bias is None else bias.detach()]
        return SolvedLayer(
            tuple(_as_parameters(part, own, module.weight) for part, own in zip(parts, biases, strict=True)),
            damping,
            0 if inputs is None else dead_inputs(inputs),
            correction=shrinkage.strength if shrinks else None,
        )

    def trial(moments: Moments, check: Moments) -> SolvedLayer:
        """The layer on the same mask, fitted to all images but those of `check`."""
        (part,), others = parts, moments.without(check)
        of_others = shrinkage.problem(dense, others)
        matrix = part.fitted(of_others)
        if shrinks:
            matrix = rescaled(matrix, others, of_others)
        bias = (others.mean_target - mean_product(geometry, matrix, others.mean)).flatten().to(module.weight)
        return SolvedLayer((_as_parameters(replace(part, matrix=matrix), bias, module.weight),))

    layer = solved(parts, moments)
    if logits is not None and moments is not None and len(parts) == 1 and options.temperature:
        tried = None if check is None else trial(moments, check)
        of_both = logits(layer if tried is None else tried, tried is not None)
        if of_both.are_logits(module.weight):
            layer = layer.scaled(logit_scale(of_both))
    if relu_aware is None or len(parts) > 1 or inputs is None or (chain and parts[0].mask is None):
        return layer  # Only values on a known mask can be fitted again without breaking the constraints.
    cross = relu_aware(layer)
    (part,) = parts
    return solved([replace(part, matrix=part.fitted(posed(inputs, cross)))], Moments(inputs, cross))


def _sparsity(chain: Chain) -> float:
    """Share of zeros that a chain leaves; a rank counts as half: it leaves less freedom than there is, too."""
    if any(constraint.changes_geometry for constraint in chain):
        return 0.5
    return 1 - math.prod(1 - constraint.sparsity for constraint in chain)


def solve_chain(part: Part, chain: Chain, method: Method) -> tuple[Part, ...]:
    """A part solved under constraints, one after another."""
    if not chain:
        return (part,)
    first, *others = chain
    return first.solve(part, lambda left: solve_chain(left, tuple(others), method), method)


def product(geometry: LayerGeometry, parts: Sequence[Part]) -> Tensor:
    """The weights (G, R/G, D) of the one layer that parts make together."""
    if len(parts) == 1:
        return parts[0].matrix
    first, second = parts
    if second.geometry.columns == first.geometry.rows:  # 1 x 1 after the layer's own kernel.
        return second.matrix @ first.matrix
    (ky, kx), r = geometry.kernel_size, first.geometry.rows
    down, along = first.matrix[0].unflatten(1, (ky, -1)), second.matrix[0].unflatten(1, (kx, r))
    return torch.einsum("oxr,ryc->oyxc", along, down).flatten(1)[None]


def _as_parameters(part: Part, bias: Tensor | None, like: Tensor) -> SolvedPart:
    weight = part.geometry.to_weight(part.matrix).to(like)
    return SolvedPart(part.geometry, weight, None if bias is None else bias.to(like), part.pattern, part.suffix)
