"""Runs an ONNX file in onnxruntime beside the model that it came from, on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import ValidationError
from fxprune.export.inputs_outputs import Batch, named_outputs
from fxprune.export.onnx_file import OnnxFile
from fxprune.export.session import run_session
from fxprune.graph import call_quietly
from fxprune.runtime.precision import full_precision

if TYPE_CHECKING:
    import onnxruntime

# Largest difference allowed, relative to the largest output, by the coarser of the number types of file and model.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}

# Outputs that are all smaller than this are compared with this instead of their largest: float16 is coarse below 2^-14.
_FLOORS = {"float16": 2**-14}
# onnxruntime's Sigmoid is off by up to 1.4e-7, however small its value; where a detector sees nothing, all values are.
_SIGMOID_FLOOR = 2**-8


@dataclass(frozen=True)
class Parity:
    """How a file's outputs compare with the model's.

    Attributes:
        samples: how many were run.
        batch_sizes: the sizes of batch that were run, ascending.
        max_abs: largest absolute difference of any output number.
        max_rel: largest absolute difference of an output tensor over its largest absolute value in the batch; for
            integer outputs, the share of numbers that differ.
        tolerance: what `max_rel` may be at most.
        agreement: share of positions where the first output (N, classes, ...) has its maximum in the same class; None
            if the first output has no class axis, or the model's report says that it puts out no logits.
        accuracy_model: percent right of the model where labels are given, else None.
        accuracy_onnx: the same of the file.
        worst_sample: index, counted over all batches, of the sample with the largest relative difference.
        worst_output: name of the output where that is.
    """

    samples: int
    batch_sizes: tuple[int, ...]
    max_abs: float
    max_rel: float
    tolerance: float
    agreement: float | None
    accuracy_model: float | None
    accuracy_onnx: float | None
    worst_sample: int
    worst_output: str


@dataclass
class _Tally:
    """Running totals of `compare`."""

    samples: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst_sample: int = 0
    worst_output: str = ""
    same: int = 0
    classified: int = 0
    right_model: int = 0
    right_onnx: int = 0
    labelled: int = 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[Callable[[tuple[Tensor, ...]], dict[str, Tensor]]]:
    """Yield the model as a function from inputs to named outputs on the CPU; eval mode inside, flags restored after.

    TF32 is off inside: with its 10 bits a model on a GPU would not agree with the file.
    """
    flags = [(module, module.training) for module in model.modules()]
    first = next((p for p in model.parameters() if p.is_floating_point()), None)

    def run(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if first is not None:
            inputs = tuple(x.to(first.device, first.dtype if x.is_floating_point() else x.dtype) for x in inputs)
        return {name: value.cpu() for name, value in named_outputs(call_quietly(model, *inputs)).items()}

    try:
        model.eval()
    except NotImplementedError:  # A graph of torch.export's has one mode for ever.
        flags = []
    try:
        with torch.no_grad(), full_precision():
            yield run
    finally:
        for module, training in flags:
            module.training = training


def coarsest_dtype(file: str, model: nn.Module) -> str:
    """The coarsest number type of a file's weights and a model's parameters and buffers: what their outputs agree to."""
    tensors = [*model.parameters(), *model.buffers()]
    found = {file, *(str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point())}
    return max((dtype for dtype in found if dtype in TOLERANCES), key=list(TOLERANCES).index, default="float32")


def compare(
    run_model: Callable[[tuple[Tensor, ...]], dict[str, Tensor]],
    session: onnxruntime.InferenceSession,
    file: OnnxFile,
    batches: Iterable[Batch],
    *,
    dtype: str = "float32",
) -> Parity:
    """Run model and file on every batch.

    Args:
        run_model: from `evaluating`.
        session: the file in onnxruntime.
        file: the same file, as read.
        batches: what to run.
        dtype: from `coarsest_dtype`; sets the tolerance.

    Raises:
        ValidationError: outputs differ in number or shape, or hold NaN or infinite values, or there are no batches. A
            difference above the tolerance does not raise here: see `require_parity`.
    """
    tally = _Tally()
    sigmoids = {name for node in file.model.graph.node if node.op_type == "Sigmoid" for name in node.output}
    sizes: set[int] = set()
    for number, batch in enumerate(batches):
        expected = run_model(batch.inputs)
        found = run_session(session, file, batch, number)
        if len(found) != len(expected):
            raise ValidationError(
                f"{file.path} has {len(found)} outputs but the model has {len(expected)} ({', '.join(expected)}); "
                "is this the file of another model?"
            )
        for (name, wanted), port, got in zip(expected.items(), file.outputs, found, strict=True):
            floor = _SIGMOID_FLOOR if port.name in sigmoids else 1e-12
            _add(tally, name, wanted, _as_tensor(got), batch.size, file, max(floor, _FLOORS.get(dtype, 0.0)))
        _add_classes(tally, next(iter(expected.values())), _as_tensor(found[0]), batch.labels)
        tally.samples += batch.size
        sizes.add(batch.size)
    if not sizes:
        raise ValidationError(
            "the loader gave no batches to validate on; pass a non-empty iterable (a generator runs only once)"
        )
    return Parity(
        samples=tally.samples,
        batch_sizes=tuple(sorted(sizes)),
        max_abs=tally.max_abs,
        max_rel=tally.max_rel,
        tolerance=TOLERANCES.get(dtype, TOLERANCES["float32"]),
        agreement=tally.same / tally.classified if tally.classified else None,
        accuracy_model=_percent(tally.right_model, tally.labelled),
        accuracy_onnx=_percent(tally.right_onnx, tally.labelled),
        worst_sample=tally.worst_sample,
        worst_output=tally.worst_output,
    )


def require_parity(parity: Parity, path: Path, find_cause: Callable[[], str] = str) -> None:
    """Raise ValidationError if the outputs differ by more than the tolerance; `find_cause` says why, or ""."""
    if parity.max_rel > parity.tolerance:
        raise ValidationError(
            f"{path}: output {parity.worst_output!r} in onnxruntime differs from the model's by {parity.max_abs:.3g}, "
            f"{parity.max_rel:.2g} of the largest output ({parity.tolerance:g} is allowed), most at sample "
            f"{parity.worst_sample} of {parity.samples}. "
            f"{find_cause() or 'All layer weights in the file are right, so its graph is not; export the model again.'}"
        )


def _add(tally: _Tally, name: str, wanted: Tensor, got: Tensor, size: int, file: OnnxFile, floor: float) -> None:
    """Add one output of one batch to the totals."""
    if wanted.shape != got.shape:
        raise ValidationError(
            f"{file.path}: output {name!r} has shape {tuple(got.shape)} in onnxruntime "
            f"but {tuple(wanted.shape)} in the model; is this the file of another model?"
        )
    if not wanted.numel():
        return
    difference = (wanted.double() - got.double()).abs()
    if not bool(difference.isfinite().all()):
        first = (
            int((~difference.isfinite()).reshape(len(difference), -1).any(1).nonzero()[0]) if difference.dim() else 0
        )
        culprit = "the file in onnxruntime" if bool(wanted.double().isfinite().all()) else "the model itself"
        raise ValidationError(
            f"{file.path}: {culprit} gives NaN or infinity in output {name!r} at sample {tally.samples + first}; "
            "check the weights, or export in fp32 if the values are too large for float16"
        )
    worst = float(difference.max())
    if wanted.is_floating_point():
        relative = worst / max(float(wanted.double().abs().max()), floor)
    else:
        relative = float((difference > 0).double().mean())
    tally.max_abs = max(tally.max_abs, worst)
    if relative > tally.max_rel or not tally.worst_output:
        by_sample = difference.dim() and len(difference) == size
        index = int(difference.reshape(size, -1).amax(1).argmax()) if by_sample else 0
        tally.max_rel, tally.worst_output, tally.worst_sample = relative, name, tally.samples + index


def _add_classes(tally: _Tally, wanted: Tensor, got: Tensor, labels: Tensor | None) -> None:
    """Add agreement and accuracy of one batch."""
    if wanted.dim() < 2 or wanted.shape[1] < 2 or not wanted.is_floating_point():
        return
    class_model, class_onnx = wanted.argmax(1), got.argmax(1)
    tally.same += int((class_model == class_onnx).sum())
    tally.classified += class_model.numel()
    if labels is None or labels.is_floating_point() or labels.numel() != class_model.numel():
        return
    labels = labels.cpu().reshape(class_model.shape)
    tally.right_model += int((class_model == labels).sum())
    tally.right_onnx += int((class_onnx == labels).sum())
    tally.labelled += labels.numel()


def _as_tensor(output: object) -> Tensor:
    """One of onnxruntime's outputs; number types that torch cannot take from numpy become float32."""
    array = np.asarray(output)
    return torch.from_numpy(array if array.dtype.kind in "biuf" else array.astype(np.float32))


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None
