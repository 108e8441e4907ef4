"""Multiply-accumulates (MACs) of a graph's layers, from the shapes that go through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size
from torch.fx import GraphModule, Node

from fxprune.calibration.batches import count, map_tensors
from fxprune.calibration.observers import observers_off
from fxprune.geometry import LAYERS, TRANSPOSED_CONVOLUTIONS
from fxprune.graph import input_of, module_of, value_shapes


def layer_shapes(graph_module: GraphModule, inputs: Sequence[Any]) -> dict[Node, tuple[Size, Size]]:
    """Input and output shape of every Conv and Linear module call, for example inputs of the graph."""
    with torch.no_grad(), observers_off(graph_module):
        shapes = value_shapes(graph_module, *map_tensors(list(inputs), torch.clone))
    found = {}
    for node in graph_module.graph.nodes:
        if isinstance(module_of(node), LAYERS):
            read, given = shapes[input_of(node)], shapes[node]
            assert isinstance(read, Size)
            assert isinstance(given, Size)
            found[node] = (read, given)
    return found


def macs_per_sample(graph_module: GraphModule, inputs: Sequence[Any]) -> dict[Node, int]:
    """MACs of every Conv and Linear module call for one sample, for example inputs of several samples."""
    samples = count(list(inputs))
    counts = {}
    for node, (read, given) in layer_shapes(graph_module, inputs).items():
        module: Any = module_of(node)
        moved = read if isinstance(module, TRANSPOSED_CONVOLUTIONS) else given
        weight = module.weight
        counts[node] = math.prod(moved) * (weight.numel() // weight.shape[0]) // samples
    return counts
