"""Gives a layer its new weights, or puts two layers in its place."""

from __future__ import annotations

import math

from torch import nn
from torch.fx import GraphModule, Node

from fxprune.layers.problem import layer_of
from fxprune.layers.shared import modules_called, weight_calls
from fxprune.layers.solve import SolvedLayer
from fxprune.layers.splits import Split, two_layers


def install(graph_module: GraphModule, node: Node, layer: SolvedLayer) -> None:
    """Put a solution in place; a bias is created where there was none.

    Two parts become an `nn.Sequential` under the layer's name: the graph still calls it once (`split_call` makes two of it).
    """
    module = layer_of(node)
    trained = module.weight.requires_grad
    if len(layer.parts) == 1:
        (part,) = layer.parts
        module.weight.data = part.weight
        if part.bias is not None:
            bias = nn.Parameter(part.bias, requires_grad=trained)
            for reader in modules_called(weight_calls(graph_module)[node]):
                reader.bias = bias
        return
    first, second = layer.parts
    split: Split = "channel" if math.prod(second.geometry.kernel_size) == 1 else "spatial"
    pair = two_layers(module, split, first.geometry.out_channels, bias=second.bias is not None)
    for new, part in zip(pair, layer.parts, strict=True):
        new.weight = nn.Parameter(part.weight, requires_grad=trained)
        if part.bias is not None:
            new.bias = nn.Parameter(part.bias, requires_grad=trained)
    graph_module.set_submodule(str(node.target), pair.train(module.training))
