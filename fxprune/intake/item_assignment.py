"""`x[:, 1:3] = value` without a side effect: a new tensor that has the value at that place."""

from __future__ import annotations

from typing import Any

import torch


def with_item(x: Any, index: Any, value: Any, dims: int) -> Any:
    """A tensor, or a proxy of one, with a value at a basic index: whole numbers, slices and an ellipsis.

    Args:
        x: the tensor before.
        index: what stands in the brackets.
        value: a number, or a tensor that broadcasts to `x[index]`.
        dims: the number of dimensions of `x`.

    Raises:
        TypeError: for masks, lists of indices and None, which name no block of the tensor.
    """
    steps = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(step, (int, slice, type(Ellipsis))) or isinstance(step, bool) for step in steps):
        raise TypeError("an assignment to items at computed places; only x[1], x[:, 2:4] and the like can be traced")
    if Ellipsis in steps:
        at = steps.index(Ellipsis)
        steps[at : at + 1] = [slice(None)] * (dims - len(steps) + 1)
    return _placed(x, steps, 0, value)


def _placed(x: Any, steps: list[Any], dim: int, value: Any) -> Any:
    """`x` with `value` where `steps` lead, of which the first is for dimension `dim`."""
    while steps and steps[0] == slice(None):
        steps, dim = steps[1:], dim + 1
    if not steps:
        return torch.zeros_like(x) + value
    step, rest = steps[0], steps[1:]
    if isinstance(step, int):
        return torch.select_scatter(x, _placed(x.select(dim, step), rest, dim, value), dim, step)
    part = x[tuple([slice(None)] * dim + [step])]
    return torch.slice_scatter(x, _placed(part, rest, dim + 1, value), dim, step.start, step.stop, step.step or 1)
