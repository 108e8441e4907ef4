"""Values of an ONNX graph that are known before it runs, and which stored tensor each of them came from.

One folder for all readers of files: the inspection, the check of weights, the diff. A weight reaches its node directly or
through Transpose, Cast, DequantizeLinear, a mask, ...; what the node reads is evaluated here with the operator set's own
semantics, and the axes of the stored tensor are followed. Nothing here raises: what cannot be evaluated has no value.

onnx and numpy are all that this file needs; importing it does not load onnxruntime.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]

DEFAULT_DOMAINS = ("", "ai.onnx")
MICROSOFT = "com.microsoft"

# Only the first input of these is data; what they give holds the same numbers.
_MOVES = {
    "Identity", "Cast", "CastLike", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand",
    "Tile", "Pad", "Split", "QuantizeLinear", "DequantizeLinear", "Trilu", "DepthToSpace", "SpaceToDepth", "Clip",
}  # fmt: skip
_SHAPE_ONLY = {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_ELEMENTWISE = {
    "Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil", "Cos", "Div", "Equal",
    "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not",
    "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Sub", "Sum", "Tanh",
    "Where", "Xor",
}  # fmt: skip
_OTHERS = {
    "Concat", "ConstantOfShape", "Range", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Shape", "Size", "MatMul", "CumSum", "GatherElements", "NonZero", "ScatterElements",
    "ScatterND",
}  # fmt: skip
_FOLDED = _MOVES | _ELEMENTWISE | _OTHERS
_RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


@dataclass(frozen=True, eq=False)
class Constant:
    """A value known before the model runs.

    Attributes:
        array: the value.
        initializer: name of the stored tensor, or of the Constant node's output, that it is a form of; the value's own name
            where several were joined or it was computed.
        stored: that tensor as stored.
        axes: `axes[i]` is the axis of `stored` behind axis i, None for an axis of size 1 that is new; None as a whole where
            a reshape or the like stands between.
        sources: names of all stored tensors of which it is made.
    """

    array: Array
    initializer: str
    stored: Array
    axes: tuple[int | None, ...] | None
    sources: frozenset[str]


# Every name whose value does not depend on the graph's inputs; None where that value is not known.
Scope = dict[str, Constant | None]


@dataclass
class _Budget:
    """Numbers that may still be computed: a small hostile file can ask for terabytes."""

    left: int = 1 << 26

    def allows(self, size: int) -> bool:
        """Take `size` from what is left, if that is enough."""
        if not 0 <= size <= self.left:
            return False
        self.left -= size
        return True


def opset_versions(model: ModelProto) -> dict[str, int]:
    """Domain -> version; the default domain is "" whichever way the file spells it, and always there."""
    versions = {"": 1} | {str(o.domain): int(o.version) for o in model.opset_import}
    versions[""] = max([versions[domain] for domain in DEFAULT_DOMAINS if domain in versions])
    return versions


def constants(model: ModelProto) -> Scope:
    """All names of the main graph whose value is fixed, with the values that can be told.

    Args:
        model: with its local functions inlined (`read_onnx` does that) and its external data loaded.
    """
    return _graph_constants(model.graph, {}, opset_versions(model), _budget(model))


def fold_constants(model: ModelProto) -> tuple[dict[str, Array], dict[str, str]]:
    """Take the nodes whose values are known out of the main graph, in place; their values become initializers.

    Returns:
        All known values by name; and for each that was computed, the stored tensor that it is a form of.
    """
    known = {name: constant for name, constant in constants(model).items() if constant is not None}
    stored = initializer_names(model)
    kept = []
    for node in model.graph.node:
        outputs = [name for name in node.output if name]
        try:
            tensors = [numpy_helper.from_array(known[name].array, name) for name in outputs]
        except (KeyError, ValueError, TypeError, NotImplementedError):  # not known, or of a type without a tensor form
            tensors = []
        if tensors:
            model.graph.initializer.extend(tensors)
        else:
            kept.append(NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    origins = {name: constant.initializer for name, constant in known.items() if name not in stored}
    return {name: constant.array for name, constant in known.items()}, origins


def initializer_names(model: ModelProto) -> set[str]:
    """The names of all tensors that the main graph stores as initializers."""
    names = {tensor.name for tensor in model.graph.initializer}
    return names | {tensor.values.name for tensor in model.graph.sparse_initializer}


def evaluated(node: NodeProto, inputs: Mapping[str, Array], opsets: Mapping[str, int]) -> dict[str, Array] | None:
    """What a node gives for these inputs, by name; None if that cannot be told, or is not the same at every run."""
    scope: Scope = {name: _as_stored(name, array) for name, array in inputs.items()}
    found = _fold(node, scope, opsets, _Budget()) or {}
    results = {name: constant.array for name, constant in found.items() if constant is not None}
    return results if results and results.keys() == {name for name in node.output if name} else None


def nodes_with_constants(model: ModelProto) -> Iterator[tuple[NodeProto, Scope]]:
    """All nodes, those of subgraphs after the node that holds them, each with the constants of its graph."""
    yield from _walk(model.graph, {}, opset_versions(model), _budget(model))


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop, Scan or the like."""
    for attribute in node.attribute:
        if attribute.type in _GRAPHS:
            yield from attribute.graphs if attribute.type == AttributeProto.GRAPHS else [attribute.g]


def stored_tensors(graph: GraphProto) -> dict[str, Array | None]:
    """All initializers of one graph by name, sparse ones made dense; None for one that is damaged."""
    arrays = {tensor.name: tensor_array(tensor) for tensor in graph.initializer}
    return arrays | {tensor.values.name: sparse_array(tensor) for tensor in graph.sparse_initializer}


def tensor_array(tensor: TensorProto) -> Array | None:
    """The numbers of a tensor, small and 8-bit float types in ml_dtypes' numpy types; None if it is damaged."""
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception:  # numpy, protobuf and onnx raise what they like on wrong sizes and unknown types
        return None


def sparse_array(tensor: SparseTensorProto) -> Array | None:
    """A sparse tensor made dense; None if it is damaged, or much too large."""
    values, indices = tensor_array(tensor.values), tensor_array(tensor.indices)
    shape = tuple(tensor.dims)
    if values is None or indices is None or not 0 <= math.prod(shape) <= (1 << 31):
        return None
    try:
        dense = np.zeros(shape, values.dtype)
        if indices.ndim == 2:  # one index per axis instead of a linear one
            indices = np.ravel_multi_index(tuple(indices.T), shape) if len(indices) else indices.reshape(-1)
        dense.reshape(-1)[indices] = values
    except (ValueError, IndexError, TypeError, MemoryError):
        return None
    return dense


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes that a node states, as Python values; an attribute that is damaged is left out."""
    stated = {}
    for attribute in node.attribute:
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # a type that onnx does not know
            stated[attribute.name] = helper.get_attribute_value(attribute)
    return stated


def attributes_with_defaults(node: NodeProto, opsets: Mapping[str, int]) -> dict[str, Any]:
    """A node's attributes in a form in which nodes that do the same have the same.

    Where a node states none, the default of its operator set's schema is there: Gemm with alpha=1.0 and transA=0 equals Gemm
    without. Attributes whose default depends on the inputs' rank are left out where they equal it: strides and dilations of
    1, pads of 0, the reversing "perm" of a Transpose, and a convolution's "kernel_shape", which its weight shows. Subgraphs
    are left out.

    Args:
        node: of any domain; without a schema only what it states is there.
        opsets: from `opset_versions`.
    """
    schema = schema_of(node, opsets)
    found = {
        name: helper.get_attribute_value(attribute.default_value)
        for name, attribute in ({} if schema is None else schema.attributes).items()
        if attribute.default_value.type != AttributeProto.UNDEFINED
    }
    stated = {name: value for name, value in attributes(node).items() if not _holds_graphs(value)}
    return found | {name: value for name, value in stated.items() if not _is_implied(node.op_type, name, value)}


def schema_of(node: NodeProto, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    """What onnx knows of a node's operation in its operator set; None if nothing."""
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    version = opsets.get(domain, 1)
    try:
        return onnx.defs.get_schema(
            node.op_type, version if domain else min(version, onnx.defs.onnx_opset_version()), domain
        )
    except onnx.defs.SchemaError:
        return None


def _is_implied(op: str, name: str, value: Any) -> bool:
    """Whether a list equals the default that the inputs' rank or the weight implies."""
    if not isinstance(value, list):
        return False
    if name in ("strides", "dilations"):
        return all(v == 1 for v in value)
    if name in ("pads", "output_padding"):
        return all(v == 0 for v in value)
    if name == "perm":
        return value == list(range(len(value) - 1, -1, -1))
    return name == "kernel_shape" and op.startswith("Conv")


def _holds_graphs(value: Any) -> bool:
    return isinstance(value, GraphProto) or (isinstance(value, list) and any(isinstance(v, GraphProto) for v in value))


def _budget(model: ModelProto) -> _Budget:
    return _Budget(max(1 << 24, 4 * model.ByteSize()))


def _walk(
    graph: GraphProto, outer: Scope, opsets: Mapping[str, int], budget: _Budget
) -> Iterator[tuple[NodeProto, Scope]]:
    scope = _graph_constants(graph, outer, opsets, budget)
    for node in graph.node:
        yield node, scope
        for subgraph in subgraphs(node):
            yield from _walk(subgraph, scope, opsets, budget)


def _graph_constants(graph: GraphProto, outer: Scope, opsets: Mapping[str, int], budget: _Budget) -> Scope:
    scope = dict(outer)
    for value in graph.input:  # a loop body's own inputs hide outer values; initializers give defaults to inputs
        scope.pop(value.name, None)
    for name, array in stored_tensors(graph).items():
        scope[name] = None if array is None else _as_stored(name, array)
    for node in graph.node:
        folded = _fold(node, scope, opsets, budget)
        for name in node.output:
            scope.pop(name, None)
        if folded is not None:
            scope.update(folded)
    return scope


def _as_stored(name: str, array: Array, sources: frozenset[str] | None = None) -> Constant:
    return Constant(array, name, array, tuple(range(array.ndim)), sources or frozenset([name]))


def _fold(node: NodeProto, scope: Scope, opsets: Mapping[str, int], budget: _Budget) -> Scope | None:
    """What a node gives, by name; None if it depends on the graph's inputs or is not the same at every run."""
    outputs = [name for name in node.output if name]
    default = node.domain in DEFAULT_DOMAINS
    if default and node.op_type == "Constant" and outputs:
        array = constant_value(node)
        return {outputs[0]: None if array is None else _as_stored(outputs[0], array)}
    names = [name for name in node.input if name]
    known_domain = default or node.domain == MICROSOFT
    if not names or not known_domain or node.op_type in _RANDOM or any(name not in scope for name in names):
        return None
    if any(attribute.type in _GRAPHS for attribute in node.attribute):
        return None
    inputs = [scope[name] if name else None for name in node.input]
    results: Scope = dict.fromkeys(outputs)
    missing = any(name and constant is None for name, constant in zip(node.input, inputs, strict=True))
    if missing or not ((default and node.op_type in _FOLDED) or node.op_type in ("QuantizeLinear", "DequantizeLinear")):
        return results
    try:
        arrays = _evaluate(node, [None if c is None else c.array for c in inputs], opsets, budget)
        for name, array in zip(node.output, arrays, strict=False):
            if name:
                results[name] = _trace_back(node, name, array, [c for c in inputs if c is not None])
    except Exception:  # the reference implementation raises what it likes on an invalid node
        return dict.fromkeys(outputs)
    return results


def constant_value(node: NodeProto) -> Array | None:
    """The value of a Constant node, in any of its forms; None if it has none that can be read."""
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return tensor_array(attribute.t)
            case "sparse_value":
                return sparse_array(attribute.sparse_tensor)
            case "value_float" | "value_floats":
                return np.array(attribute.f if attribute.name == "value_float" else list(attribute.floats), np.float32)
            case "value_int" | "value_ints":
                return np.array(attribute.i if attribute.name == "value_int" else list(attribute.ints), np.int64)
            case "value_string" | "value_strings":
                return np.array(attribute.s if attribute.name == "value_string" else list(attribute.strings), object)
    return None


def _evaluate(
    node: NodeProto, inputs: Sequence[Array | None], opsets: Mapping[str, int], budget: _Budget
) -> Sequence[Array]:
    """The outputs of one node, as far as they are wanted."""
    stated = attributes(node)
    if not budget.allows(_result_size(node.op_type, inputs, stated)):
        return []
    if node.op_type == "DequantizeLinear":
        return [dequantize(*inputs, axis=int(stated.get("axis", 1)), block=int(stated.get("block_size", 0)))]
    if node.op_type == "QuantizeLinear" and len(inputs) > 2 and inputs[2] is not None and inputs[2].dtype.kind in "iu":
        return [_quantize(*inputs[:3], axis=int(stated.get("axis", 1)), block=int(stated.get("block_size", 0)))]
    if node.domain not in DEFAULT_DOMAINS:
        return []
    feeds = {name: array for name, array in zip(node.input, inputs, strict=True) if name}
    newest = onnx.defs.onnx_opset_version()
    version = min(opsets[""], newest)
    if given := _given_as_attributes(node, newest):
        # The reference implementation knows the newer form only.
        node, version = NodeProto.FromString(node.SerializeToString()), newest
        kept = [attribute for attribute in node.attribute if attribute.name not in given]
        del node.attribute[:]
        node.attribute.extend(kept)
        for name, position in given.items():
            node.input.extend([""] * (position + 1 - len(node.input)))
            node.input[position] = f"attribute {name}"
            feeds[node.input[position]] = np.asarray(
                stated[name], np.float32 if isinstance(stated[name], float) else np.int64
            )
    outputs: Any = ReferenceEvaluator(node, opsets={"": version}).run(None, feeds)
    return [np.asarray(output) for output in outputs]


def _given_as_attributes(node: NodeProto, newest: int) -> dict[str, int]:
    """Attributes that are inputs in the newest operator set (axes, split, starts, min, ...), with the input's position."""
    schema = onnx.defs.get_schema(node.op_type, newest)
    positions = {parameter.name: position for position, parameter in enumerate(schema.inputs)}
    names = {attribute.name for attribute in node.attribute} - set(schema.attributes)
    return {name: positions[name] for name in names & set(positions)}


def _result_size(op: str, inputs: Sequence[Array | None], stated: Mapping[str, Any]) -> int:
    """How many numbers a node gives, or an upper bound; -1 if that makes no sense."""
    arrays = [array for array in inputs if array is not None]
    first = arrays[0]
    numbers = [int(v) for v in arrays[1].reshape(-1)] if len(arrays) > 1 and arrays[1].dtype.kind in "iu" else []
    match op:
        case "ConstantOfShape":
            return math.prod(int(v) for v in first.reshape(-1))
        case "Expand":
            return math.prod(np.broadcast_shapes(first.shape, tuple(numbers)))
        case "Tile":
            return first.size * math.prod(numbers)
        case "Pad":
            pads = list(stated.get("pads", numbers))
            return math.prod(size + sum(map(abs, pads)) for size in first.shape)
        case "Range":
            start, limit, delta = (float(array) for array in arrays)
            return max(0, math.ceil((limit - start) / delta))
        case "Gather":
            return first.size * max(1, len(numbers))
        case "MatMul":
            return first.size * (arrays[1].shape[-1] if arrays[1].ndim else 1)
        case _ if op in _ELEMENTWISE:
            return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
    return sum(array.size for array in arrays)


def dequantize(
    x: Array | None, scale: Array | None, zero_point: Array | None = None, *, axis: int = 1, block: int = 0
) -> Array:
    """DequantizeLinear in float32, of any integer or 8-bit float type, as ai.onnx and com.microsoft define it.

    Args:
        x: the stored numbers, (..., D, ...).
        scale: a scalar, (D,) along `axis`, or one a block of `block` numbers along `axis`.
        zero_point: shaped like `scale`; 0 if absent.
        axis: of x.
        block: numbers that share a scale; 0 for none.
    """
    assert x is not None
    assert scale is not None
    result = x.astype(np.float32)
    if zero_point is not None:
        result = result - _spread(zero_point.astype(np.float32), x.shape, axis, block)
    return np.asarray(result * _spread(scale.astype(np.float32), x.shape, axis, block))


def _quantize(x: Array | None, scale: Array | None, zero_point: Array | None, *, axis: int, block: int) -> Array:
    """QuantizeLinear to the zero point's integer type."""
    assert x is not None
    assert scale is not None
    assert zero_point is not None
    limits = np.iinfo(zero_point.dtype)
    scaled = np.rint(x.astype(np.float32) / _spread(scale.astype(np.float32), x.shape, axis, block))
    shifted = scaled + _spread(zero_point.astype(np.float32), x.shape, axis, block)
    return np.asarray(np.clip(shifted, limits.min, limits.max).astype(zero_point.dtype))


def _spread(parameter: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """A scale or zero point in the form in which it broadcasts over a tensor of this shape."""
    if parameter.size == 1:
        return parameter.reshape(())
    if block:
        return np.repeat(parameter, block, axis).take(np.arange(shape[axis]), axis)
    return parameter.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _trace_back(node: NodeProto, name: str, array: Array, inputs: Sequence[Constant]) -> Constant:
    """The result of a node with its origin."""
    op = node.op_type
    if op in _MOVES:
        source = inputs[0]
        return Constant(array, source.initializer, source.stored, _axes(node, source, array), source.sources)
    sources = frozenset().union(*(constant.sources for constant in inputs))
    # A weight times a mask, or over its norm: still that weight, its axes where they were.
    like = [c for c in inputs if c.array.shape == array.shape and c.array.ndim]
    if op in _ELEMENTWISE and like:
        return Constant(array, like[0].initializer, like[0].stored, like[0].axes, sources)
    return _as_stored(name, array, sources)


def _axes(node: NodeProto, source: Constant, array: Array) -> tuple[int | None, ...] | None:
    """The stored axes behind those of the result of a move."""
    axes = source.axes
    if axes is None or len(axes) != source.array.ndim:
        return None
    if node.op_type == "Transpose":
        order = attributes(node).get("perm") or range(len(axes) - 1, -1, -1)
        return tuple(axes[i] for i in order)
    if node.op_type in _SHAPE_ONLY:
        # Sizes of 1 come and go; the others, in their order, are what they were.
        long = [axis for axis, size in zip(axes, source.array.shape, strict=True) if size != 1]
        if [size for size in source.array.shape if size != 1] != [size for size in array.shape if size != 1]:
            return None
        rest = iter(long)
        return axes if array.shape == source.array.shape else tuple(None if s == 1 else next(rest) for s in array.shape)
    if node.op_type in ("DepthToSpace", "SpaceToDepth") or array.ndim != source.array.ndim:
        return None
    return axes
