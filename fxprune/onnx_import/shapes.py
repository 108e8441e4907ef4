"""Operators that move numbers: reshape, transpose, join, cut, pick."""

from __future__ import annotations

import operator as python
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fxprune.onnx_import import batch, sizes
from fxprune.onnx_import.graph import BATCH, torch_dtype
from fxprune.onnx_import.names import layer_names
from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Known, Numbers, Size


@operator("Shape", "Size")
def shape(op: Operation) -> Any:
    """Numbers, not a tensor."""
    return sizes.shape_of(op)


@operator("Reshape")
def reshape(op: Operation) -> Activation:
    """0 keeps a size, -1 takes what is left."""
    x, target = op.tensor(), op.numbers("shape", 1)
    if target is None:
        op.fail("it has no shape")
    if not op.attribute("allowzero", 0):
        target = [op.graph.size(x, i) if not isinstance(t, Size) and t == 0 else t for i, t in enumerate(target)]
    return batch.reshaped(op.graph, x, target)


@operator("Flatten")
def flatten(op: Operation) -> Activation:
    """To two dimensions."""
    x = op.tensor()
    axis = op.attribute("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if axis == 1 and x.rank > 1:
        result: Activation = op.call(torch.flatten, x, 1)
        return result
    first: Any = 1
    for i in range(axis):
        first = op.graph.size(x, i) * first
    return batch.reshaped(op.graph, x, [first, -1] if not (isinstance(first, int) and 0 in x.shape) else [first, 0])


@operator("Transpose")
def transpose(op: Operation) -> Activation:
    """Axes in another order, reversed by default."""
    x = op.tensor()
    order = list(op.attribute("perm", range(x.rank - 1, -1, -1)))
    result: Activation = x if order == list(range(x.rank)) else op.method("permute", x, *order)
    return result


@operator("Squeeze")
def squeeze(op: Operation) -> Activation:
    """Without axes of size 1: those named, or all."""
    x, axes = op.tensor(), op.ints("axes", 1)
    if axes is None:
        axes = [i for i in range(x.rank) if all(probe.shape[i] == 1 for probe in x.probes)]
        if len(axes) < sum(size == 1 for size in x.shape):
            op.fail("it names no axes, and the size of one that it would take away is open")
    for axis in sorted({x.axis(axis) for axis in axes}, reverse=True):
        if x.shape[axis] != 1:
            op.fail(f"axis {axis} of {x.shape} is not of size 1")
        x = op.call(torch.select, x, axis, 0) if _varies(x, axis) else op.call(torch.squeeze, x, axis)
    return x


def _varies(x: Activation, axis: int) -> bool:
    return any(probe.shape[axis] != 1 for probe in x.probes)


@operator("Unsqueeze")
def unsqueeze(op: Operation) -> Activation:
    """With new axes of size 1."""
    x, axes = op.tensor(), op.ints("axes", 1) or []
    rank = x.rank + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = op.call(torch.unsqueeze, x, axis)
    return x


@operator("Concat")
def concat(op: Operation) -> Activation:
    """Join along an axis. A constant for one image is repeated for each."""
    values = [value for value in op.inputs if value is not None]
    tensors = [value for value in values if isinstance(value, Activation)]
    rank = tensors[0].rank if tensors else op.graph.tensor(values[0]).rank
    axis = op.attribute("axis", 1) % rank
    joined = [
        op.graph.tensor(v) if isinstance(v, Numbers) else batch.expanded(op.graph, v, tensors, axis) for v in values
    ]
    result: Activation = joined[0] if len(joined) == 1 else op.call(torch.cat, joined, axis)
    return result


@operator("Split")
def split(op: Operation) -> list[Any]:
    """In equal parts, or in parts of given sizes."""
    x = op.tensor()
    axis = x.axis(op.attribute("axis", 0))
    parts = op.numbers("split", 1)
    if parts is None:
        number = op.attribute("num_outputs", len(op.node.output))
        size = op.graph.size(x, axis)
        each = -(-size // number) if isinstance(size, int) else (size + (number - 1)) // number
        found: list[Any] = op.call(torch.split, x, each, axis)
        return found
    found = op.call(torch.split, x, list(parts), axis)
    return found


@operator("Slice")
def slice_(op: Operation) -> Activation:
    """With steps; backwards by a flip."""
    x = op.tensor()
    starts, ends = op.numbers("starts", 1), op.numbers("ends", 2)
    axes, steps = op.ints("axes", 3), op.ints("steps", 4)
    if starts is None or ends is None:
        op.fail("it has no starts or ends")
    places: list[Any] = [slice(None)] * x.rank
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        axis, step = x.axis(axis), steps[i] if steps else 1
        start, end = starts[i], ends[i]
        if step < 0:
            x, start, end, step = _backwards(op, x, axis, start, end, step)
        # ONNX counts negative numbers from the end, as Python does, and 2**63 - 1 is no end.
        last = None if isinstance(end, int) and end >= 2**31 - 1 else end
        first = None if isinstance(start, int) and (start == 0 or start <= -(2**31)) else start
        places[axis] = slice(first, last, None if step == 1 else step)
    if all(place == slice(None) for place in places if not _has_size(place)) and not any(map(_has_size, places)):
        return x
    while places and not _has_size(places[-1]) and places[-1] == slice(None):
        places.pop()

    result: Activation = op.call(python.getitem, x, tuple(places))
    return result


def _has_size(place: slice) -> bool:
    return isinstance(place.start, Size) or isinstance(place.stop, Size)


def _backwards(op: Operation, x: Activation, axis: int, start: Any, end: Any, step: int) -> tuple[Any, Any, Any, int]:
    size = op.graph.size(x, axis)
    if not all(isinstance(n, int) for n in (size, start, end)):
        if start in (-1, 2**31 - 1, 2**63 - 1) and isinstance(end, int) and end <= -(2**31) + 1:
            return op.call(torch.flip, x, [axis]), 0, 2**63 - 1, -step
        op.fail("it goes backwards along an axis whose size is open")
    first, last, _ = slice(start, None if end < -size else end, step).indices(size)
    return op.call(torch.flip, x, [axis]), size - 1 - first, size - 1 - last, -step


@operator("Gather")
def gather(op: Operation) -> Activation:
    """Rows of a table, or places along an axis."""
    data, indices = op.input(0), op.input(1)
    axis = op.attribute("axis", 0)
    if isinstance(data, Known) and isinstance(indices, Activation):
        return _looked_up(op, data, indices, axis)
    x = op.tensor()
    axis = x.axis(axis)
    if isinstance(indices, Activation):
        size = op.graph.size(x, axis)
        wrapped = op.call(torch.remainder, op.method("to", indices, torch.int64), size)
        flat = op.call(torch.index_select, x, axis, op.method("reshape", wrapped, -1))
        shape = [op.graph.size(indices, i) for i in range(indices.rank)]
        found: Activation = op.method("unflatten", flat, axis, shape) if indices.rank != 1 else flat
        return found
    if isinstance(indices, Numbers) and not indices.is_known:
        if indices.array.ndim == 0:
            found = op.call(torch.select, x, axis, indices.array[()])
            return found
        op.fail("its places depend on the size of the input")
    places = np.asarray(op.constant(1)).astype(np.int64)
    if _is_everything(op, x, axis, places):
        shape = [op.graph.size(x, i) for i in range(x.rank)]
        return batch.reshaped(op.graph, x, [*shape[:axis], *places.shape, *shape[axis + 1 :]])
    if places.ndim == 0:
        found = op.call(torch.select, x, axis, int(places))
        return found
    size = op.graph.size(x, axis)
    if isinstance(size, int):
        places = np.where(places < 0, places + size, places)
    elif (places < 0).any():
        op.fail("it counts places from the end of an axis whose size is open")
    flat = op.call(
        torch.index_select, x, axis, op.graph.tensor(Known(places.reshape(-1), f"{op.node.input[1]}_places"))
    )
    found = flat if places.ndim == 1 else op.method("unflatten", flat, axis, list(places.shape))
    return found


def _is_everything(op: Operation, x: Activation, axis: int, places: Any) -> bool:
    """Whether all of an axis is picked in its order: a reshape, as torch's exporter writes views by strides."""
    sizes = {probe.shape[axis] for kind, probe in zip(op.graph.kinds, x.probes, strict=True) if kind != BATCH}
    return bool(sizes == {places.size} and places.ndim and (places.reshape(-1) == np.arange(places.size)).all())


def _looked_up(op: Operation, table: Known, indices: Activation, axis: int) -> Activation:
    """Rows of a constant, an embedding where these are of floats."""
    array = table.array
    axis %= array.ndim
    whole = op.call(torch.remainder, op.method("to", indices, torch.int64), array.shape[axis])
    if axis == 0 and array.ndim == 2 and array.dtype.kind == "f":
        rows, width = array.shape
        module = nn.Embedding(rows, width, device="meta", dtype=torch_dtype(array.dtype))
        weights = {"weight": (array, table.name, True)}
        found: Activation = op.graph.module(
            (op.type, table.name), layer_names(op.node, table.name), module, weights, whole
        )
        return found
    flat = op.call(torch.index_select, op.tensor(), axis, op.method("reshape", whole, -1))
    found = op.method("unflatten", flat, axis, [op.graph.size(indices, i) for i in range(indices.rank)])
    return found


@operator("GatherElements")
def gather_elements(op: Operation) -> Activation:
    """One place for each number of the output."""
    x, indices = op.tensor(), op.tensor(1)
    axis = x.axis(op.attribute("axis", 0))
    whole = op.call(torch.remainder, op.method("to", indices, torch.int64), op.graph.size(x, axis))
    result: Activation = op.call(torch.gather, x, axis, whole)
    return result


@operator("ScatterElements", "Scatter")
def scatter_elements(op: Operation) -> Activation:
    """Other numbers at some places."""
    if op.attribute("reduction", "none") != "none":
        op.fail(f"it has the reduction {op.attribute('reduction', '')!r}; only plain assignment can be taken")
    x, indices = op.tensor(), op.tensor(1)
    axis = x.axis(op.attribute("axis", 0))
    whole = op.call(torch.remainder, op.method("to", indices, torch.int64), op.graph.size(x, axis))
    result: Activation = op.call(torch.scatter, x, axis, whole, op.tensor(2))
    return result


@operator("ScatterND")
def scatter_nd(op: Operation) -> Activation:
    """Other numbers at constant places."""
    if op.attribute("reduction", "none") != "none":
        op.fail(f"it has the reduction {op.attribute('reduction', '')!r}; only plain assignment can be taken")
    x, indices = op.tensor(), op.constant(1)
    if indices is None:
        op.fail("it names no places")
    columns = [
        op.graph.tensor(Known(np.ascontiguousarray(indices[..., i]), f"{op.node.output[0]}_places_{i}"))
        for i in range(indices.shape[-1])
    ]
    result: Activation = op.call(torch.index_put, x, columns, op.tensor(2))
    return result


@operator("Expand")
def expand(op: Operation) -> Activation:
    """Repeat along axes of size 1; sizes that are there already stay."""
    x, target = op.tensor(), op.numbers("shape", 1)
    if target is None:
        op.fail("it has no shape")
    front = max(0, len(target) - x.rank)
    wanted = [1] * max(0, x.rank - len(target)) + list(target)
    shape: list[Any] = []
    for i, size in enumerate(wanted):
        own = x.shape[i - front] if i >= front else None
        here = size.probes[0] if isinstance(size, Size) else size
        shape.append(-1 if own is not None and here in (1, own) else size)
    result: Activation = (
        x
        if not front
        and all(s == -1 for s in shape if not isinstance(s, Size))
        and not any(isinstance(s, Size) for s in shape)
        else op.method("expand", x, *shape)
    )
    return result


@operator("Tile")
def tile(op: Operation) -> Activation:
    """Repeat along each axis."""
    repeats = op.numbers("repeats", 1)
    if repeats is None:
        op.fail("it does not say how often")
    result: Activation = op.method("repeat", op.tensor(), *repeats)
    return result


@operator("ConstantOfShape")
def constant_of_shape(op: Operation) -> Activation:
    """A size that is only known when it runs, filled with one number."""
    from onnx import numpy_helper

    value = op.attributes.get("value")
    array = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    shape = tuple(op.numbers("shape", 0) or [])
    return op.graph.filled(shape, array.reshape(-1)[0].item(), torch_dtype(array.dtype))


@operator("Range")
def range_(op: Operation) -> Activation:
    """Whole numbers up to a size, one by one."""
    start, limit, step = (op.numbers("", i) or [None] for i in range(3))
    if step != [1] or start == [None] or limit == [None]:
        op.fail("it counts in steps other than 1")
    ones = op.graph.filled((limit[0] - start[0],), 1, torch.int64)
    result: Activation = op.call(torch.add, op.call(torch.cumsum, ones, 0), start[0] - 1)
    return result


@operator("DepthToSpace", "SpaceToDepth")
def depth_and_space(op: Operation) -> Activation:
    """Channels to positions and back; torch's pixel shuffle where the order is the same."""
    x, block = op.tensor(), op.attribute("blocksize", 1)
    if op.type == "DepthToSpace" and op.attribute("mode", "DCR") == "CRD":
        result: Activation = op.call(F.pixel_shuffle, x, block)
        return result
    channels, height, width = (op.graph.size(x, i) for i in (1, 2, 3))
    if op.type == "DepthToSpace":
        parts = op.method("reshape", x, (-1, block, block, channels // (block * block), height, width))
        turned = op.method("permute", parts, 0, 3, 4, 1, 5, 2)
        result = op.method("reshape", turned, (-1, channels // (block * block), height * block, width * block))
        return result
    parts = op.method("reshape", x, (-1, channels, height // block, block, width // block, block))
    turned = op.method("permute", parts, 0, 3, 5, 1, 2, 4)
    result = op.method("reshape", turned, (-1, channels * block * block, height // block, width // block))
    return result


@operator("Trilu")
def trilu(op: Operation) -> Activation:
    """The upper or lower triangle."""
    k = op.constant(1)
    function = torch.triu if op.attribute("upper", 1) else torch.tril
    result: Activation = op.call(function, op.tensor(), 0 if k is None else int(k.reshape(-1)[0]))
    return result


@operator("GridSample")
def grid_sample(op: Operation) -> Activation:
    """At places that another tensor gives."""
    mode = {
        "bilinear": "bilinear",
        "linear": "bilinear",
        "nearest": "nearest",
        "bicubic": "bicubic",
        "cubic": "bicubic",
    }
    name = op.attribute("mode", "bilinear" if op.opset < 20 else "linear")
    if name not in mode:
        op.fail(f"it has the mode {name!r}, which is none of {', '.join(mode)}")
    corners = bool(op.attribute("align_corners", 0))
    border = op.attribute("padding_mode", "zeros")
    result: Activation = op.call(F.grid_sample, op.tensor(), op.tensor(1), mode[name], border, corners)
    return result
