"""What an ONNX file states in different ways and means the same: values computed from constants, and attributes left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, defs, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fxprune.export.onnx_file import Array, initializer_arrays

GRAPH_TYPES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_STANDARD = ("", "ai.onnx")
# Contrib operators that compute what the standard operator of that name does.
_CONTRIB = {"DequantizeLinear", "QuantizeLinear", "Identity", "Cast"}
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")
_MANY_NUMBERS = 16  # a constant of more numbers than this is a tensor, not an argument


def fold_constants(model: ModelProto) -> tuple[dict[str, Array], dict[str, str]]:
    """Replace what the main graph computes from constants alone by initializers; nodes get names, each its own.

    A node that onnx's reference implementation does not know, or fails at, stays.

    Args:
        model: changed in place.

    Returns:
        All constants by name; and for each computed one the initializer that it comes from (its first constant input).
    """
    graph = model.graph
    arrays = initializer_arrays(graph)
    origins: dict[str, str] = {}
    kept = []
    for node in graph.node:
        values = _evaluate(node, arrays, opset_of(model)) if _is_constant(node, arrays) else None
        if values is None:
            kept.append(node)
            continue
        source = next((origins.get(name, name) for name in node.input if name), "")
        for name, value in zip(node.output, values, strict=False):
            arrays[name] = value
            graph.initializer.append(numpy_helper.from_array(value, name))
            origins[name] = source or name
    del graph.node[:]
    graph.node.extend(kept)
    taken: set[str] = set()
    for position, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{position}"
        taken.add(node.name)
    return arrays, origins


def opset_of(model: ModelProto) -> int:
    """Version of the standard operators that a model uses."""
    return next((int(o.version) for o in model.opset_import if o.domain in _STANDARD), defs.onnx_opset_version())


def has_subgraphs(node: NodeProto) -> bool:
    """Whether a node is an If, a Loop, a Scan or the like."""
    return any(attribute.type in GRAPH_TYPES for attribute in node.attribute)


def node_arguments(
    node: NodeProto, opset: int, constants: Mapping[str, Array], weight_shape: tuple[int, ...] = ()
) -> dict[str, str]:
    """Attributes with the schema's defaults filled in, and constant inputs that are numbers rather than tensors.

    What was an attribute in one operator set and is an input in the next (axes, min, max, ...) has one name in both.

    Args:
        node: of a graph in which constants are folded.
        opset: version of the standard operators.
        constants: by name.
        weight_shape: (R, C/G, *kernel) of a convolution, which may leave out the kernel's size.
    """
    values: dict[str, Any] = {
        a.name: helper.get_attribute_value(a) for a in node.attribute if a.type not in GRAPH_TYPES
    }
    schema = _schema(node, opset)
    if schema is not None:
        for name, attribute in schema.attributes.items():
            if attribute.default_value.type:
                values.setdefault(name, helper.get_attribute_value(attribute.default_value))
        _fill_in_window(values, schema, weight_shape)
    values |= {
        input_name(node, position, opset): constants[name].tolist()
        for position, name in enumerate(node.input)
        if name in constants and _is_argument(constants[name])
    }
    return {name: _text(value) for name, value in values.items()}


def tensor_inputs(node: NodeProto, opset: int, constants: Mapping[str, Array]) -> dict[str, str]:
    """Constant inputs that are tensors of numbers: what the operator's documentation calls each -> name in the graph."""
    return {
        input_name(node, position, opset): name
        for position, name in enumerate(node.input)
        if name in constants and constants[name].dtype.kind not in "SUOc" and not _is_argument(constants[name])
    }


def input_name(node: NodeProto, position: int, opset: int) -> str:
    """What the operator's documentation calls an input."""
    schema = _schema(node, opset)
    inputs = [] if schema is None else list(schema.inputs)
    single = defs.OpSchema.FormalParameterOption
    if position < len(inputs) and inputs[position].option in (single.Single, single.Optional):
        return str(inputs[position].name)
    return f"input {position}"


def _is_constant(node: NodeProto, arrays: Mapping[str, Array]) -> bool:
    if node.op_type == "Constant":
        return True
    known = any(node.input) and all(name in arrays for name in node.input if name)
    return known and not has_subgraphs(node) and not node.op_type.startswith(_RANDOM)


def _evaluate(node: NodeProto, arrays: Mapping[str, Array], opset: int) -> list[Array] | None:
    """The outputs of one node, or None if onnx's reference implementation cannot compute them."""
    if node.domain not in _STANDARD:
        if node.op_type not in _CONTRIB:
            return None
        node = NodeProto.FromString(node.SerializeToString())
        node.domain = ""
        opset = max(opset, 21)  # where per-axis and 16-bit scales are in the standard operator
    try:
        evaluator = ReferenceEvaluator(node, opsets={"": opset})
        values: Any = evaluator.run(None, {name: arrays[name] for name in node.input if name})
        return [np.asarray(value) for value in values]
    except Exception as error:  # whatever numpy or the reference implementation raises: the node then stays a node
        logging.getLogger(__name__).debug("%s %s is not folded: %s", node.op_type, node.name, error)
        return None


def _schema(node: NodeProto, opset: int) -> defs.OpSchema | None:
    domain = "" if node.domain in _STANDARD else node.domain
    try:
        return defs.get_schema(node.op_type, opset, domain)
    except defs.SchemaError:
        return None


def _fill_in_window(values: dict[str, Any], schema: defs.OpSchema, weight_shape: tuple[int, ...]) -> None:
    """Strides, padding and dilation of convolutions and pools, whose defaults the schema tells in words only."""
    kernel = list(values.get("kernel_shape") or weight_shape[2:])
    if not kernel or "auto_pad" not in schema.attributes:
        return
    if values.get("auto_pad") == b"VALID":
        values["auto_pad"] = b"NOTSET"
    defaults = {
        "kernel_shape": kernel,
        "strides": [1] * len(kernel),
        "dilations": [1] * len(kernel),
        "output_padding": [0] * len(kernel),
        "pads": [0] * 2 * len(kernel),
    }
    for name, default in defaults.items():
        if name in schema.attributes:
            values.setdefault(name, default)


def _is_argument(array: Array) -> bool:
    """Whether a constant is a number, or a few integers such as axes or a shape."""
    return array.ndim == 0 or (array.dtype.kind in "biu" and array.ndim == 1 and array.size <= _MANY_NUMBERS)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, onnx.TensorProto):
        return str(numpy_helper.to_array(value).tolist())
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)
