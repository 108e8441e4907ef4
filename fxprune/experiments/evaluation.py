"""Scores a model: top-1 accuracy, and agreement of one model with another."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fxprune.calibration.batches import (
    call_by_name,
    check_values,
    describe,
    inputs_by_name,
    labels_of,
    map_tensors,
    model_inputs,
    tensors_in,
)
from fxprune.calibration.failures import remedy_for, said, stays_as_it_is
from fxprune.calibration.output_score import OutputScore
from fxprune.errors import EvaluationError, EvaluationWarning
from fxprune.fine_tuning.recorded_zeros import FilledZerosWarning, filled_zeros
from fxprune.runtime.devices import checked_device
from fxprune.runtime.surroundings import undisturbed

FEW_OTHERS = 90.0  # percent: where one class has nearly all images, accuracy tells little either way


class Score(NamedTuple):
    """Top-1 accuracy, and what to hold it against.

    Attributes:
        accuracy: in percent.
        images: how many.
        guessing: accuracy of always naming the most frequent class, in percent.
        classes: that the model knows.
    """

    accuracy: float
    images: int
    guessing: float
    classes: int

    @property
    def says_nothing(self) -> bool:
        """Whether guessing would have done as well, within two standard deviations: most likely the wrong data."""
        spread = 100 * math.sqrt(self.guessing / 100 * (1 - self.guessing / 100) / self.images)
        return self.guessing < FEW_OTHERS and self.accuracy <= self.guessing + 2 * spread


class Agreement(NamedTuple):
    """How close a second model comes to a first, over the same images.

    Attributes:
        top1: share of the images on which both give the same class.
        kl: mean over images of KL(softmax of the first || softmax of the second), in nats.
    """

    top1: float
    kl: float


@undisturbed
def evaluate(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> float:
    """Measure top-1 accuracy in percent; see `score`. An `EvaluationWarning` says so where it is no better than guessing."""
    found = score(model, loader, device)
    if found.classes > 1 and found.accuracy * found.classes <= 100:
        warnings.warn(
            f"{type(model).__name__} is right on {found.accuracy:.2f}% of {found.images} images, which guessing one of "
            f"{found.classes} classes would be too: is this the data set that it was trained on, with its preprocessing and "
            "its order of classes?",
            EvaluationWarning,
            stacklevel=3,
        )
    return found.accuracy


def score(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> Score:
    """Measure top-1 accuracy, batch by batch, in eval mode.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes). Its training flags and its device are
            afterwards what they were.
        loader: batches of images and labels in any form, see `fxprune.calibration.batches`; labels (N,) or (N, 1) come
            after the images, or bear a name such as "labels".
        device: where to compute; None is where the model is.

    Returns:
        Accuracy, number of images, and what guessing would give.

    Raises:
        EvaluationError: no batches, batches without labels or with labels that are no classes of the model, a model that
            fails on a batch, or outputs that are no finite logits.
    """
    right = total = known = 0
    classes: Counter[int] = Counter()
    with _ready(model, device) as place:
        for number, batch in enumerate(loader):
            inputs = _inputs(model, batch, number)
            labels = _labels(batch, list(inputs.values()))
            logits = _logits(model, inputs, place, number)
            if labels.numel() != len(logits):
                remedy = remedy_for(model, inputs)
                raise EvaluationError(
                    f"{len(logits)} outputs but labels of shape {tuple(labels.shape)}{remedy and '. '}{remedy}"
                )
            _check_labels(labels, logits.shape[1], number)
            right += int((logits.argmax(1) == labels.reshape(-1).to(place)).sum())
            classes.update(labels.reshape(-1).tolist())
            total += len(logits)
            known = logits.shape[1]
    if total == 0:
        raise EvaluationError("the loader gave no batches; there is nothing to measure accuracy on")
    return Score(100.0 * right / total, total, 100.0 * max(classes.values()) / total, known)


@undisturbed
def agreement(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    *,
    are_classifiers: bool = True,
) -> Agreement:
    """Compare two models' outputs on the same images, batch by batch, in eval mode; no labels needed.

    Args:
        model_a: the reference, as a rule the dense model.
        model_b: the other, as a rule the pruned one.
        loader: batches in any form, see `fxprune.calibration.batches`.
        device: where to compute; None is where each model is.
        are_classifiers: whether this is known; if not, an `EvaluationWarning` says so where outputs do not look like logits.

    Returns:
        (top1, kl): the share of images on which both agree, and mean KL(a || b) in nats, in float64. An `EvaluationWarning`
        says so where the agreement is no better than chance.

    Raises:
        EvaluationError: no batches, a model that fails on one, outputs that are no finite logits, or different class counts.
    """
    seen, classes = OutputScore(), 0
    with _ready(model_a, device) as place_a, _ready(model_b, device) as place_b:
        for number, batch in enumerate(loader):
            logits_a = _logits(model_a, _inputs(model_a, batch, number), place_a, number)
            logits_b = _logits(model_b, _inputs(model_b, batch, number), place_b, number).to(place_a)
            if logits_a.shape != logits_b.shape:
                raise EvaluationError(
                    f"the models' outputs differ in shape: {tuple(logits_a.shape)}, {tuple(logits_b.shape)}"
                )
            seen.update(logits_a, logits_b)
            classes = logits_a.shape[1]
    if seen.share is None or seen.kl is None:
        raise EvaluationError("the loader gave no batches; there is nothing to compare the models on")
    if not are_classifiers and (why := seen.why_no_classes):
        warnings.warn(f"agreement and KL say nothing here: {why}", EvaluationWarning, stacklevel=3)
    if classes > 1 and seen.same * classes <= seen.count:
        warnings.warn(
            f"the two models agree on {seen.same} of {seen.count} images, which guessing one of {classes} classes would do "
            "too: are these images of the data set that they were trained on, and do both have its classes in one order?",
            EvaluationWarning,
            stacklevel=3,
        )
    return Agreement(seen.share, seen.kl)


def _inputs(model: nn.Module, batch: Any, number: int) -> dict[str, Any]:
    """The model's inputs in a batch, by name."""
    inputs = inputs_by_name(batch, model_inputs(model), f"batch {number}", error=EvaluationError)
    check_values(inputs.values(), f"batch {number}", error=EvaluationError)
    return inputs


def _labels(batch: Any, inputs: list[Any]) -> torch.Tensor:
    labels = labels_of(batch, inputs)
    if labels is None:
        raise EvaluationError(
            f"accuracy needs batches of (images, labels) tensors; found {describe(batch)}. "
            "Without labels, agreement() compares two models"
        )
    return labels


def _check_labels(labels: torch.Tensor, classes: int, number: int) -> None:
    least, most = (int(x) for x in labels.double().aminmax())
    if least < 0 or most >= classes:
        raise EvaluationError(
            f"batch {number} has the label {least if least < 0 else most}, and the model has {classes} classes, 0 to "
            f"{classes - 1}: this is another data set than the model's, or its labels count from 1"
        )


def _logits(model: nn.Module, inputs: Mapping[str, Any], place: torch.device, number: int) -> torch.Tensor:
    placed = map_tensors(dict(inputs), lambda x: x.to(place))
    try:
        output = call_by_name(model, placed)
    except Exception as error:
        if stays_as_it_is(error):
            raise
        shapes = [tuple(x.shape) for x in tensors_in(placed)]
        remedy = remedy_for(model, placed, error)
        raise EvaluationError(
            f"{type(model).__name__} failed on batch {number}, input shapes {shapes}: {said(error)}{remedy and '. '}{remedy}"
        ) from error
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        remedy = remedy_for(model, placed)
        raise EvaluationError(
            f"{type(model).__name__} must give logits (N, classes), not {found}{remedy and '. '}{remedy}"
        )
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
    place = home if device is None else checked_device(device)
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
