"""Reads an ONNX file completely: checked, external data included, sparse initializers made dense, sizes measured."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fxprune.errors import ValidationError

Array = NDArray[Any]
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Port:
    """An input or output of the file: its name, its numpy dtype name, and its sizes (names where they vary)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class FileSize:
    """What zeros are worth on disk.

    Attributes:
        file: bytes of the ONNX file and its external data.
        compressed: the same after zlib at its fastest level; a zip tool's slower levels save some percent more.
        weights: numbers in the initializers that Conv, Gemm and MatMul read.
        zeros: how many of those are zero.
    """

    file: int
    compressed: int
    weights: int = 0
    zeros: int = 0

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file in memory.

    Attributes:
        path: where it was read.
        model: the whole model; local functions are inlined.
        opset: version of the default operator set.
        metadata: the file's metadata_props.
        inputs: the graph's inputs, initializers left out.
        outputs: the graph's outputs.
        complaint: what onnx.checker says against the file, "" if nothing.
        sparse: names of the sparse initializers.
    """

    path: Path
    model: ModelProto
    opset: int
    metadata: dict[str, str]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sparse: tuple[str, ...]
    complaint: str = ""


def read_onnx(path: str | Path, *, strict: bool = True) -> OnnxFile:
    """Load a whole ONNX file and check it.

    Args:
        path: the file.
        strict: raise where onnx.checker finds fault; else the complaint is kept in the result.

    Raises:
        ValidationError: the file is missing, empty, truncated, not ONNX, lacks its external data, or fails the check.
    """
    path = Path(path)
    if not path.is_file():
        raise ValidationError(f"there is no file {path}; write it with fxprune.export_onnx or give another path")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError, onnx's checker.ValidationError for external data, OSError
        raise _incomplete(path, _first_line(error)) from error
    if not model.HasField("graph"):
        raise _incomplete(path, "it holds no graph")
    complaint = ""
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # checker.ValidationError, and others where a file is out of the ordinary
        complaint = _first_line(error)
        if strict:
            raise ValidationError(f"onnx.checker rejects {path}: {complaint}; export the model again") from error
    if len(model.functions):
        model = onnx.inliner.inline_local_functions(model)
    opset = next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    stored = {tensor.name for tensor in model.graph.initializer}
    sparse = tuple(tensor.values.name for tensor in model.graph.sparse_initializer)
    return OnnxFile(
        path=path,
        model=model,
        opset=opset,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        inputs=tuple(_port(value) for value in model.graph.input if value.name not in stored.union(sparse)),
        outputs=tuple(_port(value) for value in model.graph.output),
        sparse=sparse,
        complaint=complaint,
    )


def initializer_arrays(graph: GraphProto) -> dict[str, Array]:
    """All initializers of one graph by name; sparse ones made dense."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for tensor in graph.sparse_initializer:
        values = numpy_helper.to_array(tensor.values)
        indices = numpy_helper.to_array(tensor.indices)
        dense = np.zeros(tuple(tensor.dims), values.dtype)
        if indices.ndim == 2:  # one index per axis instead of a linear one
            indices = np.ravel_multi_index(tuple(indices.T), dense.shape) if len(indices) else indices.reshape(-1)
        dense.reshape(-1)[indices] = values
        arrays[tensor.values.name] = dense
    return arrays


def data_files(model: ModelProto, folder: Path) -> list[Path]:
    """Files with external data that the initializers refer to, as stored on disk."""
    names = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [folder / name for name in sorted(names)]


def measure_size(path: Path) -> FileSize:
    """Bytes of the file and its external data, as they are and compressed with zlib."""
    skeleton = onnx.load(str(path), load_external_data=False)
    plain, compressed = 0, 0
    chunks = _chunks([path, *data_files(skeleton, path.parent)])
    workers = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:  # zlib releases the interpreter lock
        while some := list(itertools.islice(chunks, workers)):
            plain += sum(map(len, some))
            compressed += sum(pool.map(_compressed_length, some))
    return FileSize(plain, compressed)


def _compressed_length(chunk: bytes) -> int:
    return len(zlib.compress(chunk, 1))


def _chunks(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else "unknown"
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return Port(value.name, dtype, shape)


def _incomplete(path: Path, why: str) -> ValidationError:
    return ValidationError(
        f"{path} ({path.stat().st_size:,} bytes) is not a complete ONNX file: {why}. "
        "It may be truncated, damaged, or lack its external data file; export or copy it again"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
