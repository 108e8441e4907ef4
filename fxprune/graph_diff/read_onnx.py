"""ONNX file -> ModelGraph, with sizes of activations as far as the file tells them."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator

from fxprune.export.onnx_file import Array, OnnxFile, initializer_arrays, read_onnx
from fxprune.export.weight_uses import WeightUse, graph_weights
from fxprune.graph_diff.model_graph import GraphNode, ModelGraph
from fxprune.graph_diff.weights import Weights, weight_multiply_adds

_MAX_MESSAGE = 2**31 - 2**20  # shape inference passes the model on as one message
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def read_onnx_graph(path: str | Path) -> ModelGraph:
    """Read an ONNX file; constants, and what is computed from constants only, are no nodes.

    Raises:
        ValidationError: the file is missing or not a complete ONNX file.
    """
    file = read_onnx(path)
    graph = file.model.graph
    _name_nodes(graph)
    shapes = _shapes(file)
    uses: dict[str, WeightUse] = {}
    for use in graph_weights(file.model).uses:
        uses.setdefault(use.node, use)
    arrays = initializer_arrays(graph)
    parameters = _parameters(graph, arrays, uses)
    patterns = _patterns(file)
    shared = Counter(use.initializer for use in uses.values())
    constants = set(arrays) | {""}
    producer = {port.name: f"input {port.name}" for port in file.inputs}
    nodes = [
        GraphNode(f"input {port.name}", port.name, f"placeholder:{port.name}", "input", {}, (), output_shape=port.shape)
        for port in file.inputs
    ]
    nested = []
    for node in graph.node:
        if all(name in constants for name in node.input) and not _subgraphs(node):
            constants.update(node.output)
            if node.op_type == "Constant":
                values: Any = ReferenceEvaluator(node).run(None, {})
                arrays[node.output[0]] = np.asarray(values[0])
            continue
        weights = _weights(node, uses.get(node.name), arrays)
        nodes.append(_read_node(node, weights, uses.get(node.name), shared, producer, shapes, patterns))
        producer.update(dict.fromkeys(node.output, node.name))
        if _subgraphs(node):
            nested.append(node.name)
    for port in file.outputs:
        inputs = (producer[port.name],) if port.name in producer else ()
        nodes.append(
            GraphNode(
                f"output {port.name}", port.name, f"output:{port.name}", "output", {}, inputs, output_shape=port.shape
            )
        )
    return ModelGraph(
        title=Path(path).name
        + (f" (pruned to {pattern})" if (pattern := file.metadata.get("fxprune.pattern")) else ""),
        nodes=tuple(nodes),
        parameters=parameters,
        shapes_known=any(node.multiply_adds is not None for node in nodes),
        notes=(f"What happens inside {', '.join(nested)} is not compared.",) if nested else (),
    )


def _read_node(
    node: NodeProto,
    weights: Weights,
    use: WeightUse | None,
    shared: Counter[str],
    producer: dict[str, str],
    shapes: dict[str, tuple[int | str, ...]],
    patterns: dict[str, str],
) -> GraphNode:
    stem = use.initializer.removesuffix(".weight") if use else ""
    own_name = bool(stem) and shared[use.initializer if use else ""] == 1 and use is not None and "." in use.initializer
    output = shapes.get(node.output[0]) if node.output else None
    source = shapes.get(node.input[0]) if node.input else None
    return GraphNode(
        id=node.name,
        name=stem if own_name else node.name,
        key=f"weight:{stem}" if own_name else "",
        op=node.op_type,
        arguments=_attributes(node),
        inputs=tuple(producer[name] for name in node.input if name in producer),
        weights=weights,
        output_shape=output,
        multiply_adds=_multiply_adds(node, weights, source or (), output or ()),
        pattern=patterns.get(stem, ""),
    )


def _multiply_adds(
    node: NodeProto, weights: Weights, source: tuple[int | str, ...], output: tuple[int | str, ...]
) -> int | None:
    """Of a layer with a stored weight, or of a product of two activations; None where a size is not known."""
    if weights.weight is not None and output:
        return weight_multiply_adds(weights, source, output)
    factors = [*output[1:], *source[-1:]]
    known = [size for size in factors if isinstance(size, int)]
    if node.op_type == "MatMul" and source and output and len(known) == len(factors):
        return math.prod(known)
    return None


def _name_nodes(graph: GraphProto) -> None:
    """Give a name to every node that has none of its own."""
    taken: set[str] = set()
    for position, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        taken.add(node.name)


def _shapes(file: OnnxFile) -> dict[str, tuple[int | str, ...]]:
    """Sizes of all values, from ONNX shape inference; only those that the file states if it is too large for that."""
    model = file.model
    if model.ByteSize() < _MAX_MESSAGE:
        model = onnx.shape_inference.infer_shapes(model)
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    return {value.name: _sizes(value) for value in values if value.type.tensor_type.HasField("shape")}


def _sizes(value: ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(int(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in dims)


def _patterns(file: OnnxFile) -> dict[str, str]:
    """Layer name -> pattern, as our exporter writes it into the file."""
    layers: dict[str, Any] = json.loads(file.metadata.get("fxprune.layers", "{}"))
    return {name: str(layer.get("pattern", "")) for name, layer in layers.items()}


def _attributes(node: NodeProto) -> dict[str, str]:
    texts = {}
    for attribute in node.attribute:
        if attribute.type not in _GRAPHS:
            value = helper.get_attribute_value(attribute)
            texts[attribute.name] = value.decode(errors="replace") if isinstance(value, bytes) else _text(value)
    return texts


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _subgraphs(node: NodeProto) -> bool:
    return any(attribute.type in _GRAPHS for attribute in node.attribute)


def _weights(node: NodeProto, use: WeightUse | None, arrays: dict[str, Array]) -> Weights:
    stored = {position: arrays[name] for position, name in enumerate(node.input) if name in arrays}
    if node.op_type == "BatchNormalization" and {1, 2, 3, 4} <= stored.keys():
        gamma, beta, mean, var = (torch.from_numpy(stored[i].astype(np.float64)) for i in (1, 2, 3, 4))
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale = gamma * (var + epsilon).rsqrt()
        named = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
        return Weights(None, named, scale=scale, shift=beta - mean * scale)
    names = {2: "bias"} if use else {}
    others = {
        names.get(position, f"input {position}"): torch.from_numpy(np.array(array, np.float64))
        for position, array in stored.items()
        if array.dtype.kind in "biuf" and (use is None or node.input[position] != use.initializer)
    }
    if use is None:
        return Weights(None, others)
    return Weights(use.weight, others, use.groups, transposed=use.op == "ConvTranspose")


def _parameters(graph: GraphProto, arrays: dict[str, Array], uses: dict[str, WeightUse]) -> dict[str, torch.Tensor]:
    """Stored tensors that were learnt: weights, and other floating-point ones; not BatchNorm's statistics, not numbers."""
    weights = {use.initializer: use.weight for use in uses.values()}
    statistics = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    learnt = {
        name: torch.from_numpy(np.array(array, np.float64))
        for name, array in arrays.items()
        if name not in weights and name not in statistics and array.ndim and np.issubdtype(array.dtype, np.floating)
    }
    return {**weights, **learnt}
