"""What modules do to channels. A rule gives the layout of the output, or says why it cannot."""

from __future__ import annotations

import numpy as np
from torch import Size, nn
from torch.fx import Node

from fxprune.channels.context import Context, Value
from fxprune.channels.functions import reshape, spatial, takes_dimensions
from fxprune.channels.layout import Layout
from fxprune.operations import describe, operation_of


def module_rule(context: Context, node: Node, module: nn.Module) -> Value | str:
    """The layout of the output of a module, or the reason why its inputs must stay in place."""
    source = context.only_input(node)
    if isinstance(source, str):
        return source
    layout, shape = source
    operation = operation_of(node)
    kind = "unknown" if operation is None else operation.channels
    if kind == "matrix":
        return _matrix(context, node, module, layout, shape)
    if kind == "elementwise":
        return context.kept(node, layout)
    if kind == "spatial":
        return spatial(context, node, layout, shape)
    if kind == "reshape":
        return reshape(context, node, layout, shape)
    if kind == "normalisation":
        return _parameters_of_channels(context, node, module, layout, shape)
    return f"{describe(node)} may mix or move channels"


def _matrix(context: Context, node: Node, module: nn.Module, layout: Layout, shape: Size) -> Layout | str:
    """Convolutions and Linear: the output's channels are new ones."""
    dim = len(shape) - 1 if isinstance(module, nn.Linear) else 1
    if not takes_dimensions(node, shape) or dim == 0:
        return f"{describe(node)} reads a tensor of shape {tuple(shape)}, which has no batch dimension"
    groups = getattr(module, "groups", 1)
    C, R = len(layout.classes), context.output_shape(node)[dim]
    if layout.dim != dim:
        reason = f"{describe(node)} mixes dimension {dim}, and the channels are dimension {layout.dim}"
        if groups > 1:
            return reason
        context.fix(layout, reason)
    if groups == 1:
        return Layout(dim, context.relations.new(R))
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"{describe(node)} is a transposed convolution with groups"
    if groups == C:
        return Layout(dim, np.repeat(layout.classes, R // C))  # Each channel is filtered by itself.
    out = context.relations.new(R)
    context.relations.divide(*np.split(layout.classes, groups), *np.split(out, groups))
    for group in zip(np.split(layout.classes, groups), np.split(out, groups), strict=True):
        context.relations.together(np.concatenate(group))
    return Layout(dim, out)


def _parameters_of_channels(
    context: Context, node: Node, module: nn.Module, layout: Layout, shape: Size
) -> Layout | str:
    """Normalisation layers and PReLU, with one parameter a channel."""
    fits = layout.dim == 1 and takes_dimensions(node, shape)
    if isinstance(module, nn.LayerNorm):
        fits = layout.dim == len(shape) - 1 and len(module.normalized_shape) == 1
        context.relations.need(layout.classes, f"{describe(node)} takes something over all channels")
    elif isinstance(module, nn.GroupNorm) and fits:
        context.relations.divide(*np.split(layout.classes, module.num_groups))
        context.relations.need(layout.classes, f"{describe(node)} takes something over the channels of a group")
    if not fits:
        return f"{describe(node)} reads a tensor of shape {tuple(shape)} with its channels in dimension {layout.dim}"
    return context.kept(node, layout)
