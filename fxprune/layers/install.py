"""Gives a layer its new weights, or puts two layers in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.geometry import MatrixLayer, laid_out_like
from fxprune.layers.problem import layer_of
from fxprune.layers.shared import modules_called
from fxprune.layers.solve import SolvedLayer
from fxprune.layers.splits import Split, two_layers


def install(graph_module: GraphModule, node: Node, layer: SolvedLayer, calls: tuple[Node, ...]) -> None:
    """Put the solution of the layer that a node calls in place; a bias is created where there was none.

    Args:
        graph_module: changed in place.
        node: the layer's first call.
        layer: its solution. Two parts become an `nn.Sequential` under the layer's name: the graph still calls it once
            (`split_call` makes two of it).
        calls: all that read its weight.
    """
    module = layer_of(node)
    trained = module.weight.requires_grad
    if len(layer.parts) == 1:
        (part,) = layer.parts
        module.weight.data = laid_out_like(module.weight, part.weight)
        if part.bias is not None:
            give_bias(modules_called(calls), part.bias, requires_grad=trained)
        return
    first, second = layer.parts
    split: Split = "channel" if math.prod(second.geometry.kernel_size) == 1 else "spatial"
    pair = two_layers(module, split, first.geometry.out_channels, bias=second.bias is not None)
    if module.weight.dim() == 4 and not module.weight.is_contiguous():
        pair = pair.to(memory_format=torch.channels_last)
    for new, part in zip(pair, layer.parts, strict=True):
        assert isinstance(new.weight, Tensor)
        new.weight = nn.Parameter(laid_out_like(new.weight, part.weight), requires_grad=trained)
        if part.bias is not None:
            new.bias = nn.Parameter(part.bias, requires_grad=trained)
    graph_module.set_submodule(str(node.target), pair.train(module.training))


def give_bias(readers: Sequence[MatrixLayer], bias: Tensor, *, requires_grad: bool) -> None:
    """Give layers with one weight a new bias; what has another one than the first of them gets what is new in it.

    Args:
        readers: of one weight.
        bias: (R,), the new one of the first.
        requires_grad: of new parameters.
    """
    before: list[Tensor | None] = [reader.bias for reader in readers]
    first, new = before[0], nn.Parameter(bias, requires_grad=requires_grad)
    change = bias if first is None else bias - first.detach()
    others = {None: change} | {b: b.detach() + change for b in before if b is not None}
    made = {own: nn.Parameter(value, requires_grad=requires_grad) for own, value in others.items()} | {first: new}
    for reader, own in zip(readers, before, strict=True):
        if own is first or (change != 0).any():
            reader.bias = made[own]
