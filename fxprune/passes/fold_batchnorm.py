"""FoldBatchNorm: moves BatchNorm into the convolution or linear layer in front of it.

In eval mode BatchNorm is one affine map per channel, so with s = γ / √(σ² + ε)

    γ (W x + b − μ) / √(σ² + ε) + β  =  (s W) x + s (b − μ) + β.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from fxprune.annotations import annotation
from fxprune.calibration.calibration import Calibration
from fxprune.graph import Shape, call_sites, has_hooks, input_of, is_tied, module_of
from fxprune.operations import operation_of
from fxprune.passes.base import Pass
from fxprune.tracing import matches

_Layer: TypeAlias = _ConvNd | nn.Linear
_NORM_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}


class FoldBatchNorm(Pass):
    """Folds BatchNorm1d/2d/3d into Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear.

    1. The layer's weight and bias (made where there was none) are computed in float64 and rounded once, to
       the weight's own dtype. They become new parameters; BatchNorm's are only read, so one BatchNorm may
       serve several layers. A layer called at several places is folded if the same BatchNorm follows every
       call.
    2. The BatchNorm node is removed, and its module too unless something else still uses it.
    3. A BatchNorm is kept, with the reason on record, if it or the layer is in training mode, is a subclass,
       or has hooks; if it has no running statistics; if it does not follow such a layer directly and as its
       only user; or if the layer's parameters are computed or shared.
    4. BatchNorm1d normalises dimension 1, which holds Linear's features only where the tensor is (N, C). The shapes on the
       calibration images tell, or where there are none those that torch.fx's ShapeProp has left (`node.meta["tensor_meta"]`).
       Where neither does, it is kept.

    Args:
        exclude: module names or fnmatch patterns of layers to leave exactly as they are; a BatchNorm behind one stays.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> graph_module = torch.fx.symbolic_trace(block)
        >>> FoldBatchNorm()(graph_module).modified
        True
        >>> [str(node) for node in graph_module.graph.nodes]
        ['input_1', '_0', '_2', 'output']
    """

    def __init__(self, *, exclude: Sequence[str] = ()) -> None:
        self.exclude = tuple(exclude)

    def _run(self, graph_module: GraphModule, calibration: Calibration | None) -> PassResult:
        is_asked = any(isinstance(module, nn.BatchNorm1d) for module in graph_module.modules())
        return self._fold(graph_module, calibration.example(graph_module).shapes if calibration and is_asked else {})

    def call(self, graph_module: GraphModule) -> PassResult:  # noqa: D102 - documented on Pass
        return self._fold(graph_module, {})

    def _fold(self, graph_module: GraphModule, shapes: Mapping[Node, Shape]) -> PassResult:
        sites = call_sites(graph_module)
        removed: dict[Node, str] = {}
        for node in list(graph_module.graph.nodes):
            norm = module_of(node) if node not in removed else None
            operation = operation_of(node)
            if operation is not None and operation.name == "batch_norm":
                self.record(graph_module, "kept", node, reason="a functional call; only modules are folded")
            if not isinstance(norm, _BatchNorm):
                continue
            reason = _reason_to_keep(graph_module, node, norm, sites, shapes)
            if reason is None and any(matches(str(n.target), self.exclude) for n in (node, input_of(node))):
                reason = "excluded, or the layer in front of it is"
            if reason is None and (annotation(node).changed or annotation(input_of(node)).changed):
                reason = "a hook changes its output, or that of the layer in front of it"
            if reason is None:
                layer: Any = module_of(input_of(node))
                weight, bias = folded_parameters(layer, norm)
                if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                    reason = f"the folded parameters would not be finite in {weight.dtype}"
            if reason is not None:
                self.record(graph_module, "kept", node, reason=reason)
                continue
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
            for site in sites[layer]:
                follower = next(iter(site.users))
                self.record(graph_module, "folded", follower, into=site.name)
                follower.replace_all_uses_with(site)
                graph_module.graph.erase_node(follower)
                removed[follower] = str(follower.target)
        _delete_unused(graph_module, set(removed.values()))
        return PassResult(graph_module, bool(removed))


@torch.no_grad()
def folded_parameters(layer: _Layer, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and bias of `layer` followed by `norm` in eval mode, in the dtype of the layer's weight.

    Args:
        layer: a convolution with weight (R, C/G, *kernel), a transposed one with weight (C, R/G, *kernel), or
            a Linear layer with weight (R, C).
        norm: a BatchNorm over R channels, with running statistics.

    Returns:
        The weight, in its old shape, and the bias (R,).
    """
    scale, shift = scale_and_shift(norm)
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else None
    return scaled_outputs(layer.weight, layer.bias, scale, shift, transposed_groups=groups)


@torch.no_grad()
def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a BatchNorm with running statistics multiplies each channel by in eval mode, and then adds: (R,), float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


def scaled_outputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed_groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose output y is to be scale * y + shift, computed in float64.

    Args:
        weight: (R, C/G, *kernel) or (R, C); of a transposed convolution (C, R/G, *kernel).
        bias: (R,), or None.
        scale: (R,) in float64.
        shift: (R,) in float64.
        transposed_groups: G of a transposed convolution, None for all other layers.

    Returns:
        The weight, in its old shape, and the bias (R,), both in the weight's dtype.
    """
    shifted = shift if bias is None else bias.double() * scale + shift
    scaled = weight.double()
    if transposed_groups is not None:
        # Input channel i of group g meets the R/G output channels of that group.
        by_group = scale.view(transposed_groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (scaled.unflatten(0, (transposed_groups, -1)) * by_group).flatten(0, 1)
    else:
        scaled = scaled * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), shifted.to(weight.dtype)


def _reason_to_keep(
    graph_module: GraphModule,
    node: Node,
    norm: _BatchNorm,
    sites: dict[nn.Module, list[Node]],
    shapes: Mapping[Node, Shape],
) -> str | None:
    """Why a BatchNorm call cannot be folded, or None."""
    if type(norm) not in _NORM_OF.values():
        return f"{type(norm).__name__} is not exactly a BatchNorm1d, BatchNorm2d or BatchNorm3d"
    if has_hooks(norm):
        return "it has forward hooks"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: in eval mode too it normalises by each batch's own"
    producer = input_of(node)
    layer: Any = module_of(producer)
    if layer is None:
        return f"its input {producer.name!r} is not the output of a convolution or linear module"
    name = str(producer.target)
    if parametrize.is_parametrized(layer):
        return f"the weight of {name} is parametrized; remove the parametrization first"
    if type(layer) not in _NORM_OF:
        return f"its input {name!r} is a {type(layer).__name__}, not exactly a convolution or linear layer"
    if has_hooks(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        return f"{name} has forward hooks or a computed weight (weight_norm, spectral_norm, a mask)"
    if norm.training or layer.training:
        return f"it or {name} is in training mode; call eval() first"
    out_channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if type(norm) is not _NORM_OF[type(layer)] or norm.num_features != out_channels:
        return f"{type(norm).__name__}({norm.num_features}) does not match the output of {name}"
    if any(is_tied(graph_module, parameter) for parameter in layer.parameters()):
        return f"a parameter of {name} is shared with another part of the model"
    others = [user.name for user in producer.users if user is not node]
    if others:
        return f"the output of {name} is also read by {', '.join(others)}"
    if any([module_of(user) for user in site.users] != [norm] for site in sites[layer]):
        return f"{name} is called at {len(sites[layer])} places, not each followed by this BatchNorm alone"
    return next(filter(None, (_reason_of_rank(site, layer, shapes.get(site)) for site in sites[layer])), None)


def _reason_of_rank(site: Node, layer: _Layer, shape: Shape) -> str | None:
    """Why dimension 1 of the layer's output may not be its channels, or None."""
    if shape is None:
        shape = getattr(site.meta.get("tensor_meta"), "shape", None)
    if shape is None and isinstance(layer, nn.Linear):
        return (
            f"whether {site.target} gives (N, C) or (N, L, C) is not known, and BatchNorm1d normalises "
            "dimension 1; call the pass with a Calibration of some images"
        )
    if shape is not None and len(shape) != layer.weight.dim():
        return f"dimension 1 of the {len(shape)}-dimensional output of {site.target} is not its channels"
    return None


def _delete_unused(graph_module: GraphModule, targets: set[str]) -> None:
    """Delete the modules of removed nodes, but none that a node calls, reads from, or calls as a part."""
    used = [f"{n.target}." for n in graph_module.graph.nodes if n.op in ("call_module", "get_attr")]
    for target in targets:
        if not any(name.startswith(f"{target}.") or f"{target}.".startswith(name) for name in used):
            graph_module.delete_submodule(target)
