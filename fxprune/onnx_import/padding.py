"""Padding: the operator Pad, and what convolutions and pooling ask for that torch's own do not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fxprune.onnx_import.table import Operation, operator
from fxprune.onnx_import.values import Activation, Size

Sides = list[tuple[Any, Any]]
_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad")
def pad(op: Operation) -> Activation:
    """In all modes; negative numbers cut off."""
    x = op.tensor()
    pads = op.numbers("pads", 1) if "paddings" not in op.attributes else list(op.attributes["paddings"])
    if pads is None:
        op.fail("it does not say by how much")
    axes = op.ints("axes", 3)
    axes = list(range(x.rank)) if axes is None else [x.axis(axis) for axis in axes]
    mode = _MODES.get(op.attribute("mode", "constant"))
    if mode is None:
        op.fail(f"it has the mode {op.attribute('mode', '')!r}, which is none of {', '.join(_MODES)}")
    value = op.attributes.get("value", 0.0)
    if op.input(2) is not None:
        given = op.constant(2)
        value = given.reshape(-1)[0].item() if given is not None and given.size else 0.0
    sides: Sides = [(0, 0)] * x.rank
    for i, axis in enumerate(axes):
        sides[axis] = (pads[i], pads[i + len(axes)])
    if mode == "constant":
        return padded(op, x, sides, value)
    return _mirrored(op, x, sides, mode)


def _mirrored(op: Operation, x: Activation, sides: Sides, mode: str) -> Activation:
    """In modes that torch has for the last axes only: others are moved there one by one."""
    last = next((i for i, pair in enumerate(sides) if pair != (0, 0)), x.rank)
    if 2 <= last and x.rank <= 5:
        result: Activation = op.call(F.pad, x, _flat(sides[2:]), mode)
        return result
    for axis, (before, after) in enumerate(sides):
        if (before, after) == (0, 0):
            continue
        turned = op.method("movedim", x, axis, -1)
        flat = op.method("reshape", turned, (1, -1, op.graph.size(x, axis)))
        grown = op.call(F.pad, flat, (before, after), mode)
        shape = [op.graph.size(turned, i) for i in range(x.rank - 1)]
        x = op.method("movedim", op.method("reshape", grown, (*shape, -1)), -1, axis)
    return x


def padded(op: Operation, x: Activation, sides: Sides, value: Any = 0.0) -> Activation:
    """A tensor with a constant around its last axes.

    Args:
        op: the node.
        x: the tensor.
        sides: (before, after) for each of its last axes.
        value: the constant.
    """
    if all(pair == (0, 0) for pair in sides):
        return x
    result: Activation = op.call(F.pad, x, _flat(sides), "constant", value)
    return result


def cropped(op: Operation, x: Activation, sides: Sides) -> Activation:
    """A tensor without the first and last positions of its last axes."""
    return padded(op, x, [(-before, -after) for before, after in sides])


def stated_sides(pads: Sequence[int] | None, dims: int) -> Sides:
    """The attribute `pads`, all beginnings first, as (before, after) for each dimension."""
    numbers = list(pads) if pads is not None else [0] * (2 * dims)
    return [(numbers[i], numbers[i + dims]) for i in range(dims)]


def same_sides(op: Operation, x: Activation, kernel: Any, stride: Any, dilation: Any, *, lower: bool) -> Sides:
    """What auto_pad adds so that the output has the size of the input over the stride, rounded up."""
    sides: Sides = []
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        reach = d * (k - 1) + 1
        if s == 1:
            total: Any = reach - 1
        else:
            size = op.graph.size(x, i + 2)
            short = (size + (s - 1)) // s * s - s + reach - size
            total = op.call(max, short, 0) if isinstance(short, Size) else max(short, 0)
        half = total // 2
        sides.append((total - half, half) if lower else (half, total - half))
    return sides


def lowest(x: Activation) -> float:
    """What pads the input of a maximum."""
    dtype = x.probes[0].dtype
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _flat(sides: Sides) -> list[Any]:
    """As torch's pad has it, the last axis first, without zeros at the end."""
    flat = [side for pair in reversed(sides) for side in pair]
    while len(flat) > 2 and not isinstance(flat[-1], Size) and flat[-1] == 0 and flat[-2] == 0:
        flat = flat[:-2]
    return flat
