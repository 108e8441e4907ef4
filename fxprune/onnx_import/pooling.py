"""Pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxprune.onnx_import.padding import Sides, lowest, padded, same_sides, stated_sides
from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Size

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_GLOBAL_AVERAGE = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
_GLOBAL_MAX = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}


@operator("MaxPool")
def max_pool(op: Operation) -> Activation:
    """The values; the places of the maxima are refused."""
    if any(op.node.output[1:]):
        op.fail("the places of its maxima are read; only the maxima can be taken")
    x = op.tensor()
    kernel, stride, dilation, sides, ceil = _window(op, x)
    pool = _MAX.get(len(kernel)) or op.fail(f"pooling over {len(kernel)} dimensions")
    if ceil:
        x, sides = padded(op, x, _filled(op, x, kernel, stride, dilation, sides), lowest(x)), [(0, 0)] * len(kernel)
    if _is_torchs(kernel, sides):
        return _called(op, pool, x, kernel, stride, tuple(before for before, _ in sides), dilation)
    return _called(op, pool, padded(op, x, sides, lowest(x)), kernel, stride, (0,) * len(kernel), dilation)


@operator("AveragePool")
def average_pool(op: Operation) -> Activation:
    """With or without the padding in the average."""
    x = op.tensor()
    kernel, stride, dilation, sides, ceil = _window(op, x)
    if any(d != 1 for d in dilation):
        op.fail("torch has no average pooling with dilation")
    pool = _AVERAGE.get(len(kernel)) or op.fail(f"pooling over {len(kernel)} dimensions")
    counts_padding = bool(op.attribute("count_include_pad", 0))
    beyond = _filled(op, x, kernel, stride, dilation, sides) if ceil else sides
    if beyond == sides and _is_torchs(kernel, sides):
        padding = tuple(before for before, _ in sides)
        counts = {} if counts_padding or not any(padding) else {"count_include_pad": False}
        result: Activation = op.call(pool, x, kernel, stride, padding, **counts)
        return result
    zeros = (0,) * len(kernel)
    total = _called(op, pool, padded(op, x, beyond), kernel, stride, zeros)
    # What does not count is told by the average of ones, with zeros where nothing counts.
    ones = op.call(torch.ones_like, op.call(torch.narrow, op.call(torch.narrow, x, 0, 0, 1), 1, 0, 1))
    if counts_padding:
        ones = padded(op, ones, sides, 1.0)
        beyond = [(b[0] - a[0], b[1] - a[1]) for b, a in zip(beyond, sides, strict=True)]
    share = _called(op, pool, padded(op, ones, beyond), kernel, stride, zeros)
    result = op.call(torch.div, total, share)
    return result


@operator("LpPool")
def lp_pool(op: Operation) -> Activation:
    """Of order p, an attribute."""
    x, order = op.tensor(), float(op.attribute("p", 2))
    kernel, stride, dilation, sides, ceil = _window(op, x)
    if ceil or any(d != 1 for d in dilation):
        op.fail("torch has no pooling of this kind with dilation or a rounded-up size")
    powers = padded(op, op.call(torch.pow, op.call(torch.abs, x), order), sides)
    pool = _AVERAGE.get(len(kernel)) or op.fail(f"pooling over {len(kernel)} dimensions")
    mean = _called(op, pool, powers, kernel, stride, (0,) * len(kernel))
    total = op.call(torch.mul, mean, _product(kernel))
    result: Activation = op.call(torch.pow, total, 1 / order)
    return result


@operator("GlobalAveragePool", "GlobalMaxPool")
def global_pool(op: Operation) -> Activation:
    """Over all positions."""
    x = op.tensor()
    found = (_GLOBAL_AVERAGE if op.type == "GlobalAveragePool" else _GLOBAL_MAX).get(x.rank)
    if found is None:
        op.fail(f"its input has {x.rank} dimensions")
    result: Activation = op.call(found, x, 1)
    return result


@operator("GlobalLpPool")
def global_lp_pool(op: Operation) -> Activation:
    """Over all positions."""
    x = op.tensor()
    result: Activation = op.call(torch.norm, x, float(op.attribute("p", 2)), list(range(2, x.rank)), True)
    return result


def _window(op: Operation, x: Activation) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Sides, bool]:
    """Kernel, strides, dilations, padding, and whether the output's size is rounded up."""
    kernel = tuple(op.attribute("kernel_shape", ()))
    dims = len(kernel)
    stride = tuple(op.attribute("strides", [1] * dims))
    dilation = tuple(op.attribute("dilations", [1] * dims))
    auto = op.attribute("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if any(d != 1 for d in dilation):
            op.fail("it has dilation and auto_pad SAME, which engines compute in different ways; write its pads")
        sides = same_sides(op, x, kernel, stride, dilation, lower=auto == "SAME_LOWER")
    else:
        sides = stated_sides(op.attribute("pads", None) if auto == "NOTSET" else None, dims)
    return kernel, stride, dilation, sides, bool(op.attribute("ceil_mode", 0))


def _filled(op: Operation, x: Activation, kernel: Any, stride: Any, dilation: Any, sides: Sides) -> Sides:
    """Padding with as much more at the end as a size that is rounded up needs.

    A window that would begin in the padding at the end is left out, as in torch.
    """
    found: Sides = []
    for i, (k, s, d, (before, after)) in enumerate(zip(kernel, stride, dilation, sides, strict=True)):
        size = op.graph.size(x, i + 2)
        reach = d * (k - 1) + 1
        if s == 1:
            found.append((before, after))
            continue
        if isinstance(size, Size):
            op.fail("it rounds its size up, and the size of its input is open")
        steps = -(-(size + before + after - reach) // s)
        if steps * s >= size + before:
            steps -= 1
        found.append((before, max(after, steps * s + reach - size - before)))
    return found


def _is_torchs(kernel: tuple[int, ...], sides: Sides) -> bool:
    """Whether torch's own pooling can pad so."""
    return all(
        isinstance(a, int) and isinstance(b, int) and b == a and 2 * b <= k
        for k, (b, a) in zip(kernel, sides, strict=True)
    )


def _called(op: Operation, pool: Any, x: Activation, *settings: Any) -> Activation:
    result: Activation = op.call(pool, x, *settings)
    return result


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
