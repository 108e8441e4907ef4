"""What a diff needs to know about a graph, whether it came from torch.fx or from an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fxprune.passes.base import Change


@dataclass(frozen=True, eq=False)
class Weights:
    """Stored tensors of one node, on the CPU.

    Attributes:
        weight: (R, C/G, *kernel) of a convolution, (R, C) of a matrix product, (C, R/G, *kernel) of a transposed
            convolution; None for a node that is neither.
        others: bias, BatchNorm's parameters and statistics, ..., by name.
        groups: G.
        transposed: whether it is a transposed convolution.
        scale: of a BatchNorm in eval mode: what it multiplies each channel by, (R,) in float64.
        shift: of a BatchNorm: what it adds to each channel then, (R,) in float64.
    """

    weight: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    groups: int = 1
    transposed: bool = False
    scale: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GraphNode:
    """One operation. Parameters and constants are no nodes: they belong to the operation that reads them.

    Attributes:
        id: name in its own graph, unique there.
        name: what people call it: the module's path, or the name of the stored weight, or else `id`.
        key: what stays the same from graph to graph, such as "module:layer1.0.conv1"; "" if only the place in the
            graph tells who it is.
        op: operation, such as "Conv2d", "relu", "Gemm"; in-place forms have the name of the plain ones.
        arguments: everything else that it is called with, by name, as text.
        inputs: ids of the nodes that it reads, in order.
        weights: its stored tensors.
        order: (inputs, outputs): where its channels stood before a pass permuted them; None for those that stayed.
        inplace: whether it overwrites its input.
        output_shape: sizes of its (first) output, None where that is not known.
        multiply_adds: multiplications with a weight or of two activations, for one sample; None if not known.
        status: "pruned", "reconstructed", "kept" or, of a layer that was not compiled, "".
        pattern: the sparsity pattern it was pruned to, or "".
        output_error: relative output error of the layer, if it was measured.
        reason: what the passes wrote down about it.
    """

    id: str
    name: str
    key: str
    op: str
    arguments: Mapping[str, str]
    inputs: tuple[str, ...]
    weights: Weights = field(default_factory=Weights)
    order: tuple[Tensor | None, Tensor | None] = (None, None)
    inplace: bool = False
    output_shape: tuple[int | str, ...] | None = None
    multiply_adds: int | None = None
    status: str = ""
    pattern: str = ""
    output_error: float | None = None
    reason: str = ""

    @property
    def is_permuted(self) -> bool:
        """Whether it is recorded how its channels were permuted."""
        return any(places is not None for places in self.order)


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A graph in topological order.

    Attributes:
        title: what the model is called.
        nodes: its operations; inputs and outputs are nodes too.
        parameters: every learnable tensor once, by name.
        changes: what passes wrote down about the graph.
        shapes_known: whether sizes of activations, and so multiply-adds, are known.
        notes: what the reader should know, such as operations that multiply-adds leave out.
    """

    title: str
    nodes: tuple[GraphNode, ...]
    parameters: Mapping[str, Tensor]
    changes: tuple[Change, ...] = ()
    shapes_known: bool = False
    notes: tuple[str, ...] = ()


def weight_multiply_adds(
    weights: Weights,
    input_shape: tuple[int | str, ...],
    output_shape: tuple[int | str, ...],
) -> int | None:
    """Multiply-adds of a convolution or matrix product with a stored weight, for one sample.

    Every weight is used once at each output position, of a transposed convolution at each input position.

    Args:
        weights: of the node.
        input_shape: (N, C, *spatial) or (N, ..., C).
        output_shape: (N, R, *spatial) or (N, ..., R).

    Returns:
        The count, or None where a size is open or there is no weight.
    """
    weight = weights.weight
    if weight is None:
        return None
    shape = input_shape if weights.transposed else output_shape
    spatial = weight.dim() - 2
    # A convolution also takes input without a batch axis: (C, *spatial).
    positions = (shape[-spatial:] if spatial else shape[1:-1]) if shape else ()
    sizes = [size for size in positions if isinstance(size, int)]
    return weight.numel() * math.prod(sizes) if len(sizes) == len(positions) else None
