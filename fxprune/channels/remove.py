"""Removes channels from a graph: rows, columns, parameters of channels, and numbers in the graph that count them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.annotations import annotate
from fxprune.calibration.dense_twin import Kept
from fxprune.channels.apply import VECTORS, channel_order
from fxprune.channels.layout import Channels, Classes, Layout
from fxprune.geometry import TRANSPOSED_CONVOLUTIONS
from fxprune.graph import Shape, input_of, module_of
from fxprune.operations import Argument, operation_of


@torch.no_grad()
def remove_channels(
    graph_module: GraphModule, channels: Channels, gone: Classes, shapes: Mapping[Node, Shape]
) -> dict[str, Kept]:
    """Take classes out of every tensor, in place.

    Readers keep the weights of what is left, so the function changes as much as what is gone had to say.

    Args:
        graph_module: the graph that was analysed.
        channels: its analysis.
        gone: the classes, whole units of them.
        shapes: of every node's value, before.

    Returns:
        By name of the node, what is left of its value, where something is gone.
    """
    is_gone = np.zeros(channels.count, dtype=bool)
    is_gone[gone] = True
    kept = {
        node: Kept(layout.dim, torch.from_numpy(np.flatnonzero(~is_gone[layout.classes])))
        for node, layout in channels.layouts.items()
        if is_gone[layout.classes].any()
    }
    for node in list(graph_module.graph.nodes):
        operation, module = operation_of(node), module_of(node)
        kind = "unknown" if operation is None else operation.channels
        sources = [source for source in node.all_input_nodes if source in kept]
        if module is not None and kind in ("matrix", "normalisation"):
            inputs, outputs = kept.get(input_of(node)), kept.get(node)
            if inputs is None and outputs is None:
                continue
            if kind == "matrix":
                _narrow_matrix(module, inputs, outputs)
            else:
                assert outputs is not None
                _narrow_vectors(module, outputs)
            before = channel_order(node)
            annotate(node, order=tuple(_after(old, new) for old, new in zip(before, (inputs, outputs), strict=True)))
        elif node in kept or sources:  # Padding puts channels around others that may all be left.
            _rewrite(node, kind, channels, shapes, kept, is_gone)
    return {node.name: places for node, places in kept.items()}


def _after(before: Tensor | None, kept: Kept | None) -> Tensor | None:
    if kept is None:
        return before
    return kept.places if before is None else before[kept.places]


def _narrow_matrix(module: Any, inputs: Kept | None, outputs: Kept | None) -> None:
    transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)
    weight, groups = module.weight, int(getattr(module, "groups", 1))
    assert isinstance(weight, nn.Parameter)
    data, rows = weight.data, 1 if transposed else 0
    if outputs is not None:
        data = data.index_select(rows, outputs.places.to(data.device))
    if inputs is not None and groups == 1:
        data = data.index_select(1 - rows, inputs.places.to(data.device))
    names = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("in_channels", "out_channels")
    for name, left in zip(names, (inputs, outputs), strict=True):
        before = int(getattr(module, name))
        if left is not None:
            setattr(module, name, len(left.places))
        if left is not None and groups > 1 and name == "in_channels":  # Whole groups go.
            module.groups = groups * len(left.places) // before
    _put(module, "weight", data)
    if outputs is not None and isinstance(module.bias, nn.Parameter):
        _put(module, "bias", module.bias.data.index_select(0, outputs.places.to(data.device)))


def _narrow_vectors(module: nn.Module, kept: Kept) -> None:
    for name in VECTORS:
        vector = getattr(module, name, None)
        if isinstance(vector, Tensor) and vector.numel() > 1:
            _put(module, name, vector.detach().index_select(0, kept.places.to(vector.device)))
    for name in ("num_features", "num_parameters"):
        if getattr(module, name, 1) != 1:
            setattr(module, name, len(kept.places))


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Another value for a parameter or buffer, in the memory format of the one before."""
    before = getattr(module, name)
    value = value.contiguous()
    if before.dim() == 4 and not before.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    if isinstance(before, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=before.requires_grad))
    else:
        setattr(module, name, value)


def _rewrite(
    node: Node, kind: str, channels: Channels, shapes: Mapping[Node, Shape], kept: Mapping[Node, Kept], is_gone: Any
) -> None:
    """Numbers of channels that are written in the graph."""
    source = node.all_input_nodes[0]
    if kind == "reshape" and node in kept:
        _resize(node, kept[node])
    elif kind == "pad" and node in kept:
        _pad(node, channels.layouts[node], shapes[source], is_gone)
    elif kind == "item" and source in kept and node in channels.layouts:
        _slice(node, channels.layouts[source], shapes[source], is_gone)
    elif kind == "split" and source in kept:
        _split(node, channels.layouts[source], shapes[node], is_gone)


def _resize(node: Node, kept: Kept) -> None:
    """A view or reshape to a size that names the channels."""
    operation = operation_of(node)
    if module_of(node) is not None or operation is None or operation.name not in ("view", "reshape"):
        return
    named = next((node.kwargs[name] for name in ("shape", "size") if name in node.kwargs), ())
    size: Any = node.args[1:] or (named,)
    listed = len(size) == 1 and isinstance(size[0], (tuple, list))
    sizes = list(size[0] if listed else size)
    if len(sizes) > kept.dim and isinstance(sizes[kept.dim], int) and sizes[kept.dim] != -1:
        sizes[kept.dim] = len(kept.places)
        node.args, node.kwargs = (input_of(node), *([tuple(sizes)] if listed else sizes)), {}


def _pad(node: Node, padded: Layout, shape: Shape, is_gone: Any) -> None:
    """Constant channels before and after the others."""
    pad: Any = list(Argument(1, "pad").of(node))
    assert isinstance(shape, Size)
    at = 2 * (len(shape) - 1 - padded.dim)
    if at >= len(pad):
        return  # Of other dimensions only.
    before, after = pad[at : at + 2]
    front, back = padded.classes[:before], padded.classes[len(padded.classes) - after :]
    pad[at : at + 2] = [int((~is_gone[part]).sum()) for part in (front, back)]
    if "pad" in node.kwargs:
        node.kwargs = {**node.kwargs, "pad": tuple(pad)}
    else:
        node.args = (node.args[0], tuple(pad), *node.args[2:])


def _slice(node: Node, layout: Layout, shape: Shape, is_gone: Any) -> None:
    """Some consecutive channels of a tensor."""
    assert isinstance(shape, Size)
    index: Any = node.args[1]
    steps = list(index) if isinstance(index, tuple) else [index]
    if any(step is Ellipsis for step in steps):
        at = [step is Ellipsis for step in steps].index(True)
        steps[at : at + 1] = [slice(None)] * (len(shape) - len(steps) + 1)
    if layout.dim < len(steps):
        start, stop, _ = steps[layout.dim].indices(len(layout.classes))
        if (start, stop) != (0, len(layout.classes)):
            first, last = (int((~is_gone[layout.classes[:end]]).sum()) for end in (start, stop))
            steps[layout.dim] = slice(first, last)
            node.args = (node.args[0], tuple(steps))


def _split(node: Node, layout: Layout, shapes: Shape, is_gone: Any) -> None:
    """Parts of the channels, which need not be of one size any more."""
    assert shapes is not None
    parts: list[Any] = list(shapes)
    if sum(shape[layout.dim] for shape in parts) != len(layout.classes):
        return  # Along another dimension.
    ends = np.cumsum([shape[layout.dim] for shape in parts])[:-1]
    sizes = [int((~is_gone[part]).sum()) for part in np.split(layout.classes, ends)]
    node.target = torch.split if node.op == "call_function" else "split"
    node.args, node.kwargs = (input_of(node), sizes, layout.dim), {}
