"""Poses one layer's least-squares problem from its statistics, and works out the bias that goes with new weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxprune.geometry import LayerGeometry, MatrixLayer, is_matrix_layer
from fxprune.graph import module_of
from fxprune.options import Options
from fxprune.solvers.problem import LayerProblem
from fxprune.statistics import CrossStatistics, InputStatistics


def layer_of(node: Node) -> MatrixLayer:
    """The module of a node that InsertObservers found fit to be solved."""
    module = module_of(node)
    assert module is not None
    assert is_matrix_layer(module)
    return module


def pose_problem(
    module: MatrixLayer,
    geometry: LayerGeometry,
    inputs: InputStatistics,
    cross: CrossStatistics | None,
    options: Options,
) -> LayerProblem:
    """The damped problem of one layer, (G, D, D) and (G, R/G, D).

    Args:
        module: the layer, with its dense weights.
        geometry: of the layer.
        inputs: moments of the patches.
        cross: cross moment of the target, or None where that is the layer's own output on those inputs; with blocks always
            None, and each block is to give what it gave.
        options: resolved; `bias_correction` and `damping` count.
    """
    dense = geometry.to_matrix(module.weight.detach()).double()
    centred = bool(options.bias_correction)
    hessian = inputs.hessian(centred=centred)
    target = dense @ hessian if cross is None else cross.target(inputs, module.bias, centred=centred)
    shared = inputs.factors.setdefault((centred, options.damping), {})
    return LayerProblem(hessian, target, dense, rank=inputs.count).damped(options.damping, shared)


def weights_alone(module: MatrixLayer, geometry: LayerGeometry) -> LayerProblem:
    """A problem that holds the dense weights and nothing else, for solvers that look at nothing else."""
    return LayerProblem.of_weights(geometry.to_matrix(module.weight.detach()).double())


def fitted_bias(
    module: MatrixLayer,
    geometry: LayerGeometry,
    matrix: Tensor,
    inputs: InputStatistics,
    cross: CrossStatistics | None,
    options: Options,
) -> Tensor | None:
    """The bias (R,) that goes with new weights (G, R/G, D): the layer's own, or under `bias_correction` the best one."""
    bias: nn.Parameter | Tensor | None = module.bias
    if options.bias_correction:
        # The mean of the target less the mean that the new weights give.
        wanted = cross.mean if cross is not None else _mean_output(module, geometry, inputs)
        bias = (wanted - mean_product(geometry, matrix, inputs.mean)).flatten()
    return None if bias is None else bias.detach().to(module.weight)


def mean_product(geometry: LayerGeometry, matrix: Tensor, mean: Tensor) -> Tensor:
    """Mean of W x, (G, R/G) float64, for weights (G, R/G, D); blocks are added up."""
    of_each = torch.einsum("grd,gd->gr", matrix, mean)
    return of_each.reshape(geometry.groups, geometry.blocks, -1).sum(1)


def dead_inputs(inputs: InputStatistics) -> int:
    """Columns whose input was zero throughout the calibration set."""
    return int(inputs.dead.sum())


def _mean_output(module: MatrixLayer, geometry: LayerGeometry, inputs: InputStatistics) -> Tensor:
    """Mean output of the layer itself, (G, R/G) float64."""
    dense, bias = geometry.to_matrix(module.weight.detach()).double(), module.bias
    mean = mean_product(geometry, dense, inputs.mean)
    return mean if bias is None else mean + bias.to(mean).reshape(mean.shape)
