from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fxprune.errors import ValidationError
from fxprune.export import export_onnx, inspect_onnx, validate_onnx
from fxprune.export.onnx_file import initializer_arrays
from fxprune.export.sparse_initializer import sparsify


def matmul_model(weight: np.ndarray) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", kind, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def with_zeros(share: float, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((64, 64)) * (rng.random((64, 64)) >= share)).astype(dtype)


@pytest.mark.parametrize(
    ("share", "dtype", "smaller"),
    [
        (0.60, np.float32, False),
        (0.75, np.float32, True),
        (0.75, np.float16, False),
        (0.85, np.float16, True),
        (1.0, np.float32, True),
    ],
)  # fmt: skip
def test_only_where_it_is_smaller(share: float, dtype: type, smaller: bool, tmp_path: Path) -> None:
    weight = with_zeros(share, dtype)
    model = matmul_model(weight)
    before = model.ByteSize()
    assert sparsify(model) == (("w",) if smaller else ())
    assert (model.ByteSize() < before) is smaller

    np.testing.assert_array_equal(initializer_arrays(model.graph)["w"], weight)
    onnx.save(model, str(tmp_path / "m.onnx"))
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(64, dtype=dtype)})
    np.testing.assert_array_equal(found, weight)


def test_indices_are_ascending_int64() -> None:
    model = matmul_model(with_zeros(0.9))
    sparsify(model)
    (tensor,) = model.graph.sparse_initializer
    indices = numpy_helper.to_array(tensor.indices)
    assert tensor.indices.data_type == TensorProto.INT64
    assert (np.diff(indices) > 0).all()
    assert list(tensor.dims) == [64, 64]
    assert not [t for t in model.graph.initializer if t.name == "w"]


def test_indices_by_axis_are_read_too() -> None:
    weight = with_zeros(0.9)
    model = matmul_model(weight)
    del model.graph.initializer[:]
    places = np.argwhere(weight)
    values = numpy_helper.from_array(weight[weight != 0], "w")
    indices = numpy_helper.from_array(places.astype(np.int64), "w_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, weight.shape))
    np.testing.assert_array_equal(initializer_arrays(model.graph)["w"], weight)


@pytest.fixture(scope="module")
def sparse_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    net[0].weight.data *= torch.rand_like(net[0].weight) < 0.1
    return net


def test_export_and_revalidate(sparse_net: nn.Sequential, tmp_path: Path) -> None:
    x = torch.randn(4, 8, 8, 8)
    dense = export_onnx(sparse_net, tmp_path / "dense.onnx", x)
    report = export_onnx(sparse_net, tmp_path / "sparse.onnx", x, sparse_initializers=True)
    assert report.sparse_initializers == ("0.weight",)
    assert report.size.file < dense.size.file
    assert report.size.zeros == dense.size.zeros
    assert report["0"].sparsity == dense["0"].sparsity > 0.85
    assert validate_onnx(sparse_net, tmp_path / "sparse.onnx", [x], progress=False).parity.max_rel < 1e-5
    inspection = inspect_onnx(tmp_path / "sparse.onnx")
    assert inspection.sparse_initializers == ("0.weight",)
    assert inspection["0.weight"].shape == (32, 8, 3, 3)
    assert "Stored sparsely: 0.weight." in str(inspection)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense.onnx", "sparse.onnx"]

    # A changed value inside a sparse initializer is found like any other.
    model = onnx.load(str(tmp_path / "sparse.onnx"))
    values = model.graph.sparse_initializer[0].values
    changed = numpy_helper.to_array(values).copy()
    changed[3] += 1
    values.CopyFrom(numpy_helper.from_array(changed, "0.weight"))
    onnx.save(model, str(tmp_path / "sparse.onnx"))
    with pytest.raises(ValidationError, match=r"layer '0'.*1 of 2304 weights are not the model's"):
        validate_onnx(sparse_net, tmp_path / "sparse.onnx", [x], progress=False)


def test_not_worth_it_is_said(tmp_path: Path) -> None:
    report = export_onnx(nn.Linear(8, 8), tmp_path / "m.onnx", torch.randn(2, 8), sparse_initializers=True)
    assert report.sparse_initializers == ()
    assert "No initializer takes fewer bytes when stored sparsely" in str(report)
