"""Multiply-accumulates (MACs) of a graph's layers, from the shapes that go through it."""

from __future__ import annotations

import math
from typing import Any

from torch import Size
from torch.fx import Node

from fxprune.calibration.shapes import Example
from fxprune.geometry import TRANSPOSED_CONVOLUTIONS
from fxprune.graph import input_of, module_of
from fxprune.operations import LAYERS


def layer_shapes(example: Example) -> dict[Node, tuple[Size, Size]]:
    """Input and output shape of every Conv and Linear module call of the example's graph."""
    found = {}
    for node, given in example.shapes.items():
        if isinstance(module_of(node), LAYERS):
            read = example.shapes[input_of(node)]
            assert isinstance(read, Size)
            assert isinstance(given, Size)
            found[node] = (read, given)
    return found


def macs_per_sample(example: Example) -> dict[Node, int]:
    """MACs of every Conv and Linear module call of the example's graph for one sample."""
    counts = {}
    for node, (read, given) in layer_shapes(example).items():
        module: Any = module_of(node)
        moved = read if isinstance(module, TRANSPOSED_CONVOLUTIONS) else given
        weight = module.weight
        counts[node] = math.prod(moved) * (weight.numel() // weight.shape[0]) // example.images
    return counts
