"""What functions and tensor methods do to channels. A rule gives the layout of the output, or says why it cannot."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Size
from torch.fx import Node

from fxprune.channels.context import Context, Value
from fxprune.channels.layout import Layout
from fxprune.operations import Argument, describe, operation_of


def function_rule(context: Context, node: Node) -> Value | str:
    """The layout of the output of a function or method, or the reason why its inputs must stay in place."""
    operation = operation_of(node)
    kind = "unknown" if operation is None else operation.channels
    if kind == "item":
        return _getitem(context, node)
    if kind == "concatenate":
        return _concatenate(context, node)
    if kind == "binary" and len(context.tensors(node)) == 2:
        return _combine(context, node)
    source = context.only_input(node)
    if isinstance(source, str):
        return source
    layout, shape = source
    if kind in ("elementwise", "binary"):
        return context.kept(node, layout) if context.output_shape(node) == shape else _unlike(node)
    if kind == "spatial":
        return spatial(context, node, layout, shape)
    if kind == "reshape":
        return reshape(context, node, layout, shape)
    if kind == "reduce":
        return _reduce(context, node, layout, shape)
    if kind == "split":
        return _split(context, node, layout)
    if kind == "pad":
        return _pad(context, node, layout, shape)
    return f"{describe(node)} may mix or move channels"


def spatial(context: Context, node: Node, layout: Layout, shape: Size) -> Layout | str:
    """What acts on each channel of (N, C, *spatial) alone."""
    if layout.dim != 1 or len(shape) < 3 or not takes_dimensions(node, shape):
        return f"{describe(node)} reads a tensor of shape {tuple(shape)}, not (N, C, ...)"
    return context.kept(node, layout)


def takes_dimensions(node: Node, shape: Size) -> bool:
    """Whether an operation takes so many dimensions, with a batch dimension among them."""
    operation = operation_of(node)
    return operation is not None and (not operation.dims or len(shape) in operation.dims)


def reshape(context: Context, node: Node, layout: Layout, shape: Size) -> Layout | str:
    """Flatten, view, squeeze: the elements stay in row-major order."""
    out, d = context.output_shape(node), layout.dim
    if out[: d + 1] == shape[: d + 1]:
        return layout
    if out[:d] == shape[:d] and len(out) == d + 1 and out[d] == math.prod(shape[d:]):
        return Layout(d, np.repeat(layout.classes, math.prod(shape[d + 1 :])))
    if d == len(shape) - 1 and out and out[-1] == shape[-1]:
        return Layout(len(out) - 1, layout.classes)
    return f"{describe(node)} turns {tuple(shape)} into {tuple(out)}, which takes channels apart"


def _concatenate(context: Context, node: Node) -> Layout | str:
    sources = Argument(0, "tensors").of(node)
    dim = Argument(1, "dim axis", 0).of(node)
    layouts: list[Layout] = []
    for source in sources if isinstance(sources, (list, tuple)) else ():
        layout = context.values.get(source)
        if not isinstance(layout, Layout) or layout.dim != (layouts or [layout])[0].dim:
            return f"{describe(node)} joins tensors with different channel dimensions"
        layouts.append(layout)
    if not layouts or not isinstance(dim, int):
        return f"{describe(node)} joins tensors that are not listed in the graph"
    d, first = layouts[0].dim, layouts[0].classes
    if dim % len(context.output_shape(node)) == d:
        return Layout(d, np.concatenate([layout.classes for layout in layouts]))
    for layout in layouts[1:]:
        context.relations.tie(first, layout.classes)
    return layouts[0]


def _combine(context: Context, node: Node) -> Layout | str:
    """An add, mul, ... of two tensors, with broadcasting."""
    reason = f"{describe(node)} combines channels with something that is not laid out like them"
    out, operands = context.output_shape(node), []
    for source in context.tensors(node):
        shape, layout = context.shapes[source], context.values[source]
        if not isinstance(shape, Size) or isinstance(layout, tuple):
            return reason
        operands.append((len(out) - len(shape), shape, layout))
    whole = [
        layout
        for lead, _, layout in operands
        if lead == 0 and layout is not None and len(layout.classes) == out[layout.dim]
    ]
    if not whole:
        return reason
    result = whole[0]
    d = result.dim
    for lead, shape, layout in operands:
        extent = shape[d - lead] if d >= lead else 1
        aligned = layout is None or layout.dim + lead == d or len(layout.classes) == 1
        if not aligned or (extent > 1 and (layout is None or layout.dim + lead != d)):
            return reason
        if extent > 1 and layout is not None and layout is not result:
            context.relations.tie(result.classes, layout.classes)
    return result


def _reduce(context: Context, node: Node, layout: Layout, shape: Size) -> Value | str:
    dims = Argument(1, "dim axis").of(node)
    dims = (dims,) if isinstance(dims, int) else range(len(shape)) if dims is None else dims
    if not isinstance(dims, (tuple, list, range)) or not all(isinstance(d, int) for d in dims):
        return f"{describe(node)} reduces dimensions that are not written in the graph"
    reduced = {d % len(shape) for d in dims}
    if layout.dim in reduced:  # The order of the channels makes no difference to what is taken over all of them.
        context.relations.need(layout.classes, f"{describe(node)} takes something over all channels")
        return context.fixed(context.shapes[node], f"{describe(node)} has no channels of its own")
    if min(reduced) < layout.dim:
        return f"{describe(node)} reduces a dimension before the channels"
    return context.kept(node, layout)


def _split(context: Context, node: Node, layout: Layout) -> Value | str:
    dim, d = Argument(2, "dim", 0).of(node), layout.dim
    shapes: list[Any] = list(context.shapes[node] or ())
    if not isinstance(dim, int) or not shapes or not all(isinstance(shape, Size) for shape in shapes):
        return f"{describe(node)} splits along a dimension that is not written in the graph"
    if dim % len(shapes[0]) != d:
        return tuple(layout for _ in shapes)
    ends = list(accumulate(shape[d] for shape in shapes))
    parts = np.split(layout.classes, ends[:-1])
    context.relations.divide(*parts)
    return tuple(Layout(d, part) for part in parts)


def _getitem(context: Context, node: Node) -> Value | str:
    """One of several tensors, or basic slices of one."""
    source, index = node.args
    value = context.values.get(source) if isinstance(source, Node) else None
    if isinstance(value, tuple):
        return value[index] if isinstance(index, int) else f"{describe(node)} takes several tensors at once"
    if not isinstance(value, Layout) or not isinstance(source, Node):
        return f"{describe(node)} reads a value without a channel dimension"
    shape, d, C = context.shapes[source], value.dim, len(value.classes)
    assert isinstance(shape, Size)
    steps: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if any(step is Ellipsis for step in steps):
        at = [step is Ellipsis for step in steps].index(True)
        steps[at : at + 1] = [slice(None)] * (len(shape) - len(steps) + 1)
    steps += [slice(None)] * (len(shape) - len(steps))
    if not all(map(_is_plain, steps)) or not all(isinstance(step, slice) for step in steps[: d + 1]):
        return f"{describe(node)} picks channels in a way that is not written in the graph"
    start, stop, step = steps[d].indices(C)
    if step != 1:
        return f"{describe(node)} takes every {step}th channel"
    if stop - start == C:
        return context.kept(node, value)
    context.relations.divide(*np.split(value.classes, [start, stop]))
    return context.kept(node, Layout(d, value.classes[start:stop]))


def _pad(context: Context, node: Node, layout: Layout, shape: Size) -> Layout | str:
    """F.pad; constant channels may be added before and after the others."""
    pad, mode = Argument(1, "pad").of(node), Argument(2, "mode", "constant").of(node)
    if not isinstance(pad, (tuple, list)) or not all(isinstance(p, int) for p in pad):
        return f"{describe(node)} pads by amounts that are not written in the graph"
    sides = {len(shape) - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    before, after = sides.get(layout.dim, (0, 0))
    if (before, after) == (0, 0):
        return context.kept(node, layout)
    if mode != "constant" or before < 0 or after < 0:
        return f"{describe(node)} pads the channels with other than constants"
    front, back = context.relations.new(before), context.relations.new(after)
    context.relations.pad(front, layout.classes, back)
    return context.kept(node, Layout(layout.dim, np.concatenate([front, layout.classes, back])))


def _is_plain(step: object) -> bool:
    """Whether an index is a number, or a slice between numbers."""
    if isinstance(step, slice):
        return all(end is None or isinstance(end, int) for end in (step.start, step.stop, step.step))
    return isinstance(step, int)


def _unlike(node: Node) -> str:
    return f"the output of {describe(node)} does not have the shape of its input"
