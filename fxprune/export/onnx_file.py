"""Reads an ONNX file completely: checked, external data included, sparse initializers made dense, sizes measured."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from fxprune.errors import ValidationError
from fxprune.export.constant_folding import DEFAULT_DOMAINS, initializer_names, opset_versions, stored_tensors
from fxprune.export.constant_folding import Array as Array

_CHUNK = 1 << 24
# Nodes that a model may have once its local functions are written out: a kilobyte can ask for billions.
_MOST_NODES = 1_000_000


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
        raise ValidationError(
            f"there is no file {path} (from {Path.cwd()}); give the path of an ONNX file, such as fxprune.export_onnx writes"
        )
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's DecodeError, onnx's checker.ValidationError for external data, OSError
        raise _incomplete(path, first_line(error)) from error
    if not model.HasField("graph"):
        raise _incomplete(path, "it holds no graph")
    complaint = ""
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # checker.ValidationError, and others where a file is out of the ordinary
        complaint = first_line(error)
        if strict:
            raise ValidationError(f"onnx.checker rejects {path}: {complaint}; export the model again") from error
    if len(model.functions):
        model, complaint = _inlined(model, complaint)
        if strict and complaint:
            raise ValidationError(f"{path}: {complaint}; export the model again without local functions")
    sparse = tuple(tensor.values.name for tensor in model.graph.sparse_initializer)
    return OnnxFile(
        path=path,
        model=model,
        opset=opset_versions(model)[""] if model.opset_import else 0,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        inputs=ports_of(model),
        outputs=tuple(_port(value) for value in model.graph.output),
        sparse=sparse,
        complaint=complaint,
    )


def ports_of(model: ModelProto) -> tuple[Port, ...]:
    """The inputs of a model's graph, without initializers, which give inputs of old files their values."""
    stored = initializer_names(model)
    return tuple(_port(value) for value in model.graph.input if value.name not in stored)


def initializer_arrays(graph: GraphProto) -> dict[str, Array]:
    """All initializers of one graph by name that can be read; sparse ones made dense."""
    return {name: array for name, array in stored_tensors(graph).items() if array is not None}


def data_files(model: ModelProto, folder: Path) -> list[Path]:
    """Files with external data that the initializers refer to, as stored on disk."""
    names = {
        entry.value
        for tensor in _tensors(model.graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [folder / name for name in sorted(names)]


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All that a graph stores, in subgraphs and Constant nodes too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _tensors(subgraph)


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


def _inlined(model: ModelProto, complaint: str) -> tuple[ModelProto, str]:
    """The model with its local functions written out where they are called, and what is wrong, if anything."""
    try:
        if _written_out(model) > _MOST_NODES:
            return model, complaint or f"its local functions stand for more than {_MOST_NODES:,} nodes"
        for function in model.functions:
            _raise_opset(function, opset_versions(model)[""])
        model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # functions that call each other in a circle, or hold what no version can
        return model, complaint or first_line(error)
    left = ", ".join(sorted({function.name for function in model.functions}))
    return model, complaint or (
        f"its local functions {left} cannot be written out where they are called" if left else ""
    )


def _raise_opset(function: FunctionProto, version: int) -> None:
    """Let a function use the model's operator set, without which it is not inlined, if its operations are the same in both."""
    for opset in function.opset_import:
        if opset.domain not in DEFAULT_DOMAINS or opset.version == version:
            continue
        operations = {node.op_type for node in function.node if node.domain in DEFAULT_DOMAINS}
        since = [{onnx.defs.get_schema(op, v).since_version for v in (opset.version, version)} for op in operations]
        if all(len(versions) == 1 for versions in since):
            opset.version = version


def _written_out(model: ModelProto) -> int:
    """How many nodes the main graph has once all local functions are written out; counting stops where it is too many."""
    functions: dict[tuple[str, str], FunctionProto] = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str]) -> int:
        if key not in functions:
            return 1
        if key not in sizes:
            sizes[key] = _MOST_NODES + 1  # what a function that calls itself counts for
            sizes[key] = min(_MOST_NODES + 1, sum(size((n.domain, n.op_type)) for n in functions[key].node))
        return sizes[key]

    return sum(size((node.domain, node.op_type)) for node in model.graph.node)


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    try:
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if tensor.elem_type else "unknown"
    except (KeyError, ValueError, TypeError):  # a number type of a later version
        dtype = f"unknown number type {tensor.elem_type}"
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        dtype = str(kind).removesuffix("_type")  # a sequence, map, optional or sparse tensor
    shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return Port(value.name, dtype, shape)


def _incomplete(path: Path, why: str) -> ValidationError:
    return ValidationError(
        f"{path} ({path.stat().st_size:,} bytes) is not a complete ONNX file: {why}. "
        "It may be truncated, damaged, or lack its external data file; export or copy it again"
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
