"""Reads batches and example inputs of any common form, and names a model's outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExportError, ValidationError

LABEL_KEYS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class Batch:
    """The inputs of one model call, and the labels (N, ...) where the loader gives them."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        """Samples in the batch: the first axis of the first input."""
        return len(self.inputs[0]) if self.inputs[0].dim() else 1


def input_names(model: nn.Module, count: int | None = None) -> tuple[str, ...]:
    """Names of forward's positional parameters: the first `count`, or those without a default."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL and count is not None:
            names.extend(f"input_{i}" for i in range(len(names), count))
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            if count is None and parameter.default is not parameter.empty:
                break
            names.append(parameter.name)
    return tuple(names if count is None else names[:count])


def example_tensors(example_inputs: Any, model: nn.Module) -> tuple[Tensor, ...]:
    """The positional inputs in `example_inputs`: a tensor, a tuple or list of tensors, or a dict of them by name.

    A batch (images, labels) of a data loader will do too: what forward takes no more of is left out.

    Raises:
        ExportError: there is no tensor, or too few of them.
    """
    needed = input_names(model)
    if isinstance(example_inputs, Tensor):
        found = [example_inputs]
    elif isinstance(example_inputs, Mapping):
        named = [example_inputs[name] for name in input_names(model, len(example_inputs)) if name in example_inputs]
        found = named if len(named) >= max(1, len(needed)) else list(example_inputs.values())
    elif isinstance(example_inputs, list | tuple):
        found = list(example_inputs)
    else:
        found = []
    found = found[: len(input_names(model, len(found)))]
    if not found or len(found) < len(needed) or not all(isinstance(value, Tensor) for value in found):
        raise ExportError(
            f"example_inputs must give a tensor for each input of {type(model).__name__} ({', '.join(needed)}); "
            f"found {_describe(example_inputs)}"
        )
    return tuple(found)


def read_batch(batch: Any, names: Sequence[str], number: int) -> Batch:
    """Split one batch of a loader into the inputs called `names` and labels.

    Args:
        batch: a tensor; a tuple or list that starts with the inputs, with the labels next; or a dict.
        names: the model's inputs, in order.
        number: position of the batch in the loader, for messages.

    Raises:
        ValidationError: the batch lacks an input, or an input is no tensor, or empty.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        by_name = all(name in batch for name in names)
        values = [batch[name] for name in names] if by_name else list(batch.values())
        labels = next((batch[key] for key in LABEL_KEYS if key in batch and key not in names), None)
        if not by_name and labels is None and len(values) > len(names):
            labels = values[len(names)]
    else:
        values = list(batch) if isinstance(batch, list | tuple) else [batch]
        labels = values[len(names)] if len(values) > len(names) else None
    inputs = tuple(values[: len(names)])
    if len(inputs) < len(names) or not all(isinstance(value, Tensor) and value.numel() for value in inputs):
        raise ValidationError(
            f"batch {number} of the loader must give a non-empty tensor for each input ({', '.join(names)}); "
            f"found {_describe(batch)}"
        )
    return Batch(inputs, labels if isinstance(labels, Tensor) else None)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """All tensors in a model's output by name, in order: a dict's keys, a named tuple's fields, or output_0, output_1.

    Nested names are joined by "_"; a single tensor is called "output"; None is left out.

    Raises:
        ExportError: an output is no tensor, or there is none.
    """
    found = dict(_walk(output, ""))
    if not found:
        raise ExportError(f"the model returns no tensor, only {_describe(output)}")
    return found


def _walk(output: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if output is None:
        return
    if isinstance(output, Tensor):
        yield prefix or "output", output
        return
    items: list[tuple[Any, Any]]
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = list(zip(output._fields, output, strict=True))
    elif isinstance(output, tuple | list):
        prefix = prefix or "output"
        items = list(enumerate(output))
    else:
        raise ExportError(
            f"the model's output {prefix or 'value'!r} is {_describe(output)}; "
            "ONNX files hold tensors, in tuples, lists or dicts"
        )
    for key, value in items:
        yield from _walk(value, f"{prefix}_{key}" if prefix else str(key))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "a dict of " + (", ".join(f"{key}: {_describe(item)}" for key, item in value.items()) or "nothing")
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of " + (", ".join(_describe(item) for item in value) or "nothing")
    return type(value).__name__


def other_batch(inputs: tuple[Tensor, ...], *, same_size: bool) -> tuple[Tensor, ...]:
    """A second batch made from the first, of another size unless `same_size`, and with other numbers in it."""
    size = len(inputs[0]) if inputs[0].dim() else 1
    return tuple(_other(x, size, same_size) if x.dim() and len(x) == size else x for x in inputs)


def _other(x: Tensor, size: int, same_size: bool) -> Tensor:
    flipped = x.flip(-1) if x.is_floating_point() else x
    if same_size:
        return flipped
    if size > 1:
        return x.flip(0)[: size // 2]
    return torch.cat([x, flipped, x / 2 if x.is_floating_point() else x])
