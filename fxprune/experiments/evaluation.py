"""Scores a model: top-1 accuracy, and agreement of one model with another."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.errors import EvaluationError
from fxprune.fine_tuning.recorded_zeros import FilledZerosWarning, filled_zeros


class Agreement(NamedTuple):
    """How close a second model comes to a first, over the same images.

    Attributes:
        top1: images on which both give the same class, in percent.
        kl: mean over images of KL(softmax of the first || softmax of the second), in nats.
    """

    top1: float
    kl: float


def evaluate(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> float:
    """Measure top-1 accuracy, batch by batch, in eval mode.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes). Its training flags and its device are
            afterwards what they were.
        loader: batches (images, labels), labels (N,) or (N, 1).
        device: where to compute; None is where the model is.

    Returns:
        Accuracy in percent.

    Raises:
        EvaluationError: no batches, batches without labels, or outputs that are no finite logits.
    """
    right = total = 0
    with _ready(model, device) as place:
        for batch in loader:
            images, labels = _images_and_labels(batch)
            logits = _logits(model, images, place)
            if labels.numel() != len(logits):
                raise EvaluationError(f"{len(logits)} outputs but labels of shape {tuple(labels.shape)}")
            right += int((logits.argmax(1) == labels.reshape(-1).to(place)).sum())
            total += len(logits)
    if total == 0:
        raise EvaluationError("the loader gave no batches; there is nothing to measure accuracy on")
    return 100.0 * right / total


def agreement(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
) -> Agreement:
    """Compare two models' outputs on the same images, batch by batch, in eval mode; no labels needed.

    Args:
        model_a: the reference, as a rule the dense model.
        model_b: the other, as a rule the pruned one.
        loader: batches: a tensor of images, or a tuple, list or dict whose first item it is.
        device: where to compute; None is where each model is.

    Returns:
        (top1, kl): agreement in percent, and mean KL(a || b) in nats, in float64.

    Raises:
        EvaluationError: no batches, outputs that are no finite logits, or different class counts.
    """
    same = total = 0
    divergence = 0.0
    with _ready(model_a, device) as place_a, _ready(model_b, device) as place_b:
        for batch in loader:
            images = first_item(batch)
            logits_a = _logits(model_a, images, place_a).double()
            logits_b = _logits(model_b, images, place_b).to(place_a).double()
            if logits_a.shape != logits_b.shape:
                raise EvaluationError(
                    f"the models' outputs differ in shape: {tuple(logits_a.shape)}, {tuple(logits_b.shape)}"
                )
            log_a, log_b = F.log_softmax(logits_a, 1), F.log_softmax(logits_b, 1)
            divergence += float(F.kl_div(log_b, log_a, reduction="sum", log_target=True))
            same += int((logits_a.argmax(1) == logits_b.argmax(1)).sum())
            total += len(logits_a)
    if total == 0:
        raise EvaluationError("the loader gave no batches; there is nothing to compare the models on")
    return Agreement(100.0 * same / total, divergence / total)


def first_item(batch: Any) -> torch.Tensor:
    """Return a batch's images: the batch itself, or the first item of a tuple, list or dict.

    Raises:
        EvaluationError: that is no tensor.
    """
    first = batch
    if isinstance(batch, Mapping):
        first = next(iter(batch.values()), None)
    elif isinstance(batch, tuple | list):
        first = batch[0] if batch else None
    if not isinstance(first, torch.Tensor):
        raise EvaluationError(
            f"a batch must be a tensor, or a tuple, list or dict that starts with one; found "
            f"{type(batch).__name__} that starts with {type(first).__name__}"
        )
    return first


def _images_and_labels(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    items = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(items, tuple | list) or len(items) < 2 or not isinstance(items[1], torch.Tensor):
        raise EvaluationError(
            f"accuracy needs batches of (images, labels) tensors; found {type(batch).__name__}. "
            "Without labels, agreement() compares two models"
        )
    return first_item(batch), items[1]


def _logits(model: nn.Module, images: torch.Tensor, place: torch.device) -> torch.Tensor:
    output = model(images.to(place))
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise EvaluationError(f"{type(model).__name__} must give logits (N, classes), not {found}")
    if not bool(output.isfinite().all()):
        bad = int((~output.isfinite()).any(1).sum())
        raise EvaluationError(
            f"{type(model).__name__} gives NaN or infinity for {bad} of a batch's {len(output)} images"
        )
    return output


@contextmanager
def _ready(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    if filled := filled_zeros(model):
        warnings.warn(
            f"{type(model).__name__} is scored as it is, not pruned: {filled}", FilledZerosWarning, stacklevel=4
        )
    # Flags are kept module by module: a frozen BatchNorm may be in eval mode inside a training model.
    flags = [(module, module.training) for module in model.modules()]
    tensor = next(model.parameters(), next(model.buffers(), None))
    home = torch.device("cpu") if tensor is None else tensor.device
    place = home if device is None else torch.device(device)
    model.eval()
    try:
        if place != home:
            model.to(place)
        with torch.inference_mode():
            yield place
    finally:
        for module, training in flags:
            module.training = training
        if place != home:
            model.to(home)
