"""An ONNX file in onnxruntime, on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fxprune.errors import ValidationError
from fxprune.export.constant_folding import Array
from fxprune.export.inputs_outputs import Batch
from fxprune.export.onnx_file import OnnxFile

if TYPE_CHECKING:
    import onnxruntime

# What onnxruntime says where it has no kernel for a node, or the operator set none of that type.
_NO_KERNEL = r"Could not find an implementation for (\w+)|tensor\(bfloat16\).*?operator \((\w+)"


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Load a file into onnxruntime on the CPU.

    Raises:
        ValidationError: onnxruntime does not accept it.
    """
    import onnxruntime  # takes long to load, and most uses of this package never need it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a failure raises; nothing needs to be printed as well
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base class
        if missing := re.search(
            r"Could not find an implementation for (\w+)|tensor\(bfloat16\).*?operator \((\w+)", str(error)
        ):
            raise ValidationError(
                f"onnxruntime cannot run {path}: its CPU provider has no kernel for {missing[1] or missing[2]} in the number "
                "type that the file gives it (it has none for bfloat16, and few for float64 and integers); export with "
                "precision='fp32' or 'fp16', without casts to that type in the model's own forward"
            ) from error
        raise ValidationError(f"onnxruntime cannot load {path}: {error}; export the model again") from error


def run_session(session: onnxruntime.InferenceSession, file: OnnxFile, batch: Batch, number: int) -> list[Array]:
    """The file's outputs for one batch.

    Raises:
        ValidationError: the batch does not fit the file's inputs, or onnxruntime fails.
    """
    feeds: dict[str, Array] = {}
    for port, value in zip(file.inputs, batch.inputs, strict=False):
        fixed = [size if isinstance(size, int) else None for size in port.shape]
        if len(fixed) != value.dim() or any(a not in (None, b) for a, b in zip(fixed, value.shape, strict=True)):
            raise ValidationError(
                f"{file.path}: the file's input {port} does not fit batch {number} of shape {tuple(value.shape)}; "
                "is this the file of another model, or was it exported with dynamic_batch=False for another batch size, "
                "or without dynamic_size for another height and width?"
            )
        value = value.detach().cpu()
        array = value.double().numpy() if value.is_floating_point() else value.numpy()
        feeds[port.name] = array.astype(port.dtype) if port.dtype.startswith("float") else array
    if len(batch.inputs) != len(file.inputs):
        ports = "; ".join(map(str, file.inputs))
        raise ValidationError(
            f"{file.path} has {len(file.inputs)} inputs ({ports}) but the model takes {len(batch.inputs)}; "
            "is this the file of another model?"
        )
    try:
        outputs: list[Array] = session.run(None, feeds)
    except Exception as error:  # see open_session
        shapes = ", ".join(str(tuple(value.shape)) for value in batch.inputs)
        raise ValidationError(f"onnxruntime fails on {file.path} with inputs of shape {shapes}: {error}") from error
    return outputs
