from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from fxprune.export.weight_uses import WeightUse, graph_weights


def rng_array(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def model_of(nodes: list[NodeProto], tensors: dict[str, np.ndarray], **kwargs: Any) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **kwargs)


def only_use(nodes: list[NodeProto], tensors: dict[str, np.ndarray]) -> WeightUse:
    (use,) = graph_weights(model_of(nodes, tensors)).uses
    return use


def node(op: str, inputs: str, output: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"the_{op}", **attributes)


def same(found: Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(found.numpy(), wanted)


W = rng_array(6, 8)


@pytest.mark.parametrize(
    ("nodes", "axis", "transposed"),
    [
        ([node("Gemm", "x w", transB=1)], 1, False),
        ([node("Gemm", "x w")], 0, True),
        ([node("Gemm", "w x")], 1, False),
        ([node("Gemm", "w x", transA=1)], 0, True),
        ([node("MatMul", "x w")], 0, True),
        ([node("MatMul", "w x")], 1, False),
        ([node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t")], 1, False),
        ([node("Transpose", "w", "t"), node("Gemm", "x t", transB=1)], 0, True),
        ([node("Identity", "w", "i"), node("Transpose", "i", "t"), node("MatMul", "x t")], 1, False),
        ([node("Cast", "w", "c", to=TensorProto.FLOAT), node("Gemm", "x c", transB=1)], 1, False),
    ],
)
def test_products(nodes: list[NodeProto], axis: int, transposed: bool) -> None:
    use = only_use(nodes, {"w": W})
    assert use.initializer == "w"
    assert use.axis == axis
    same(use.weight, W.T if transposed else W)
    # The weight's second axis is the one that the node sums over: compare with what the node computes.
    assert use.reduction_first.shape[1] == W.shape[axis]


def test_reshape_loses_the_axis_but_not_the_weight() -> None:
    nodes = [node("Reshape", "flat shape", "r"), node("Gemm", "x r", transB=1)]
    use = only_use(nodes, {"flat": W.reshape(-1), "shape": np.array([6, 8])})
    assert use.axis is None
    assert use.initializer == "flat"
    same(use.weight, W)


def test_batched_matmul_joins_the_leading_axes() -> None:
    weight = rng_array(3, 8, 5)
    use = only_use([node("MatMul", "x w")], {"w": weight})
    assert use.axis == 1
    assert use.weight.shape == (15, 8)
    x = rng_array(3, 2, 8)
    product = np.matmul(x, weight)
    for batch in range(3):
        rows = use.weight.reshape(3, 5, 8)[batch].numpy()
        np.testing.assert_allclose(x[batch] @ rows.T, product[batch], rtol=1e-5, atol=1e-6)


def test_vector() -> None:
    use = only_use([node("MatMul", "x w")], {"w": W[0]})
    assert (use.axis, tuple(use.weight.shape)) == (0, (1, 8))


def test_constant_node() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W, "c"))
    use = only_use([constant, node("MatMul", "x c")], {})
    assert use.initializer == "c"
    same(use.weight, W.T)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_convolution_dtypes(dtype: str) -> None:
    weight = rng_array(4, 2, 3, 3)
    stored = helper.make_tensor(
        "w", getattr(TensorProto, dtype.upper().replace("FLOAT32", "FLOAT")), weight.shape, weight.ravel()
    )
    model = model_of([node("Conv", "x w", group=2)], {})
    model.graph.initializer.append(stored)
    (use,) = graph_weights(model).uses
    assert (use.dtype, use.groups, use.axis) == (dtype, 2, 1)
    torch.testing.assert_close(use.weight.float(), torch.from_numpy(weight), rtol=1e-2, atol=1e-3)


def test_transposed_convolution() -> None:
    weight = rng_array(8, 3, 2, 2)
    use = only_use([node("ConvTranspose", "x w")], {"w": weight})
    assert use.axis == 0
    same(use.weight, weight)
    same(use.reduction_first, weight.swapaxes(0, 1))


def test_quantized_weights_are_zero_at_their_zero_point() -> None:
    stored = np.array([[3, 5, 7], [3, 3, 9]], np.uint8)
    tensors = {"w": stored, "s": np.float32(0.5), "z": np.uint8(3)}
    use = only_use([node("DequantizeLinear", "w s z", "d"), node("Gemm", "x d", transB=1)], tensors)
    same(use.weight, np.array([[0, 1, 2], [0, 0, 3]], np.float32))
    assert use.dtype == "uint8"
    assert use.axis == 1

    tensors = {n: np.float32(1) for n in ("xs", "ws", "ys")} | {"xz": np.uint8(0), "yz": np.uint8(0)}
    tensors |= {"w": stored.reshape(2, 3, 1, 1), "wz": np.array([3, 9], np.uint8)}
    use = only_use([node("QLinearConv", "x xs xz w ws wz ys yz")], tensors)
    same(use.weight.reshape(2, 3), np.array([[0, 2, 4], [-6, -6, 0]]))

    use = only_use(
        [node("MatMulInteger", "x w xz wz")], {"w": stored, "xz": np.uint8(0), "wz": np.array([3, 5, 9], np.uint8)}
    )
    same(use.weight, np.array([[0, 0], [0, -2], [-2, 0]]))


def test_subgraphs_read_outer_weights() -> None:
    branch = helper.make_graph(
        [node("MatMul", "x w", "b")], "then", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [node("MatMul", "x v", "b")],
        "else",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(2 * W, "v")],
    )
    nodes = [helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=other)]
    uses = graph_weights(model_of(nodes, {"w": W, "condition": np.array(True)})).uses
    assert [use.initializer for use in uses] == ["v", "w"]  # onnx sorts the branches by name
    same(uses[0].weight, 2 * W.T)


def test_nothing_is_left_out_silently() -> None:
    nodes = [
        node("Sigmoid", "x", "s"),
        node("Conv", "x s", "c"),
        node("Gather", "table x", "g"),
        node("MatMul", "c g", "m"),
        node("MatMul", "m w"),
    ]
    found = graph_weights(model_of(nodes, {"w": W, "table": rng_array(10, 4), "tiny": rng_array(2, 2)}))
    assert [use.initializer for use in found.uses] == ["w"]
    assert found.computed == ("Conv the_Conv",)
    assert found.others == (("table", (10, 4)),)


def test_unnamed_nodes_get_names() -> None:
    bare = onnx.NodeProto(op_type="MatMul", input=["x", "w"], output=["y"])
    assert only_use([bare], {"w": W}).node == "MatMul_0"


@pytest.mark.parametrize(("op", "gates"), [("LSTM", "ifgo"), ("GRU", "rzn"), ("RNN", "h")])
def test_recurrent_layers_have_a_use_for_each_matrix_and_direction(op: str, gates: str) -> None:
    """Gates in torch's order, whatever the file's: input, output, forget, cell; update, reset, new."""
    stored = {"LSTM": "iofg", "GRU": "zrn", "RNN": "h"}[op]
    w, r = rng_array(2, 4 * len(gates), 8), rng_array(2, 4 * len(gates), 4)
    found = graph_weights(model_of([node(op, "x w r", direction="bidirectional", hidden_size=4)], {"w": w, "r": r}))
    assert [(use.op, use.initializer, use.axis, use.stored_shape) for use in found.uses] == [
        (op, name, 2, array.shape) for name, array in (("w", w), ("r", r)) for _ in range(2)
    ]
    for use, array in zip(found.uses, (*w, *r), strict=True):
        by_gate = dict(zip(stored, np.split(array, len(gates)), strict=True))
        same(use.weight, np.concatenate([by_gate[gate] for gate in gates]))
    assert found.others == ()


def test_recurrent_weights_may_be_transposed_on_the_way() -> None:
    w, r = rng_array(1, 16, 8), rng_array(1, 16, 4)
    nodes = [helper.make_node("Transpose", ["stored"], ["w"], perm=[0, 2, 1]), node("LSTM", "x w r", hidden_size=4)]
    use, _ = graph_weights(model_of(nodes, {"stored": np.ascontiguousarray(w.transpose(0, 2, 1)), "r": r})).uses
    assert (use.initializer, use.axis) == ("stored", 1)
    same(use.weight, w[0].reshape(4, 4, 8)[[0, 2, 3, 1]].reshape(16, 8))
