"""Batches of other sizes, to see whether a graph holds for them too."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.calibration.batches import call_by_name, count, inputs_of, map_tensors, tensors_in
from fxprune.calibration.failures import stays_as_it_is
from fxprune.graph import device_of
from fxprune.runtime.surroundings import same_random_numbers
from fxprune.trace_check import TOLERANCE, distance

GROWTH = 64  # Pixels; networks that want multiples of something mostly want one of these.


def with_images(batch: Any, images: int) -> Any:
    """The first `images` images of a batch, repeated where it has fewer."""
    size = count(batch)

    def take(x: Tensor) -> Tensor:
        if not x.dim() or len(x) != size:
            return x
        return torch.cat([x] * -(-images // size))[:images]

    return map_tensors(batch, take) if size else batch


def with_larger_images(batch: Any) -> Any:
    """The images with zeros around; None where a batch holds no images."""
    if not any(x.dim() == 4 for x in tensors_in(batch)):
        return None
    return map_tensors(batch, lambda x: F.pad(x, (0, GROWTH, 0, GROWTH)) if x.dim() == 4 else x)


def agree(model: nn.Module, graph_module: GraphModule, batch: Any) -> bool | None:
    """Whether a graph computes what its model computes on a batch; None where the model takes no such batch."""
    wanted = _outcome(model, graph_module, batch)
    if isinstance(wanted, Exception):
        return None
    found = _outcome(graph_module, graph_module, batch)
    return not isinstance(found, Exception) and distance(wanted, found) <= TOLERANCE


def require_size(graph_module: GraphModule, batch: Any, lines: Sequence[str]) -> None:
    """Let a graph refuse images of another height and width than a batch's, naming the lines that are the reason."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    images = {n: x for n, x in inputs_of(batch, placeholders).items() if isinstance(x, Tensor) and x.dim() == 4}
    for node, value in images.items():
        height, width = value.shape[2:]
        message = (
            f"this graph is for images of {height} x {width}: the model decides by their size at {'; '.join(lines)}"
        )
        require_axes(graph_module, node, {2: height, 3: width}, message)


def require_axes(graph_module: GraphModule, node: Node, sizes: Mapping[int, int], message: str) -> None:
    """Let a graph refuse inputs of other sizes: by axis, the size that an input must have."""
    graph = graph_module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    for axis, size in sizes.items():
        with graph.inserting_after(last):
            found = graph.call_method("size", (node, axis))
        with graph.inserting_after(found):
            same = graph.call_function(operator.eq, (found, size))
        with graph.inserting_after(same):
            last = graph.call_function(torch._assert, (same, message))
    graph_module.recompile()


def _outcome(module: nn.Module, graph_module: GraphModule, batch: Any) -> Any:
    """What a module returns, or the exception it raises."""
    device = device_of(module)
    inputs = inputs_of(batch, graph_module.graph.find_nodes(op="placeholder"), device=device)
    values = {str(n.target).lstrip("*"): map_tensors(x, torch.clone) for n, x in inputs.items()}
    with torch.no_grad(), same_random_numbers():
        try:
            return call_by_name(module, values)
        except Exception as error:
            if stays_as_it_is(error):
                raise
            return error
