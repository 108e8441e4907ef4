"""Small ONNX models built by hand, and their comparison with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor
from torch.fx import GraphModule

import fxprune

Array = NDArray[Any]
Shape = Sequence[int | str]


def make_model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str] = ("y",),
    stored: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    dtypes: Mapping[str, int] | None = None,
) -> ModelProto:
    """A model; outputs have whatever type and shape come out."""
    types = {"x": TensorProto.FLOAT} | dict(dtypes or {})
    graph = helper.make_graph(
        list(nodes),
        "hand_made",
        [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), list(s)) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.array(array, order="C"), name) for name, array in (stored or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10)
    model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in {n.domain for n in nodes} - {""})
    inferred = onnx.shape_inference.infer_shapes(model)
    for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
        elem = known.type.tensor_type.elem_type or types.get(value.name, TensorProto.FLOAT)
        value.type.tensor_type.elem_type = elem
    return model


def in_onnxruntime(model: ModelProto, *inputs: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    stored = {t.name for t in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def in_torch(graph_module: GraphModule, *inputs: Array) -> list[Array]:
    with torch.no_grad():
        found = graph_module(*map(torch.from_numpy, inputs))
    return [x.numpy() for x in ([found] if isinstance(found, Tensor) else found)]


def assert_same(
    model: ModelProto,
    graph_module: GraphModule | None = None,
    *,
    images: Sequence[int] = (1, 2, 5),
    seed: int = 0,
    tolerance: float = 1e-5,
) -> GraphModule:
    """Import a model, unless that is done, and compare it with onnxruntime on batches of several sizes."""
    graph_module = fxprune.import_onnx(model) if graph_module is None else graph_module
    rng = np.random.default_rng(seed)
    for number in images:
        inputs = []
        for value in model.graph.input:
            sizes = [d.dim_value or number for d in value.type.tensor_type.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            inputs.append(
                rng.standard_normal(sizes).astype(dtype)
                if dtype.kind == "f"
                else rng.integers(0, 3, sizes).astype(dtype)
            )
        wanted, found = in_onnxruntime(model, *inputs), in_torch(graph_module, *inputs)
        assert len(wanted) == len(found)
        for a, b in zip(wanted, found, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), (
                f"{a.shape} {a.dtype} in onnxruntime, {b.shape} {b.dtype} here"
            )
            np.testing.assert_allclose(
                b,
                a,
                rtol=tolerance,
                atol=tolerance * max(1.0, float(np.abs(np.nan_to_num(a, posinf=0, neginf=0)).max(initial=0.0))),
            )
    return graph_module
