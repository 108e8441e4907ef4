"""Arithmetic on sizes: what a file computes from shapes, done on Python numbers when it is imported.

Shape -> Gather -> Mul -> Concat -> Reshape leaves at most a product of two sizes in the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from fxprune.onnx_import.graph import TorchGraph
from fxprune.onnx_import.table import Operation
from fxprune.onnx_import.values import Activation, Array, Known, Numbers, Size


def shape_of(op: Operation) -> Numbers:
    """Shape and Size."""
    x = op.tensor()
    sizes = [op.graph.size(x, axis) for axis in range(x.rank)]
    if op.type == "Size":
        total: Any = 1
        for size in sizes:
            total = size * total
        return Numbers(_items(total), np.dtype(np.int64))
    found = np.empty(len(sizes), object)
    found[:] = sizes
    return Numbers(found[slice(op.attribute("start", 0), op.attribute("end", None))], np.dtype(np.int64))


def computed(op: Operation) -> Numbers | None:
    """What an operation gives whose inputs are sizes and constants; None if it is none of those known here."""
    if op.type not in _RULES or any(isinstance(value, Activation) for value in op.inputs):
        return None
    if op.type in _MOVES and not isinstance(op.inputs[0], Numbers):
        return None  # A table, of which sizes say what is wanted.
    values = [None if value is None else Numbers.of(value) for value in op.inputs if not isinstance(value, Activation)]
    return _RULES[op.type](op, values)


def settled(value: Numbers) -> Known | Numbers:
    """A constant, where no number depends on sizes any more."""
    return Known(value.array.astype(value.dtype), "") if value.is_known else value


def _items(value: Any) -> Array:
    """A single value as an array of no dimensions."""
    found = np.empty((), object)
    found[()] = value
    return found


def _elementwise(function: Callable[[TorchGraph, np.dtype[Any], Any, Any], Any], dtype: Any = None) -> Any:
    def rule(op: Operation, values: list[Any]) -> Numbers:
        kind = values[0].dtype
        result = values[0].array
        for other in values[1:]:
            a, b = np.broadcast_arrays(result, other.array)
            found = np.empty(a.shape, object)
            for i in np.ndindex(a.shape):
                found[i] = function(op.graph, kind, a[i], b[i])
            result = found
        return Numbers(result, np.dtype(dtype or kind))

    return rule


def _single(function: Callable[[TorchGraph, Any], Any]) -> Any:
    def rule(op: Operation, values: list[Any]) -> Numbers:
        found = np.empty(values[0].array.shape, object)
        for i in np.ndindex(found.shape):
            found[i] = function(op.graph, values[0].array[i])
        return Numbers(found, values[0].dtype)

    return rule


def _div(graph: TorchGraph, kind: np.dtype[Any], a: Any, b: Any) -> Any:
    if kind.kind == "f":
        return a / b
    if isinstance(a, Size) or isinstance(b, Size):
        return a // b  # Sizes are not negative.
    return math.trunc(a / b) if b else 0


def _compare(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda graph, kind, a, b: graph.call(function, a, b) if _depends(a, b) else function(a, b)


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda graph, kind, a, b: graph.call(function, a, b) if _depends(a, b) else function(a, b)


def _depends(*values: Any) -> bool:
    return any(isinstance(value, Size) for value in values)


def _rounded(function: Callable[[Any], int]) -> Callable[..., Any]:
    return lambda graph, x: graph.call(function, x) if _depends(x) else float(function(x))


def _cast(op: Operation, values: list[Any]) -> Numbers:
    from onnx import helper

    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(op.attribute("to", 1)))
    whole = dtype.kind in "iu" and values[0].dtype.kind == "f"

    def convert(graph: TorchGraph, x: Any) -> Any:
        if not _depends(x):
            return dtype.type(x).item()
        return graph.call(int, x) if whole else x

    return Numbers(_single(convert)(op, values).array, dtype)


def _gather(op: Operation, values: list[Any]) -> Numbers:
    data, indices = values
    found = np.take(data.array, indices.array.astype(np.int64), axis=op.attribute("axis", 0), mode="wrap")
    return Numbers(found if isinstance(found, np.ndarray) else _items(found), data.dtype)


def _slice(op: Operation, values: list[Any]) -> Numbers:
    starts, ends = op.ints("starts", 1) or [], op.ints("ends", 2) or []
    axes, steps = op.ints("axes", 3), op.ints("steps", 4)
    where = [slice(None)] * values[0].array.ndim
    for i, axis in enumerate(axes or range(len(starts))):
        step = steps[i] if steps else 1
        stop = None if step < 0 and ends[i] < -values[0].array.shape[axis] else ends[i]
        where[axis] = slice(starts[i], stop, step)
    return Numbers(values[0].array[tuple(where)], values[0].dtype)


def _concat(op: Operation, values: list[Any]) -> Numbers:
    return Numbers(np.concatenate([v.array for v in values], axis=op.attribute("axis", 0)), values[0].dtype)


def _squeeze(op: Operation, values: list[Any]) -> Numbers:
    axes = op.ints("axes", 1)
    return Numbers(np.squeeze(values[0].array, None if axes is None else tuple(axes)), values[0].dtype)


def _unsqueeze(op: Operation, values: list[Any]) -> Numbers:
    return Numbers(np.expand_dims(values[0].array, tuple(op.ints("axes", 1) or ())), values[0].dtype)


def _reshape(op: Operation, values: list[Any]) -> Numbers:
    return Numbers(values[0].array.reshape(op.ints("shape", 1) or ()), values[0].dtype)


def _product(op: Operation, values: list[Any]) -> Numbers:
    axes, keep = op.ints("axes", 1), op.attribute("keepdims", 1)
    array = values[0].array
    found = np.prod(array, axis=None if not axes else tuple(axes), keepdims=bool(keep))
    return Numbers(found if isinstance(found, np.ndarray) else _items(found), values[0].dtype)


def _where(op: Operation, values: list[Any]) -> Numbers:
    condition, a, b = np.broadcast_arrays(*(v.array for v in values))
    if any(map(_depends, condition.reshape(-1))):
        op.fail("it chooses by the size of the input")
    found = np.empty(a.shape, object)
    for i in np.ndindex(a.shape):
        found[i] = a[i] if condition[i] else b[i]
    return Numbers(found, values[1].dtype)


def _expand(op: Operation, values: list[Any]) -> Numbers:
    shape = np.broadcast_shapes(values[0].array.shape, tuple(op.ints("shape", 1) or ()))
    return Numbers(np.broadcast_to(values[0].array, shape), values[0].dtype)


def _transpose(op: Operation, values: list[Any]) -> Numbers:
    return Numbers(values[0].array.transpose(op.attribute("perm", None)), values[0].dtype)


_MOVES = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Transpose", "Cast", "Identity")
_RULES: dict[str, Callable[[Operation, list[Any]], Numbers]] = {
    "Identity": lambda op, values: values[0],
    "Add": _elementwise(lambda g, k, a, b: a + b),
    "Sub": _elementwise(lambda g, k, a, b: a - b),
    "Mul": _elementwise(lambda g, k, a, b: a * b),
    "Div": _elementwise(_div),
    "Mod": _elementwise(lambda g, k, a, b: a % b),
    "Min": _elementwise(_extreme(min)),
    "Max": _elementwise(_extreme(max)),
    "Equal": _elementwise(_compare(operator.eq), bool),
    "Less": _elementwise(_compare(operator.lt), bool),
    "LessOrEqual": _elementwise(_compare(operator.le), bool),
    "Greater": _elementwise(_compare(operator.gt), bool),
    "GreaterOrEqual": _elementwise(_compare(operator.ge), bool),
    "Neg": _single(lambda g, x: -x),
    "Floor": _single(_rounded(math.floor)),
    "Ceil": _single(_rounded(math.ceil)),
    "Sqrt": _single(lambda g, x: g.call(math.sqrt, x) if _depends(x) else math.sqrt(x)),
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "ReduceProd": _product,
    "Where": _where,
    "Expand": _expand,
    "Transpose": _transpose,
}
