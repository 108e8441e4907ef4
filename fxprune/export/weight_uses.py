"""Finds every matrix product of an ONNX graph whose weight is stored in the file, whatever the weight is called.

A weight reaches its node directly or through constants: Transpose, Cast, Reshape, Identity, DequantizeLinear, ... Such
chains are evaluated with onnx's reference implementation, so that the pattern is judged on the numbers that the node
reads and along the axis that it sums over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from fxprune.export.onnx_file import Array, initializer_arrays

# Operation -> input positions that may hold the weight, each with the position of its zero point, if any.
CONVOLUTIONS = {
    "Conv": {1: None}, "FusedConv": {1: None}, "ConvTranspose": {1: None}, "QLinearConv": {3: 5}, "ConvInteger": {1: 3}
}  # fmt: skip
PRODUCTS = {
    "Gemm": {0: None, 1: None}, "MatMul": {0: None, 1: None}, "FusedMatMul": {0: None, 1: None},
    "FusedGemm": {0: None, 1: None}, "QLinearMatMul": {0: 2, 3: 5}, "MatMulInteger": {0: 2, 1: 3},
}  # fmt: skip
WEIGHT_INPUTS: dict[str, dict[int, int | None]] = {**CONVOLUTIONS, **PRODUCTS}  # type: ignore[dict-item]
_FOLLOWED = {"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "DequantizeLinear"}


@dataclass(frozen=True, eq=False)
class WeightUse:
    """One node that reads a stored weight.

    Attributes:
        node: the node's name.
        op: its operation, such as "Conv" or "Gemm".
        initializer: name of the tensor in the file.
        stored_shape: its shape there.
        axis: the axis of the stored tensor that the node sums over (None if a reshape stands between).
        dtype: stored number type, such as "float32".
        groups: of a convolution.
        weight: oriented as torch's modules store it: (R, C/G, *kernel) for Conv, (R, C) for products (leading batch
            axes of a MatMul joined to R), (C, R/G, *kernel) for ConvTranspose; zero points subtracted.
    """

    node: str
    op: str
    initializer: str
    stored_shape: tuple[int, ...]
    axis: int | None
    dtype: str
    groups: int
    weight: Tensor

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - int(torch.count_nonzero(self.weight)) / self.weight.numel() if self.weight.numel() else 0.0

    @property
    def reduction_first(self) -> Tensor:
        """The weight with its input channels on axis 1, as patterns count them (groups of a ConvTranspose joined)."""
        return self.weight.transpose(0, 1) if self.op == "ConvTranspose" else self.weight


@dataclass(frozen=True, eq=False)
class _Constant:
    """A value known before the model runs; `axes[i]` is the stored axis behind axis i, None after a reshape."""

    array: Array
    initializer: str
    stored: Array
    axes: tuple[int, ...] | None


@dataclass(frozen=True)
class GraphWeights:
    """What a graph does with its stored tensors.

    Attributes:
        uses: every node that multiplies by a stored weight, in graph order.
        computed: convolutions whose weight is computed or given at run time, as "op node".
        others: stored tensors of two or more dimensions and at least 16 numbers that no such node reads.
    """

    uses: tuple[WeightUse, ...]
    computed: tuple[str, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]


def graph_weights(model: ModelProto) -> GraphWeights:
    """Walk a model, subgraphs included."""
    opset = next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 20)
    uses: list[WeightUse] = []
    computed: list[str] = []
    stored: dict[str, Array] = {}
    for position, (node, scope) in enumerate(_nodes(model.graph, {}, opset, stored)):
        if node.op_type not in WEIGHT_INPUTS:
            continue
        name = node.name or f"{node.op_type}_{position}"
        found = [
            _use(node, name, scope, index, zero_point)
            for index, zero_point in WEIGHT_INPUTS[node.op_type].items()
            if index < len(node.input) and node.input[index] in scope and scope[node.input[index]].array.ndim
        ]
        uses.extend(found)
        if not found and node.op_type in CONVOLUTIONS:
            computed.append(f"{node.op_type} {name}")
    read = {use.initializer for use in uses}
    others = tuple((n, a.shape) for n, a in stored.items() if n not in read and a.ndim > 1 and a.size >= 16)
    return GraphWeights(tuple(uses), tuple(computed), others)


def _nodes(
    graph: GraphProto, outer: Mapping[str, _Constant], opset: int, stored: dict[str, Array]
) -> Iterator[tuple[NodeProto, dict[str, _Constant]]]:
    """All nodes with the constants in their scope; constants are folded on the way."""
    scope = dict(outer)
    for name, array in initializer_arrays(graph).items():
        scope[name] = _Constant(array, name, array, tuple(range(array.ndim)))
        stored[name] = array
    for node in graph.node:
        if node.op_type == "Constant":
            array = _evaluate(node, {}, opset)
            scope[node.output[0]] = _Constant(array, node.output[0], array, tuple(range(array.ndim)))
        elif node.op_type in _FOLLOWED and all(name in scope for name in node.input if name):
            scope[node.output[0]] = _fold(node, scope, opset)
        yield node, scope
        for attribute in node.attribute:
            for subgraph in [attribute.g, *attribute.graphs] if attribute.type in _GRAPH_TYPES else []:
                yield from _nodes(subgraph, scope, opset, stored)


_GRAPH_TYPES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def _fold(node: NodeProto, scope: Mapping[str, _Constant], opset: int) -> _Constant:
    source = scope[node.input[0]]
    feeds = {name: scope[name].array for name in node.input if name}
    array = _evaluate(node, feeds, opset)
    axes = source.axes
    if node.op_type == "Transpose" and axes is not None:
        order = _attributes(node).get("perm") or range(len(axes) - 1, -1, -1)
        axes = tuple(axes[i] for i in order)
    elif array.shape != source.array.shape:
        axes = None
    return _Constant(array, source.initializer, source.stored, axes)


def _evaluate(node: NodeProto, feeds: dict[str, Array], opset: int) -> Array:
    """The first output of one node."""
    outputs: Any = ReferenceEvaluator(node, opsets={"": opset}).run(None, feeds)
    return np.asarray(outputs[0])


def _use(node: NodeProto, name: str, scope: Mapping[str, _Constant], index: int, zero_point: int | None) -> WeightUse:
    constant = scope[node.input[index]]
    array = constant.array
    if zero_point is not None and len(node.input) > zero_point and node.input[zero_point] in scope:
        offset = scope[node.input[zero_point]].array.astype(np.int32)
        if offset.ndim:  # one zero point per output channel
            channel = 0 if node.op_type in CONVOLUTIONS else array.ndim - 1
            offset = offset.reshape([-1 if axis == channel else 1 for axis in range(array.ndim)])
        array = array.astype(np.int32) - offset
    attributes = _attributes(node)
    oriented, reduced = _orient(node.op_type, array, index, attributes)
    return WeightUse(
        node=name,
        op=node.op_type,
        initializer=constant.initializer,
        stored_shape=constant.stored.shape,
        axis=None if constant.axes is None else constant.axes[reduced],
        dtype=str(constant.stored.dtype),
        groups=int(attributes.get("group", 1)),
        weight=_tensor(oriented),
    )


def _orient(op: str, array: Array, index: int, attributes: Mapping[str, Any]) -> tuple[Array, int]:
    """The weight as torch stores it, and the axis of `array` that the node sums over."""
    if op in CONVOLUTIONS:
        return array, 0 if op == "ConvTranspose" else 1
    if array.ndim == 1:
        return array[None], 0
    is_left = index == 0
    transposed = bool(attributes.get("transA" if is_left else "transB", 0))
    reduced = array.ndim - 1 if is_left != transposed else array.ndim - 2
    last = np.moveaxis(array, reduced, -1)
    return last.reshape(-1, last.shape[-1]), reduced


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _tensor(array: Array) -> Tensor:
    """As torch tensor; number types that torch lacks (and bfloat16, which numpy lacks) become float32."""
    if array.dtype not in (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64):
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))
