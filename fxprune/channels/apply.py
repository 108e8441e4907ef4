"""Permutes the parameters of a graph module's layers so that its channels change places."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.conv import _ConvTransposeNd

from fxprune.annotations import annotate, annotation
from fxprune.calibration.dense_twin import Kept
from fxprune.channels.layout import Channels, Classes, Layout, new_places
from fxprune.geometry import laid_out_like
from fxprune.graph import input_of, module_of
from fxprune.operations import operation_of

VECTORS = ("weight", "bias", "running_mean", "running_var")  # Parameters and buffers of one value a channel.


def channel_order(node: Node) -> tuple[Tensor | None, Tensor | None]:
    """Orders of a layer's input and output channels: place i holds the one that was at place order[i]; None if all stayed."""
    return annotation(node).order


@torch.no_grad()
def permute_channels(graph_module: GraphModule, channels: Channels, source: Classes) -> dict[str, Kept]:
    """Put the channels of class `source[c]` in the place of those of class c, everywhere at once, in place.

    Args:
        graph_module: the graph that was analysed.
        channels: its analysis.
        source: (count,) a permutation of all classes that moves classes only within their atoms.

    Returns:
        By name of the node, where the channels of its value come from, where they have moved.
    """
    for node, layout in channels.layouts.items():
        module, operation = module_of(node), operation_of(node)
        if module is None or operation is None or operation.channels not in ("normalisation", "matrix"):
            continue
        inputs, outputs = _places(channels.layouts.get(input_of(node)), source), _places(layout, source)
        if inputs is None and outputs is None:
            continue  # Nothing moves; perhaps the analysis has not understood this layer.
        if operation.channels == "normalisation":
            assert outputs is not None
            _permute_vectors(module, outputs)
        else:
            _permute_matrix(module, inputs, outputs)
        before = channel_order(node)
        annotate(node, order=(_after(before[0], inputs), _after(before[1], outputs)))
    places = {node: _places(layout, source) for node, layout in channels.layouts.items()}
    return {
        node.name: Kept(channels.layouts[node].dim, torch.from_numpy(of))
        for node, of in places.items()
        if of is not None
    }


def _after(before: Tensor | None, places: Classes | None) -> Tensor | None:
    """Where channels come from after a further permutation."""
    if places is None:
        return before
    return torch.from_numpy(places) if before is None else before[torch.from_numpy(places)]


def _places(layout: Layout | None, source: Classes) -> Classes | None:
    """Where a tensor's channels come from, or None if they stay."""
    places = None if layout is None else new_places(layout.classes, source)
    return None if places is None or np.array_equal(places, np.arange(len(places))) else places


def _permute_vectors(module: nn.Module, places: Classes) -> None:
    for name in VECTORS:
        vector = getattr(module, name, None)
        if isinstance(vector, Tensor) and vector.numel() > 1:
            vector.data = vector.data[_index(places, vector)]


def _permute_matrix(module: nn.Module, inputs: Classes | None, outputs: Classes | None) -> None:
    """Rows follow the output's channels; columns, in each group, the input's."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    transposed = isinstance(module, _ConvTransposeNd)
    groups = int(getattr(module, "groups", 1))
    moved = reordered(weight.data, inputs, outputs, groups=groups, transposed=transposed)
    weight.data = laid_out_like(weight, moved)
    if outputs is not None and isinstance(bias, Tensor):
        bias.data = bias.data[_index(outputs, bias)]


def reordered(
    weight: Tensor, inputs: Classes | None, outputs: Classes | None, *, groups: int = 1, transposed: bool = False
) -> Tensor:
    """A weight with its channels in another order: new channel i is old channel `inputs[i]` or `outputs[i]`.

    Args:
        weight: (R, C/G, *kernel) or (R, C); of a transposed convolution (C, R/G, *kernel).
        inputs: (C,) for the input's channels, which stay within their groups, or fewer; None leaves them.
        outputs: (R,) for the output's channels, or fewer; None leaves them.
        groups: G.
        transposed: whether it is of a transposed convolution.
    """
    rows_dim = 1 if transposed else 0
    if outputs is not None:
        weight = weight.index_select(rows_dim, _index(outputs, weight))
    if inputs is None:
        return weight
    if groups == 1:
        return weight.index_select(1 - rows_dim, _index(inputs, weight))
    if weight.shape[1] == 1:  # A depthwise filter has one column.
        return weight
    columns = _index(_columns_of_rows(inputs, len(weight), weight.shape[1]), weight)
    return weight[torch.arange(len(weight), device=weight.device)[:, None], columns]


def _columns_of_rows(inputs: Classes, rows: int, columns: int) -> Classes:
    """For each row, where its columns come from within the row's group, (rows, columns); groups may be gone as a whole."""
    within = (inputs % columns).reshape(-1, columns)
    return np.repeat(within, rows // len(within), axis=0)


def _index(places: Classes, like: Tensor) -> Tensor:
    return torch.from_numpy(places).to(like.device)
