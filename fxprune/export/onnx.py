"""Exports a pruned model to an ONNX file that onnxruntime has confirmed."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from fxprune.errors import ExportError, ValidationError
from fxprune.export.batches import Batch, example_tensors, other_batch
from fxprune.export.model_layers import prune_report
from fxprune.export.onnx_file import OnnxFile, read_onnx
from fxprune.export.onnx_report import OnnxReport
from fxprune.export.parity import evaluating
from fxprune.export.sparse_initializer import sparsify
from fxprune.export.torch_export import to_onnx_program
from fxprune.export.validate import check_file, validate_onnx
from fxprune.fine_tuning.recorded_zeros import filled_zeros

# One protobuf message may hold 2 GiB; the graph itself needs some of that.
EXTERNAL_DATA_BYTES = 2**31 - 2**26
PRECISIONS = ("fp32", "fp16")


def export_onnx(
    compiled: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
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
        raise ExportError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent} to write {path.name} in; make it, or choose another path")
    if filled := filled_zeros(compiled):
        raise ValidationError(f"{path} would not hold a pruned model ({', '.join(filled.layers)}): {filled}")
    inputs = example_tensors(example_inputs, compiled)
    first = next(compiled.parameters(), None)
    on_device = tuple(x.to("cpu" if first is None else first.device) for x in inputs)
    with evaluating(compiled):
        program = to_onnx_program(compiled, on_device, opset=opset, dynamic_batch=dynamic_batch, precision=precision)
    program.model.metadata_props.update(_metadata(compiled))
    try:
        with tempfile.TemporaryDirectory(prefix=".fxprune-", dir=path.parent) as folder:
            stored = Path(folder) / path.name
            report = _write_and_check(program, stored, path, compiled, inputs, dynamic_batch)
            if sparse_initializers:
                note = "No initializer takes fewer bytes when stored sparsely, so all are stored as usual."
                sparse = _write_sparse(stored, path, compiled, inputs, dynamic_batch)
                report = sparse or replace(report, notes=(*report.notes, note))
            if loader is not None:
                validated = validate_onnx(stored, compiled, loader)
                report = replace(validated, path=str(path), notes=report.notes)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == stored):
                os.replace(file, path.parent / file.name)  # external data first, so that the model never lacks it
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error}; nothing was changed there") from error
    except ValidationError as error:
        raise ValidationError(f"{error}\n(The file was not kept: {path} is as it was before.)") from error
    return report


def _write_and_check(
    program: torch.onnx.ONNXProgram,
    stored: Path,
    path: Path,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    dynamic: bool,
) -> OnnxReport:
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    program.save(str(stored), external_data=weights > EXTERNAL_DATA_BYTES)
    file = _read(stored, path)
    return check_file(file, stored, model, _two_batches(inputs, dynamic))


def _write_sparse(
    stored: Path, path: Path, model: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool
) -> OnnxReport | None:
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
    return check_file(_read(stored, path), stored, model, _two_batches(inputs, dynamic))


def _read(stored: Path, path: Path) -> OnnxFile:
    """The file with the name that it will have."""
    return replace(read_onnx(stored), path=path)


def _two_batches(inputs: tuple[Tensor, ...], dynamic: bool) -> Iterator[Batch]:
    return itertools.chain([Batch(inputs)], [Batch(other_batch(inputs, same_size=not dynamic))])


def _metadata(model: nn.Module) -> dict[str, str]:
    """What the file says about itself: pattern, method, every layer's sparsity, and the library's version."""
    version = getattr(importlib.import_module("fxprune"), "__version__", "unknown")
    metadata = {"fxprune.version": str(version)}
    report = prune_report(model)
    if report is not None:
        layers = {
            layer.name: {"pattern": layer.pattern, "status": layer.status, "sparsity": round(layer.sparsity, 6)}
            for layer in report.layers
        }
        metadata |= {
            "fxprune.pattern": report.pattern,
            "fxprune.method": report.method,
            "fxprune.layers": json.dumps(layers),
        }
    return metadata
