"""`x[:, 1:3] = value` and `x[:, 1:3].zero_()` without a side effect: a new tensor that has the value at that place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The others have a namesake without the underscore.
_REPLACING: dict[str, Callable[..., Any]] = {
    "zero_": torch.zeros_like,
    "fill_": torch.full_like,
}


def is_block(index: Any) -> bool:
    """Whether an index names a block of a tensor, so that what it gives is a view."""
    steps = index if isinstance(index, tuple) else (index,)
    return all(isinstance(step, (int, slice, type(Ellipsis))) and not isinstance(step, bool) for step in steps)


def writes_in_place(method: str) -> bool:
    """Whether a method of tensors changes its tensor, and has a counterpart that gives a new one."""
    name = method.removesuffix("_")
    return (
        method.endswith("_")
        and not name.endswith("_")
        and (method in (*_REPLACING, "copy_") or callable(getattr(torch.Tensor, name, None)))
    )


def written(x: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """What a tensor, or a proxy of one, is after a method that writes into it."""
    if method == "copy_":
        source = args[0] if args else kwargs["src"]
        return torch.zeros_like(x) + source
    if method in _REPLACING:
        return _REPLACING[method](x, *args, **kwargs)
    return getattr(x, method.removesuffix("_"))(*args, **kwargs)


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
    if not is_block(index):
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
