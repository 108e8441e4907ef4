"""Reads a file for the import: whole, constants folded, quantised ones refused."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, NodeProto

from fxprune.errors import OnnxImportError
from fxprune.export.constant_folding import fold_constants, initializer_names, opset_versions
from fxprune.export.onnx_file import Port, first_line, read_onnx
from fxprune.onnx_import.values import Known

_QUANTISED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QLinearAdd",
    "QLinearGlobalAveragePool",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """A file to import.

    Attributes:
        name: what to call it in messages.
        path: where it is.
        model: whole, constants folded.
        opset: version of the default operator set.
        inputs: of the graph.
        outputs: of the graph.
        known: all constants by name.
    """

    name: str
    path: Path
    model: ModelProto
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    known: dict[str, Known]


def read(path: Path, name: str) -> Source:
    """Read a file.

    Raises:
        ValidationError: it is no complete ONNX file.
        OnnxImportError: it is quantised, or takes or gives what is no tensor.
    """
    file = read_onnx(path, strict=False)
    model = file.model
    quantised = next((node for node in _all_nodes(model.graph.node) if node.op_type in _QUANTISED), None)
    if quantised is not None:
        raise OnnxImportError(
            f"{name} is quantised (its node {quantised.name or quantised.output[0]!r} is a {quantised.op_type}). Pruning "
            "changes weights, which then no longer lie on the grid: give the float file that it was made from, and "
            "quantise the result"
        )
    for port in (*file.inputs, *file.outputs):
        if port.dtype in ("sequence", "map", "optional", "sparse_tensor"):
            raise OnnxImportError(f"{name}: {port.name!r} is a {port.dtype}; only tensors can be taken")
    stored = initializer_names(model)
    arrays, origins = fold_constants(model)
    known = {key: Known(array, origins.get(key, key), origins.get(key, key) in stored) for key, array in arrays.items()}
    return Source(name, path, model, opset_versions(model)[""], file.inputs, file.outputs, known)


def saved(model: ModelProto, folder: str) -> Path:
    """A model in memory as a file, so that it is read like any other.

    Raises:
        OnnxImportError: it is too large for one, or its external data has not been loaded.
    """
    path = Path(folder) / "model.onnx"
    try:
        onnx.save(model, str(path))
    except Exception as error:  # protobuf's own, and ValueError, for more than 2 GiB
        raise OnnxImportError(
            f"this ModelProto cannot be written to a file ({first_line(error)}); give the path of the file that "
            "it was read from"
        ) from error
    return path


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """For `saved`."""
    return tempfile.TemporaryDirectory(prefix="fxprune-")


def _all_nodes(nodes: Any) -> list[NodeProto]:
    found: list[NodeProto] = []
    for node in nodes:
        found.append(node)
        for attribute in node.attribute:
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                found += _all_nodes(graph.node)
    return found
