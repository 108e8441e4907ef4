"""Poses one layer's problem from its statistics, solves it, and turns the solution back into parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.errors import SolverError
from fxprune.geometry import LayerGeometry, MatrixLayer, is_matrix_layer
from fxprune.graph import input_of, module_of
from fxprune.options import Options
from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem, Solver, refit
from fxprune.statistics import CrossStatistics, HessianObserver, InputStatistics


@dataclass(frozen=True)
class SolvedLayer:
    """New parameters of a layer: weight (R, C/G, *kernel), bias (R,) or None, and how they came about."""

    weight: Tensor
    bias: Tensor | None
    damping: float
    dead_inputs: int
    seconds: float = 0.0


def solve_layer(
    module: MatrixLayer,
    geometry: LayerGeometry,
    inputs: InputStatistics,
    cross: CrossStatistics | None,
    pattern: Pattern | None,
    solver: Solver,
    options: Options,
) -> SolvedLayer:
    """Pose and solve one layer's problem from its statistics.

    Args:
        module: the layer, with its dense weights.
        geometry: of the layer.
        inputs: moments of the patches.
        cross: cross moment of the wanted output, or None where that is the layer's own output on those inputs.
        pattern: None re-fits the layer without a pattern.
        solver: chooses the weights to keep.
        options: resolved options.
    """
    weight, bias = module.weight, module.bias
    dense = geometry.to_matrix(weight.detach()).double()
    centred = bool(options.bias_correction)
    hessian = inputs.hessian(centred=centred)
    target = dense @ hessian if cross is None else cross.target(inputs, bias, centred=centred)
    problem = LayerProblem(hessian, target, dense).damped(options.damping)
    if pattern is None:
        matrix = problem.optimum()
    else:
        solved = []
        for group in problem.groups():
            sparse = solver(group, pattern)
            solved.append(refit(group, sparse != 0, start=sparse) if options.refit else sparse)
        matrix = torch.stack(solved)
    if not torch.isfinite(matrix).all():
        raise SolverError("the solution holds NaN or infinite values; use more calibration images, or more damping")
    if centred:
        # The mean of the wanted output less the mean that the new weights give.
        wanted = cross.mean if cross is not None else _mean_output(dense, bias, inputs)
        bias = (wanted - torch.einsum("grd,gd->gr", matrix, inputs.mean)).flatten()
    dead = int((inputs.gram.diagonal(dim1=1, dim2=2) == 0).sum())
    new_bias = None if bias is None else bias.detach().to(weight)
    return SolvedLayer(geometry.to_weight(matrix).to(weight), new_bias, problem.damping, dead)


def _mean_output(dense: Tensor, bias: Tensor | None, inputs: InputStatistics) -> Tensor:
    mean = torch.einsum("grd,gd->gr", dense, inputs.mean)
    return mean if bias is None else mean + bias.to(mean).reshape(mean.shape)


def layer_of(node: Node) -> MatrixLayer:
    """The module of a node that InsertObservers found fit to be solved."""
    module = module_of(node)
    assert module is not None
    assert is_matrix_layer(module)
    return module


def observer_of(node: Node) -> HessianObserver:
    """The observer that such a layer reads through."""
    observer = module_of(input_of(node))
    assert isinstance(observer, HessianObserver)
    return observer


def install(module: MatrixLayer, layer: SolvedLayer) -> None:
    """Give the module its new parameters; a bias is created where there was none."""
    module.weight.data = layer.weight
    if layer.bias is not None:
        module.bias = nn.Parameter(layer.bias, requires_grad=module.weight.requires_grad)
