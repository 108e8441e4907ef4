"""What a loader may yield."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import Dataset, IterableDataset

from fxprune.errors import CalibrationError

EMPTY = "the calibration loader gave no batches; pass a non-empty iterable (a generator can be read only once)"


def first_item(batch: Any, number: int = 0) -> Any:
    """The input in a batch: the batch itself, or the first item of a tuple, list or dict."""
    while isinstance(batch, (tuple, list, dict)):
        if not batch:
            raise CalibrationError(f"calibration batch {number} is an empty {type(batch).__name__}")
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def checked(x: Any, number: int) -> Tensor:
    """The input of batch `number`, or an error if it cannot be calibrated on.

    Raises:
        CalibrationError: if it is no tensor, is empty, or holds NaN or infinite values.
    """
    if not isinstance(x, Tensor):
        raise CalibrationError(
            f"calibration batch {number} is a {type(x).__name__}; expected a tensor, or a tuple, list or dict whose "
            "first item is one"
        )
    if x.dim() == 0 or x.shape[0] == 0:
        raise CalibrationError(f"calibration batch {number} is empty: shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise CalibrationError(f"calibration batch {number} holds NaN or infinite values; check its preprocessing")
    return x


def input_tensor(batch: Any, number: int = 0) -> Tensor:
    """The checked input in a batch."""
    return checked(first_item(batch, number), number)


def assign(
    placeholders: Sequence[Node], batch: Any, number: int = 0, *, device: torch.device | None = None
) -> dict[Node, Any]:
    """The value of every input of a graph in one batch: a checked tensor, on a device if given, or the input's own default.

    Raises:
        CalibrationError: if the batch cannot be used, or leaves out an input that has no default.
    """
    if not placeholders:
        return {}
    if isinstance(batch, dict) and placeholders[0].target in batch:
        given = {node: batch[node.target] for node in placeholders if node.target in batch}
    else:
        given = {placeholders[0]: first_item(batch, number)}
    values: dict[Node, Any] = {}
    for node in placeholders:
        if node in given:
            values[node] = checked(given[node], number).to(device)
        elif node.args:
            values[node] = node.args[0]
        else:
            raise CalibrationError(
                f"the model has an input {node.target!r} that calibration batch {number} does not give; "
                "yield dicts with the names of the model's inputs as keys"
            )
    return values


def channels_last(x: Any) -> Any:
    """A batch of images with the channels last in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x


def count_images(batch: Any) -> int:
    """How many images a batch holds, by its first tensor; what is wrong with a batch is said where it is used."""
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 1)


def check_loader(loader: Any) -> None:
    """Raise CalibrationError for what can be iterated over, perhaps, but does not give batches."""
    if isinstance(loader, Tensor):
        raise CalibrationError(
            f"the calibration loader is a tensor of shape {tuple(loader.shape)}; give its batches, such as images.split(128)"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise CalibrationError(
            f"the calibration loader is a dataset ({type(loader).__name__}), which gives single images; "
            "wrap it in torch.utils.data.DataLoader(dataset, batch_size=128)"
        )
    if isinstance(loader, (str, bytes, dict)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise CalibrationError(
            f"the calibration loader is of type {type(loader).__name__}; expected an iterable of batches, "
            "such as a DataLoader or a list of tensors"
        )


def peek(loader: Iterable[Any], images: int = 1) -> tuple[list[Any], Iterable[Any]]:
    """The first batches, with so many images if there are, and all batches; the loader is started once only.

    Raises:
        CalibrationError: if there are none, one cannot be used, or this is not a loader.
    """
    check_loader(loader)
    rest, head, seen = iter(loader), [], 0
    for batch in rest:
        head.append(batch)
        seen += count_images(batch)
        if seen >= images:
            break
    if not head:
        raise CalibrationError(EMPTY)
    return head, loader if isinstance(loader, (list, tuple)) else chain(head, rest)


def first_images(loader: Iterable[Any], images: int) -> list[Any]:
    """Batches of together so many images, if there are so many: of the last one, the first images only."""
    head, _ = peek(loader, images)
    surplus, count = sum(map(count_images, head)) - images, count_images(head[-1])
    if surplus > 0:
        head[-1] = tree_map_only(Tensor, lambda x: x[:-surplus] if x.dim() and len(x) == count else x, head[-1])
    return head


def read_all(loader: Iterable[Any]) -> Sequence[Any]:
    """All batches of a loader in a list, for what reads them more than once.

    Raises:
        CalibrationError: if there are none.
    """
    check_loader(loader)
    batches = loader if isinstance(loader, (list, tuple)) else list(loader)
    if not batches:
        raise CalibrationError(EMPTY)
    return batches
