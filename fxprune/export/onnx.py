"""Exports a pruned model to an ONNX file that onnxruntime has confirmed."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.compiled_parts import CompiledParts
from fxprune.errors import ExportError, ValidationError
from fxprune.export.file_metadata import file_metadata
from fxprune.export.inputs_outputs import Batch, example_tensors, other_batch
from fxprune.export.list_inputs import with_tensor_inputs
from fxprune.export.model_layers import prune_report
from fxprune.export.onnx_file import OnnxFile, first_line, read_onnx
from fxprune.export.onnx_report import OnnxReport
from fxprune.export.parity import evaluating
from fxprune.export.sparse_initializer import sparsify
from fxprune.export.torch_export import to_onnx_program
from fxprune.export.validate import check_file, validate_onnx, warn_of_notes
from fxprune.fine_tuning.recorded_zeros import filled_zeros
from fxprune.graph.model_argument import not_a_model
from fxprune.runtime.surroundings import undisturbed

# One protobuf message may hold 2 GiB; the graph itself needs some of that.
EXTERNAL_DATA_BYTES = 2**31 - 2**26
PRECISIONS = ("fp32", "fp16")


@undisturbed
def export_onnx(
    compiled: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    precision: str = "fp32",
    sparse_initializers: bool = False,
    loader: Iterable[Any] | None = None,
) -> OnnxReport:
    """Write a model to an ONNX file, and confirm the file before it takes its place.

    The file is checked with onnx.checker and run in onnxruntime on two batches of different sizes; every layer's
    weight is read back and its sparsity pattern checked along the axis that the operation sums over. Only a file that
    passes is moved to `path`, so neither a full disk nor a failed check leaves half a file or a wrong one.

    Args:
        compiled: what `fxprune.compile` returned, or any GraphModule or module; not modified.
        path: the file to write. Weights beyond 2 GB go to a second file, `path` with ".data" added.
        example_inputs: a tensor, a tuple of the model's inputs, or a dict of them by name; preferably real samples,
            since they are also what the file is checked with. A batch (images, labels) will do.
        opset: ONNX operator set version; None is the exporter's own choice.
        dynamic_batch: leave the batch size open.
        dynamic_size: leave height and width open (in general, the axes after the channels), of all inputs that have them; the
            file is then run at other sizes too. Models that flatten before a linear layer cannot.
        input_names: what to call the file's inputs, in order; None for the names of forward's parameters.
        output_names: what to call its outputs; None for the keys or fields of what the model returns, or "output".
        precision: "fp32", or "fp16": float16 weights and activations, float32 inputs and outputs all the same.
        sparse_initializers: store those weights sparsely that take fewer bytes so (beyond 67% zeros in fp32, 80% in
            fp16). Few engines beside onnxruntime read such files.
        loader: batches to validate on beyond the two; with labels, both accuracies are in the report.

    Returns:
        The report: parity, every layer's pattern and deployment verdict, sizes. `print` it.

    Raises:
        ExportError: the model cannot be exported, or the file not written.
        ValidationError: the model's zeros have been filled in; or the file does not hold or compute what the model does, and
            is not kept.
    """
    path = Path(path)
    if precision not in PRECISIONS:
        reason = (
            " (onnxruntime's CPU provider has no kernels to check a bfloat16 file with)" if "b" in precision else ""
        )
        raise ExportError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}{reason}")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent} to write {path.name} in; make it, or choose another path")
    if not isinstance(compiled, nn.Module):
        raise ExportError(not_a_model(compiled))
    if isinstance(compiled, CompiledParts):
        name = next(iter(compiled.paths), "backbone")
        raise ExportError(
            f"the forward of this {type(compiled.model).__name__} is Python around compiled parts, which is no graph to write. "
            f"Each part ({', '.join(compiled.paths)}) has a file of its own: fxprune.export_onnx(compiled.parts[{name!r}], "
            f"path, compiled.inputs_of({name!r}, batch)[0]); for the whole, see what the model's library exports"
        )
    if filled := filled_zeros(compiled):
        raise ValidationError(f"{path} would not hold a pruned model ({', '.join(filled.layers)}): {filled}")
    if isinstance(compiled, GraphModule):
        compiled, example_inputs = with_tensor_inputs(compiled, example_inputs)
    inputs = example_tensors(example_inputs, compiled)
    first = next(compiled.parameters(), None)
    on_device = tuple(x.to("cpu" if first is None else first.device) for x in inputs)
    with evaluating(compiled) as run:
        program = to_onnx_program(
            compiled,
            on_device,
            opset=opset,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size,
            precision=precision,
            names_in=input_names,
            names_out=output_names,
        )
        batches = [Batch(inputs), Batch(other_batch(inputs, same_size=not dynamic_batch))]
        if dynamic_size:
            batches += other_sizes(batches[1].inputs, run, type(compiled).__name__)
    program.model.metadata_props.update(file_metadata(compiled, prune_report(compiled)))
    try:
        with tempfile.TemporaryDirectory(prefix=".fxprune-", dir=path.parent) as folder:
            stored = Path(folder) / path.name
            report = _write_and_check(program, stored, path, compiled, batches)
            if sparse_initializers:
                note = "No initializer takes fewer bytes when stored sparsely, so all are stored as usual."
                sparse = _write_sparse(stored, path, compiled, batches)
                report = sparse or replace(report, notes=(*report.notes, note))
            if dynamic_size:
                shapes = ", ".join("x".join(map(str, batch.inputs[0].shape)) for batch in batches[2:])
                report = replace(
                    report, notes=(*report.notes, f"Height and width are open; it was also run on {shapes}.")
                )
            if loader is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # said below
                    validated = validate_onnx(compiled, stored, loader)
                report = replace(validated, path=str(path), notes=report.notes)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == stored):
                os.replace(file, path.parent / file.name)  # external data first, so that the model never lacks it
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}; nothing was changed there") from error
    except ValidationError as error:
        advice = (
            "\nIf it goes wrong at other heights and widths only, leave dynamic_size out: a pooling to more than 1 x 1 values, "
            "for one, cannot be written for open sizes."
        )
        raise ValidationError(
            f"{error}{advice if dynamic_size else ''}\n(The file was not kept: {path} is as it was before.)"
        ) from error
    warn_of_notes(report, stacklevel=3)
    return report


def _write_and_check(
    program: torch.onnx.ONNXProgram,
    stored: Path,
    path: Path,
    model: nn.Module,
    batches: list[Batch],
) -> OnnxReport:
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    program.save(str(stored), external_data=weights > EXTERNAL_DATA_BYTES)
    file = _read(stored, path)
    return check_file(file, stored, model, iter(batches))


def _write_sparse(stored: Path, path: Path, model: nn.Module, batches: list[Batch]) -> OnnxReport | None:
    """Replace the stored file by one with sparse initializers, checked like it; None if no tensor gets smaller."""
    proto = onnx.load(str(stored), load_external_data=False)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise ExportError(
            f"{path} needs external data, which ONNX has no sparse form of; leave sparse_initializers out"
        )
    if not sparsify(proto):
        return None
    smaller = stored.with_name(f"{stored.name}.sparse")
    onnx.save(proto, str(smaller))
    if smaller.stat().st_size >= stored.stat().st_size:
        smaller.unlink()
        return None
    os.replace(smaller, stored)
    return check_file(_read(stored, path), stored, model, iter(batches))


def _read(stored: Path, path: Path) -> OnnxFile:
    """The file with the name that it will have."""
    return replace(read_onnx(stored), path=path)


def other_sizes(
    inputs: tuple[Tensor, ...], run: Callable[[tuple[Tensor, ...]], dict[str, Tensor]], model: str
) -> list[Batch]:
    """The inputs at other heights and widths that the model takes: some multiples of 32 larger, twice as large, and odd ones.

    Raises:
        ExportError: the model takes none of them.
    """
    found: list[Batch] = []
    causes: list[str] = []
    for factor, offset, step in ((1, 32, 32), (2, 0, 0), (1, 3, 2)):
        resized = tuple(
            _resized(x, [factor * size + offset + step * i for i, size in enumerate(x.shape[2:])]) for x in inputs
        )
        try:
            run(resized)
        except Exception as error:  # whatever the model raises where the size does not fit it
            causes.append(f"at {' and '.join('x'.join(map(str, x.shape[2:])) for x in resized)}: {first_line(error)}")
        else:
            found.append(Batch(resized))
    if not found:
        raise ExportError(
            f"{model} takes no other height and width than that of the example ({causes[0]}); leave dynamic_size out. A model "
            "with an AdaptiveAvgPool2d(1) before its flatten takes any"
        )
    return found


def _resized(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tensor repeated and cut to other sizes after axis 1."""
    for axis, size in enumerate(sizes, 2):
        x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x
