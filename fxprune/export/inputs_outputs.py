"""Reads batches and example inputs of any common form, and names a model's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import (
    ModelInput,
    check_values,
    describe,
    inputs_by_name,
    labels_of,
    model_inputs,
    without_trailing_labels,
)
from fxprune.errors import ExportError, ValidationError


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
    """Names of the model's inputs in order: the first `count`, or those without a default."""
    inputs = model_inputs(model)
    if count is None:
        return tuple(x.name for x in inputs if x.required)
    names = [x.name for x in inputs if not x.stars]
    if any(x.stars == 1 for x in inputs):
        names += [f"input_{i}" for i in range(len(names), count)]
    return tuple(names[:count])


def example_tensors(example_inputs: Any, model: nn.Module) -> tuple[Tensor, ...]:
    """The positional inputs in `example_inputs`, which may be in any form that a batch of a loader may have.

    Of a batch (images, labels) the images are taken, unless the model needs a second input. Other tensors of a tuple are for
    the inputs with a default.

    Raises:
        ExportError: there is no tensor, or too few of them.
    """
    inputs = model_inputs(model)
    takes = ", ".join(x.name for x in inputs if x.required or x.stars)
    problem = (
        f"example_inputs must give a tensor for each input of {type(model).__name__} ({takes}); "
        f"found {describe(example_inputs)}"
    )
    try:
        given = inputs_by_name(example_inputs, inputs, "example_inputs", error=ExportError)
        check_values(given.values(), "example_inputs", error=ExportError)
    except ExportError as error:
        raise ExportError(f"{problem}. {error}") from error
    if isinstance(example_inputs, (tuple, list)):
        optional = [x.name for x in inputs if not x.stars and x.name not in given]
        more = without_trailing_labels(list(example_inputs))[len(given) :]
        given |= dict(zip(optional, more, strict=False))
    found: list[Any] = []
    for x in inputs:
        if x.name not in given:
            if not x.stars:
                break  # What comes after it cannot be given by position.
            continue
        if x.stars == 2 and not x.keys:
            continue  # Nothing is read of it.
        found += given[x.name] if x.stars == 1 else [given[x.name]]
    if not found or not all(isinstance(value, Tensor) for value in found):
        raise ExportError(problem)
    return tuple(found)


def read_batch(batch: Any, names: Sequence[str], number: int) -> Batch:
    """Split one batch of a loader into the inputs called `names` and labels.

    Args:
        batch: in any form, see `fxprune.calibration.batches`; labels may come after the inputs, or bear a name of their own.
        names: the model's inputs, in order.
        number: position of the batch in the loader, for messages.

    Raises:
        ValidationError: the batch lacks an input, or an input is no tensor, or empty.
    """
    inputs = [ModelInput(name) for name in names]
    try:
        given = inputs_by_name(batch, inputs, f"batch {number}", error=ValidationError)
        check_values(given.values(), f"batch {number}", error=ValidationError)
    except ValidationError as error:
        raise ValidationError(f"{_problem(batch, names, number)}. {error}") from error
    values = tuple(given[name] for name in names)
    if not all(isinstance(value, Tensor) and value.numel() for value in values):
        raise ValidationError(_problem(batch, names, number))
    return Batch(values, labels_of(batch, values))


def _problem(batch: Any, names: Sequence[str], number: int) -> str:
    return (
        f"batch {number} of the loader must give a non-empty tensor for each input ({', '.join(names)}); "
        f"found {describe(batch)}"
    )


def named_outputs(output: Any) -> dict[str, Tensor]:
    """All tensors in a model's output by name, in order: a dict's keys, a named tuple's fields, or output_0, output_1.

    Nested names are joined by "_"; a single tensor is called "output"; None is left out.

    Raises:
        ExportError: an output is no tensor, or there is none.
    """
    found = dict(_walk(output, ""))
    if not found:
        raise ExportError(f"the model returns no tensor, only {describe(output)}")
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
            f"the model's output {prefix or 'value'!r} is {describe(output)}; "
            "ONNX files hold tensors, in tuples, lists or dicts"
        )
    for key, value in items:
        yield from _walk(value, f"{prefix}_{key}" if prefix else str(key))


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
