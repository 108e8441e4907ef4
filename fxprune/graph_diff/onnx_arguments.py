"""What an ONNX node is called with beside tensors: its attributes and small constant inputs, by name, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import NodeProto, defs, numpy_helper

from fxprune.export.constant_folding import Array, attributes_with_defaults, schema_of

_MANY_NUMBERS = 16  # a constant of more numbers than this is a tensor, not an argument


def node_arguments(
    node: NodeProto, opsets: Mapping[str, int], constants: Mapping[str, Array], weight_shape: tuple[int, ...] = ()
) -> dict[str, str]:
    """Attributes with the defaults filled in, and constant inputs that are numbers rather than tensors.

    What was an attribute in one operator set and is an input in the next (axes, min, max, ...) has one name in both.

    Args:
        node: of a graph in which constants are folded.
        opsets: from `opset_versions`.
        constants: by name.
        weight_shape: (R, C/G, *kernel) of a convolution, which may leave out the kernel's size.
    """
    values = attributes_with_defaults(node, opsets)
    schema = schema_of(node, opsets)
    if schema is not None:
        _fill_in_window(values, schema, weight_shape)
    values |= {
        input_name(node, position, opsets): constants[name].tolist()
        for position, name in enumerate(node.input)
        if name in constants and _is_argument(constants[name])
    }
    return {name: _text(value) for name, value in values.items()}


def tensor_inputs(node: NodeProto, opsets: Mapping[str, int], constants: Mapping[str, Array]) -> dict[str, str]:
    """Constant inputs that are tensors of numbers: what the operator's documentation calls each -> name in the graph."""
    return {
        input_name(node, position, opsets): name
        for position, name in enumerate(node.input)
        if name in constants and constants[name].dtype.kind not in "SUOc" and not _is_argument(constants[name])
    }


def input_name(node: NodeProto, position: int, opsets: Mapping[str, int]) -> str:
    """What the operator's documentation calls an input."""
    schema = schema_of(node, opsets)
    inputs = [] if schema is None else list(schema.inputs)
    single = defs.OpSchema.FormalParameterOption
    if position < len(inputs) and inputs[position].option in (single.Single, single.Optional):
        return str(inputs[position].name)
    return f"input {position}"


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
