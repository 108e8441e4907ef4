"""ONNX file -> ModelGraph, with sizes of activations as far as the file tells them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
from torch import Tensor

from fxprune.export.constant_folding import Array, constant_value, fold_constants, opset_versions, subgraphs
from fxprune.export.file_metadata import ChannelOrder, channel_orders, layer_patterns
from fxprune.export.onnx_file import OnnxFile, initializer_arrays, read_onnx
from fxprune.export.weight_uses import RECURRENT, WeightUse, graph_weights
from fxprune.graph_diff.model_graph import GraphNode, ModelGraph
from fxprune.graph_diff.onnx_arguments import input_name, node_arguments, tensor_inputs
from fxprune.graph_diff.weights import Weights, recurrent_macs, weight_macs

_MAX_MESSAGE = 2**31 - 2**20  # shape inference passes the model on as one message
_HAS_BIAS = ("Conv", "ConvTranspose", "Gemm", "FusedConv", "FusedGemm")
_INTEGER_WEIGHTS = ("DequantizeLinear", "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm")


def read_onnx_graph(path: str | Path) -> ModelGraph:
    """Read an ONNX file; constants, and what is computed from constants only, are no nodes.

    Raises:
        ValidationError: the file is missing or not a complete ONNX file.
    """
    file = read_onnx(path)
    graph, opsets = file.model.graph, opset_versions(file.model)
    parameters = _parameters(file.model)
    constants, origins = fold_constants(file.model)
    _name_nodes(graph)
    shapes = _shapes(file)
    uses: dict[str, WeightUse] = {}
    for found in graph_weights(file.model).uses:
        uses.setdefault(found.node, found)  # Of a recurrent layer that of its input.
    patterns, orders = layer_patterns(file.metadata), channel_orders(file.metadata)
    names = _layer_names(uses, origins)
    producer = {port.name: f"input {port.name}" for port in file.inputs}
    nodes = [
        GraphNode(f"input {port.name}", port.name, f"placeholder:{port.name}", "input", {}, (), output_shape=port.shape)
        for port in file.inputs
    ]
    for node in graph.node:
        use, name = uses.get(node.name), names.get(node.name, "")
        weights = _weights(node, use, opsets, constants)
        source, output = (shapes.get(some[0], ()) if some else () for some in (node.input, node.output))
        nodes.append(
            GraphNode(
                id=node.name,
                name=name or node.name,
                key=f"weight:{name}" if name else "",
                op=node.op_type,
                arguments=node_arguments(node, opsets, constants, () if use is None else tuple(use.weight.shape)),
                inputs=tuple(producer[name] for name in node.input if name in producer),
                weights=weights,
                output_shape=output or None,
                macs=_macs(node, weights, source, output),
                pattern=_pattern(name, weights, patterns),
                order=_as_tensors(orders.get(name, ChannelOrder())),
            )
        )
        producer.update(dict.fromkeys(node.output, node.name))
    for port in file.outputs:
        inputs = (producer[port.name],) if port.name in producer else ()
        nodes.append(
            GraphNode(
                f"output {port.name}", port.name, f"output:{port.name}", "output", {}, inputs, output_shape=port.shape
            )
        )
    nested = [node.name for node in graph.node if any(subgraphs(node))]
    pattern = file.metadata.get("fxprune.pattern")
    return ModelGraph(
        title=Path(path).name + (f" (pruned to {pattern})" if pattern else ""),
        nodes=tuple(nodes),
        parameters=parameters,
        compressed=f"pruned to {pattern}" if pattern else "",
        shapes_known=any(node.macs is not None for node in nodes),
        notes=(
            *([f"What happens inside {', '.join(nested)} is not compared."] if nested else []),
            *(
                f"MACs leave out {node.name}: its number of time steps is not known."
                for node in nodes
                if node.weights.matrices and node.macs is None
            ),
        ),
    )


def _name_nodes(graph: GraphProto) -> None:
    """Give every node a name of its own."""
    taken: set[str] = set()
    for position, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        taken.add(node.name)


def _as_tensors(order: ChannelOrder) -> tuple[Tensor | None, Tensor | None]:
    inputs, outputs = (
        None if places is None else torch.tensor(places, dtype=torch.long) for places in (order.inputs, order.outputs)
    )
    return inputs, outputs


def _layer_names(uses: Mapping[str, WeightUse], origins: Mapping[str, str]) -> dict[str, str]:
    """Node -> "layer1.0.conv1", from the name of a weight that only this node reads."""
    stored = {node: origins.get(use.initializer, use.initializer) for node, use in uses.items()}
    readers = Counter(stored.values())
    names = {node: name for node, name in stored.items() if readers[name] == 1 and "." in name}
    return {
        node: name.replace(".weight_ih_", ".") if uses[node].op in RECURRENT else name.removesuffix(".weight")
        for node, name in names.items()
    }


def _pattern(name: str, weights: Weights, patterns: Mapping[str, str]) -> str:
    """What a layer was pruned to, as our file says; of a recurrent one ("lstm.l0") what its matrices were."""
    if not weights.matrices:
        return patterns.get(name, "")
    owner, _, suffix = name.rpartition(".")
    of_each = [patterns.get(f"{owner}.weight_{kind}_{suffix}", "") for kind in ("ih", "hh")]
    return ", ".join(dict.fromkeys(filter(None, of_each)))


def _macs(
    node: NodeProto, weights: Weights, source: tuple[int | str, ...], output: tuple[int | str, ...]
) -> int | None:
    """Of a layer with a stored weight, or of a product of two activations; None where a size is not known."""
    if weights.weight is not None and output:
        return weight_macs(weights, source, output)
    if weights.matrices and source:
        return recurrent_macs(weights, source[1 if any(a.name == "layout" and a.i for a in node.attribute) else 0])
    factors = [*output[1:], *source[-1:]]
    known = [size for size in factors if isinstance(size, int)]
    if node.op_type == "MatMul" and source and output and len(known) == len(factors):
        return math.prod(known)
    return None


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


def _weights(
    node: NodeProto, use: WeightUse | None, opsets: Mapping[str, int], constants: Mapping[str, Array]
) -> Weights:
    stored = {name: _numbers(constants[source]) for name, source in tensor_inputs(node, opsets, constants).items()}
    if node.op_type == "BatchNormalization" and all(name in constants for name in node.input[1:5]):
        gamma, beta, mean, var = (_numbers(constants[name]) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale = gamma * (var + epsilon).rsqrt()
        named = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
        return Weights(None, named, scale=scale, shift=beta - mean * scale)
    if node.op_type in RECURRENT:
        matrices = {name: x.flatten(0, 1) for name, x in stored.items() if name in ("W", "R") and x.dim() == 3}
        others = {"bias" if name == "B" else name: x for name, x in stored.items() if name not in matrices}
        return Weights(None, others, matrices=matrices)
    if use is None:
        return Weights(None, stored)
    tensors = tensor_inputs(node, opsets, constants)
    weight = next((i for i, name in enumerate(node.input) if name == use.initializer), None)
    names = {input_name(node, 2, opsets): "bias"} if node.op_type in _HAS_BIAS else {}
    others = {
        names.get(name, name): stored[name]
        for name in tensors
        if weight is None or name != input_name(node, weight, opsets)
    }
    return Weights(use.weight, others, use.groups, transposed=use.op == "ConvTranspose")


def _parameters(model: ModelProto) -> dict[str, Tensor]:
    """Stored tensors that were learnt, as they stand in the file: not BatchNorm's statistics, scales, or single numbers.

    A tensor counts if it is floating-point, or if it is dequantized or multiplied by as integers.
    """
    graph = model.graph
    integers = {name for node in graph.node if node.op_type in _INTEGER_WEIGHTS for name in node.input}
    others = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    others |= {
        name for node in graph.node if node.op_type in ("DequantizeLinear", "QuantizeLinear") for name in node.input[1:]
    }
    stored = initializer_arrays(graph)
    for node in graph.node:
        if node.op_type == "Constant" and (value := constant_value(node)) is not None:
            stored[node.output[0]] = value
    return {
        name: _numbers(array)
        for name, array in stored.items()
        if array.ndim and name not in others and (_is_floating(array) or (array.ndim > 1 and name in integers))
    }


def _is_floating(array: Array) -> bool:
    """Whether numbers are floating-point; bfloat16 and the eight-bit types are kinds of their own to numpy."""
    return array.dtype.kind == "f" or "float" in array.dtype.name


def _numbers(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, np.float64))
