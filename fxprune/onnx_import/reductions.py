"""Sums, means and other reductions, the largest numbers and where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Size

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
}  # fmt: skip


@operator(*_REDUCTIONS, "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum")
def reduce(op: Operation) -> Activation:
    """Over the axes named, or all; axes are an attribute in old operator sets and an input in new ones."""
    x, axes = op.tensor(), op.ints("axes", 1)
    if not axes and op.attribute("noop_with_empty_axes", 0):
        if op.type in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"):
            op.fail("it has no axes and noop_with_empty_axes")
        return x
    dims = sorted({x.axis(axis) for axis in axes}) if axes else list(range(x.rank))
    keep = bool(op.attribute("keepdims", 1))
    dtype = x.probes[0].dtype
    if op.type == "ReduceMean" and not dtype.is_floating_point:
        op.fail("the mean of whole numbers")
    if op.type in ("ReduceL1", "ReduceLogSum", "ReduceSumSquare", "ReduceL2"):
        first = {"ReduceL1": torch.abs, "ReduceSumSquare": torch.square, "ReduceL2": torch.square}.get(op.type)
        prepared = x if first is None else op.call(first, x)
        total = op.call(torch.sum, prepared, dims, keep)
        finish = {"ReduceLogSum": torch.log, "ReduceL2": torch.sqrt}.get(op.type)
        made: Activation = total if finish is None else op.call(finish, total)
    elif op.type == "ReduceProd":
        made = x
        for dim in reversed(dims):
            made = op.call(torch.prod, made, dim, keep)
    else:
        made = op.call(_REDUCTIONS[op.type], x, dims, keep)
    return made if made.probes[0].dtype == dtype else op.method("to", made, dtype)


@operator("ArgMax", "ArgMin")
def arg(op: Operation) -> Activation:
    """Where the largest or smallest number is."""
    if op.attribute("select_last_index", 0):
        op.fail("of equal numbers it asks for the last; torch gives the first")
    function = torch.argmax if op.type == "ArgMax" else torch.argmin
    x = op.tensor()
    result: Activation = op.call(function, x, x.axis(op.attribute("axis", 0)), bool(op.attribute("keepdims", 1)))
    return result


@operator("TopK")
def top_k(op: Operation) -> list[Any]:
    """The largest or smallest numbers, and their places."""
    x = op.tensor()
    k = (op.numbers("k", 1) or [1])[0]
    if not isinstance(k, Size):
        k = int(k)
    largest, ordered = bool(op.attribute("largest", 1)), bool(op.attribute("sorted", 1))
    found: list[Any] = op.call(torch.topk, x, k, x.axis(op.attribute("axis", -1)), largest, ordered)
    return found


@operator("CumSum")
def cumsum(op: Operation) -> Activation:
    """Running sums along an axis."""
    x, axis = op.tensor(), op.constant(1)
    if axis is None:
        op.fail("it names no axis")
    dim = x.axis(int(axis.reshape(-1)[0]))
    backwards = bool(op.attribute("reverse", 0))
    turned = op.call(torch.flip, x, [dim]) if backwards else x
    total = op.call(torch.cumsum, turned, dim)
    if op.attribute("exclusive", 0):
        total = op.call(torch.sub, total, turned)
    result: Activation = op.call(torch.flip, total, [dim]) if backwards else total
    return result
