"""SparseGPT with forward hooks, as it is usually written for CNNs: the network is rerun for each layer.

For each layer in turn, a hook unfolds the layer's input and adds up its Hessian while every calibration batch runs
through the network again, up to that layer; then the layer is pruned, so that later ones see what it now gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.speed.unfold import channels_innermost, unfold_gram
from fxprune.geometry import LayerGeometry
from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem, sparsegpt


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


def prune(
    model: nn.Module,
    batches: Iterable[Tensor],
    layers: Sequence[str],
    pattern: str = "2:4",
    *,
    damping: float = 0.01,
) -> nn.Module:
    """Return a copy of a model with the named layers (ungrouped Conv2d or Linear, in the order they run) pruned.

    Args:
        model: in eval mode.
        batches: calibration images; read once for each layer.
        layers: module names.
        pattern: as fxprune.compile takes it.
        damping: lambda / mean(diag H).
    """
    model = copy.deepcopy(model).eval()
    parsed = Pattern.parse(pattern)
    with torch.inference_mode(False), torch.no_grad():
        for name in layers:
            module = model.get_submodule(name)
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                raise TypeError(f"{name} is a {type(module).__name__}; Conv2d and Linear layers can be pruned here")
            geometry = LayerGeometry.of(module)
            problem = _problem(model, module, geometry, batches).damped(damping)
            matrix = sparsegpt(next(problem.groups()), parsed)
            module.weight.copy_(geometry.to_weight(matrix[None]))
    return model


def _problem(
    model: nn.Module, module: nn.Conv2d | nn.Linear, geometry: LayerGeometry, batches: Iterable[Tensor]
) -> LayerProblem:
    weight = geometry.to_matrix(module.weight.detach()).double()
    hessian = weight.new_zeros(geometry.columns, geometry.columns)
    seen = 0

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal seen
        (x,) = inputs
        seen += len(x)
        hessian.add_(x.mT @ x if isinstance(module, nn.Linear) else unfold_gram(geometry, x))
        raise _LayerReachedError

    hook = module.register_forward_pre_hook(gather)
    for x in batches:
        try:
            model(x.to(weight.device))
        except _LayerReachedError:
            continue
    hook.remove()
    if isinstance(module, nn.Conv2d):
        hessian = channels_innermost(geometry, hessian)
    hessian = hessian[None] / seen
    return LayerProblem(hessian, weight @ hessian, weight)
