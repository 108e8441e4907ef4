"""What a diff needs to know about a graph, whether it came from torch.fx or from an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fxprune.graph_diff.weights import Weights
from fxprune.passes.base import Change


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
        macs: multiplications with a weight or of two activations, for one sample; None if not known.
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
    macs: int | None = None
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
        compressed: what was done to the model by us, such as "pruned to 2:4"; "" for a model that is as it was trained.
        shapes_known: whether sizes of activations, and so MACs, are known.
        notes: what the reader should know, such as operations that MACs leave out.
    """

    title: str
    nodes: tuple[GraphNode, ...]
    parameters: Mapping[str, Tensor]
    changes: tuple[Change, ...] = ()
    compressed: str = ""
    shapes_known: bool = False
    notes: tuple[str, ...] = ()
