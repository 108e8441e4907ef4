"""Validates an ONNX file against the model that it came from: weights, patterns, and outputs in onnxruntime."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from fxprune.errors import ValidationError
from fxprune.export.inputs_outputs import Batch, input_names, read_batch
from fxprune.export.layer_check import CONSTANT, FOLDED, UNREAD, check_layers
from fxprune.export.model_layers import (
    UNCHECKED,
    is_read,
    layers_without_input,
    model_layers,
    noting_calls,
    prune_report,
    pruned_without_report,
)
from fxprune.export.onnx_file import OnnxFile, initializer_arrays, measure_size, read_onnx
from fxprune.export.onnx_report import LayerCheck, OnnxReport
from fxprune.export.parity import coarsest_dtype, compare, evaluating, require_parity
from fxprune.export.session import open_session
from fxprune.export.weight_uses import WeightUse, distinct_weights, graph_weights
from fxprune.fine_tuning.recorded_zeros import filled_zeros
from fxprune.runtime.surroundings import undisturbed

PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@undisturbed
def validate_onnx(model: nn.Module, path: str | Path, loader: Iterable[Any], *, progress: bool = True) -> OnnxReport:
    """Check an ONNX file against a model on a whole data set.

    Every layer's weight in the file must be the model's and satisfy the pattern that the model was pruned to, along the
    axis that the file's operation sums over; the outputs in onnxruntime must agree with the model's within a tolerance
    set by the coarser of the number types of file and model (see `fxprune.export.parity.TOLERANCES`).

    Args:
        model: what `fxprune.compile` returned, or any other module; it runs in eval mode on its own device.
        path: the file.
        loader: iterable of batches in any form (`fxprune.calibration.batches`). Integer labels that come after the
            inputs, or bear such a name, are used to measure the accuracy of both.
        progress: show a progress bar.

    Returns:
        The report: `print` it.

    Raises:
        ValidationError: anything is wrong; the message names the layer, what was found and what to do.
    """
    if isinstance(path, nn.Module) or not isinstance(model, nn.Module):
        raise ValidationError(
            "validate_onnx takes the model first, as export_onnx does: validate_onnx(model, path, loader); "
            f"found {type(model).__name__} and {type(path).__name__}"
        )
    path = Path(path)
    file = read_onnx(path)
    names = input_names(model, len(file.inputs))
    console = Console(stderr=True)
    batches = track(loader, "validating", console=console, transient=True, disable=not progress)
    report = check_file(file, path, model, (read_batch(batch, names, i) for i, batch in enumerate(batches)))
    warn_of_notes(report, stacklevel=3)
    return report


def warn_of_notes(report: OnnxReport, *, stacklevel: int) -> None:
    """A UserWarning where no pattern was checked on a model that was pruned."""
    for note in report.notes:
        if note.startswith(UNCHECKED):
            warnings.warn(note, UserWarning, stacklevel=stacklevel)


def check_file(file: OnnxFile, stored: Path, model: nn.Module, batches: Iterator[Batch]) -> OnnxReport:
    """All checks of one file.

    Args:
        file: as read; `file.path` is used in messages and in the report.
        stored: where the file is now.
        model: what it should compute.
        batches: what to run; the first also shows which layers the model runs.

    Raises:
        ValidationError: anything is wrong.
    """
    first = next(batches, None)
    if first is None:
        raise ValidationError(
            "the loader gave no batches to validate on; pass a non-empty iterable (a generator runs only once)"
        )
    if filled := filled_zeros(model):
        raise ValidationError(f"{file.path} cannot be checked against this model: {filled}")
    uses = graph_weights(file.model).uses
    dtype = weight_dtype(uses)
    called: set[nn.Module] = set()
    with evaluating(model) as run:
        unfed = layers_without_input(model)
        with noting_calls(model, called):
            run(first.inputs)
        layers = check_layers(
            model_layers(model, called),
            uses,
            file.path,
            dtype,
            lambda name: CONSTANT if name in unfed else "" if is_read(model, name, run, first.inputs) else UNREAD,
        )
        session = open_session(stored)
        parity = compare(run, session, file, itertools.chain([first], batches), dtype=coarsest_dtype(dtype, model))
    require_parity(parity, file.path, lambda: _other_differences(model, file, layers))
    stored_weights = distinct_weights(uses)
    report = prune_report(model)
    if report is not None and report.why_no_classes and parity.accuracy_model is None:
        parity = replace(parity, agreement=None)
    return OnnxReport(
        path=str(file.path),
        opset=file.opset,
        precision=PRECISIONS.get(dtype, dtype),
        inputs=tuple(map(str, file.inputs)),
        outputs=tuple(map(str, file.outputs)),
        parity=parity,
        layers=layers,
        size=replace(
            measure_size(stored),
            weights=sum(weight.numel() for weight in stored_weights),
            zeros=sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in stored_weights),
        ),
        pattern=report.pattern if report else "",
        method=report.method if report else "",
        sparse_initializers=file.sparse,
        notes=(f"{unchecked}.",) if (unchecked := pruned_without_report(model)) else (),
    )


def weight_dtype(uses: tuple[WeightUse, ...]) -> str:
    """The number type that most weights are stored in."""
    counts = Counter(use.dtype for use in uses)
    return counts.most_common(1)[0][0] if counts else "float32"


def _other_differences(model: nn.Module, file: OnnxFile, layers: tuple[LayerCheck, ...]) -> str:
    """Which biases and buffers differ from the model's, in words; only read when the outputs differ."""
    arrays = initializer_arrays(file.model.graph)
    rightly = {f"{layer.name}.bias" for layer in layers if FOLDED in layer.note}
    different = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in arrays or tensor.dim() > 1 or name in rightly:
            continue
        wanted, found = tensor.detach().cpu().double().numpy(), arrays[name].astype(np.float64)
        if wanted.shape != found.shape or not np.allclose(found, wanted, rtol=2e-3, atol=1e-6):
            different.append(name)
    if not different:
        return ""
    return (
        f"The weights are the model's, but these tensors of the file are not: {', '.join(different[:5])}. "
        "Export the model again; something changed the file after its export."
    )
