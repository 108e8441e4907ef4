from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fxprune.compiled import CompiledModule
from fxprune.errors import ValidationError
from fxprune.export import export_onnx
from fxprune.graph_diff import diff
from fxprune.graph_diff.read_onnx import read_onnx_graph
from tests.graph_diff.small_net import SmallNet


def write(
    path: Path, *, names: tuple[str, str] = ("a.weight", "b.weight"), norm: bool = True, pruned: bool = False
) -> Path:
    """Conv, BatchNormalization (or folded in), Relu, Conv, Add as an ONNX file."""
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal((4, 4, 3, 3)).astype(np.float32) for _ in range(2))
    gamma, beta, mean, var = (rng.uniform(0.5, 2, 4).astype(np.float32) for _ in range(4))
    if pruned:
        w2[:, :2] = 0
    scale = gamma / np.sqrt(var + 1e-5)
    stored = {names[0]: w1, names[1]: w2}
    nodes = []
    if norm:
        stored |= {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
        nodes += [
            helper.make_node("Conv", ["x", names[0]], ["c"], pads=[1] * 4),
            helper.make_node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        ]
    else:
        stored |= {names[0]: w1 * scale[:, None, None, None], "bias": beta - mean * scale}
        nodes.append(helper.make_node("Conv", ["x", names[0], "bias"], ["n"], pads=[1] * 4))
    nodes += [
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", names[1]], ["d"], pads=[1] * 4),
        helper.make_node("Add", ["d", "r"], ["y"]),
    ]
    shape = ["batch", 4, 6, 6]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_file_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx")
    assert diff(path, str(path)).is_empty


def test_a_folded_batchnorm_is_recognised_in_files_of_any_origin(tmp_path: Path) -> None:
    result = diff(write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", norm=False))
    assert [(node.name, node.status) for node in result.changed] == [
        ("a", "changed"), ("BatchNormalization_1", "removed")
    ]  # fmt: skip
    assert result["a"].changes == ("BatchNormalization_1 folded in",)
    assert result["a"].weight_change == 0
    assert result["BatchNormalization_1"].into == ("a",)
    assert result.costs_before.macs == 2 * 4 * 4 * 9 * 36
    assert result.costs_before.parameters == 2 * 144 + 8  # the BatchNorm's mean and variance are not learnt


def test_a_pattern_is_found_in_the_file_itself(tmp_path: Path) -> None:
    result = diff(write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", pruned=True))
    (node,) = result.changed
    assert node.name == "b"
    assert node.after is not None
    assert node.after.pattern == "2:4"
    assert node.after.sparsity == 0.5
    assert result.costs_after.nonzero_macs == 144 * 36 + 72 * 36


def test_weights_with_numbered_names_are_matched_by_structure(tmp_path: Path) -> None:
    before = write(tmp_path / "a.onnx", names=("onnx::Conv_7", "onnx::Conv_9"))
    after = write(tmp_path / "b.onnx", names=("onnx::Conv_9", "onnx::Conv_11"), pruned=True)
    assert [node.name for node in diff(before, after).changed] == ["Conv_3"]


def test_what_is_computed_from_constants_is_no_node(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx")
    model = onnx.load(path)
    model.graph.node.insert(0, helper.make_node("Identity", ["b.weight"], ["same"]))
    model.graph.node[4].input[1] = "same"
    onnx.save(model, tmp_path / "b.onnx")
    result = diff(path, tmp_path / "b.onnx")
    assert result.is_empty
    assert len(result.nodes) == 7


def test_exported_models_are_compared_with_names_and_patterns(
    net: SmallNet, compiled: CompiledModule, images: Tensor, tmp_path: Path
) -> None:
    export_onnx(net, tmp_path / "dense.onnx", images)
    export_onnx(compiled, tmp_path / "pruned.onnx", images)
    result = diff(tmp_path / "dense.onnx", tmp_path / "pruned.onnx")
    assert (result.before, result.after) == ("dense.onnx", "pruned.onnx (pruned to 2:4)")
    changed = {node.name: node for node in result.changed}
    assert {"conv2", "fc"} <= changed.keys()
    assert changed["conv2"].changes[0] == "pruned to 2:4"
    both = diff(net, compiled, example_inputs=images)
    assert changed["conv2"].weight_change == pytest.approx(both["conv2"].weight_change, rel=1e-3)
    assert result.costs_after.macs == both.costs_after.macs
    assert all(
        node.weight_change is None or node.weight_change < 1e-6 for name, node in changed.items() if name == "conv1"
    )


def test_products_of_activations_count(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5, 5])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "a.onnx")
    nodes = {node.op: node for node in read_onnx_graph(tmp_path / "a.onnx").nodes}
    assert nodes["MatMul"].macs == 125


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx")
    with pytest.raises(ValidationError, match=r"there is no file .*b\.onnx"):
        diff(path, tmp_path / "b.onnx")


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_gemm_are_read_as_those_of_linear(tmp_path: Path, transposed: bool) -> None:
    weight = np.arange(24, dtype=np.float32).reshape(3, 8)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=int(transposed))],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight if transposed else np.ascontiguousarray(weight.T), "fc.weight")],
    )
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    (node,) = (node for node in read_onnx_graph(path).nodes if node.op == "Gemm")
    assert node.weights.weight is not None
    assert torch.equal(node.weights.weight, torch.from_numpy(weight))
    assert node.macs == 24
