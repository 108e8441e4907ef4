"""Files that say the same in different ways are the same to a diff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fxprune.graph_diff import GraphDiff, diff

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((4, 4, 3, 3)).astype(np.float32)
MATRIX = RNG.standard_normal((4, 4)).astype(np.float32)
BIAS = RNG.standard_normal(4).astype(np.float32)
node = helper.make_node


def write(
    path: Path, nodes: Sequence[NodeProto], *, opset: int = 17, shape: Sequence[int] = (1, 4, 6, 6), rank: int = 0,
    **stored: object,
) -> Path:  # fmt: skip
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"d{i}" for i in range(rank or len(shape))])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )  # fmt: skip
    domains = {n.domain for n in nodes if n.domain}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def compare(folder: Path, before: dict[str, object], after: dict[str, object]) -> GraphDiff:
    return diff(write(folder / "a.onnx", **before), write(folder / "b.onnx", **after))  # type: ignore[arg-type]


def gemm(*before: NodeProto, weight: str = "w", bias: str = "b", **attributes: object) -> dict[str, object]:
    nodes = [*before, node("Gemm", ["x", weight, bias], ["y"], **attributes)]
    return {"nodes": nodes, "w": MATRIX, "b": BIAS, "shape": (1, 4)}


def conv(**attributes: object) -> dict[str, object]:
    return {"nodes": [node("Conv", ["x", "w", "b"], ["y"], **attributes)], "w": WEIGHT, "b": BIAS}


def dequantized(domain: str) -> dict[str, object]:
    nodes = [node("DequantizeLinear", ["q", "s"], ["w"], domain=domain), node("Conv", ["x", "w"], ["y"])]
    return {"nodes": nodes, "q": np.round(10 * WEIGHT).astype(np.int8), "s": np.float32(0.1)}


def pool(**attributes: object) -> dict[str, object]:
    return {"nodes": [node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], **attributes)]}


GEMM, CONV = gemm(), conv()
IDENTITIES = (node("Identity", ["b"], ["c"]), node("Identity", ["c"], ["d"]))
IN_A_NODE = gemm(node("Constant", [], ["b"], value=numpy_helper.from_array(BIAS)))
SAME = {
    "bias through Identity": (GEMM, gemm(*IDENTITIES, bias="d")),
    "bias in a Constant node": (GEMM, {name: value for name, value in IN_A_NODE.items() if name != "b"}),
    "bias through Cast": (
        GEMM,
        gemm(node("Cast", ["b"], ["c"], to=TensorProto.FLOAT), bias="c") | {"b": BIAS.astype(np.float64)},
    ),
    "Gemm's defaults": (GEMM, gemm(alpha=1.0, beta=1.0, transA=0, transB=0)),
    "Gemm's weight transposed by a node": (
        GEMM,
        gemm(node("Transpose", ["w"], ["t"]), weight="t") | {"w": np.ascontiguousarray(MATRIX.T)},
    ),
    "Conv's defaults": (CONV, conv(kernel_shape=[3, 3], strides=[1, 1], dilations=[1, 1], group=1, pads=[0] * 4)),
    "padding called VALID": (CONV, conv(auto_pad="VALID")),
    "pool's defaults": (pool(), pool(strides=[1, 1], pads=[0] * 4, ceil_mode=0)),
    "axes as attribute and as input": (
        {"nodes": [node("Unsqueeze", ["x"], ["y"], axes=[0])], "opset": 11, "rank": 5},
        {"nodes": [node("Unsqueeze", ["x", "axes"], ["y"])], "axes": np.array([0]), "opset": 13, "rank": 5},
    ),
    "limits as attribute and as input": (
        {"nodes": [node("Clip", ["x"], ["y"], min=0.0, max=6.0)], "opset": 10},
        {"nodes": [node("Clip", ["x", "low", "high"], ["y"])], "low": np.float32(0), "high": np.float32(6)},
    ),
    "weight dequantized by a contrib operator": (dequantized(""), dequantized("com.microsoft")),
}


@pytest.mark.parametrize("case", SAME)
def test_what_means_the_same_is_the_same(case: str, tmp_path: Path) -> None:
    before, after = SAME[case]
    result = compare(tmp_path, before, after)
    assert result.is_empty, str(result)


def test_what_differs_is_named_as_the_documentation_names_it(tmp_path: Path) -> None:
    assert compare(tmp_path, GEMM, gemm(alpha=0.5)).changed[0].changes == ("alpha 1 → 0.5",)
    clips = [{"nodes": [node("Clip", ["x", "", "high"], ["y"])], "high": np.float32(high)} for high in (6, 8)]
    assert compare(tmp_path, clips[0], clips[1]).changed[0].changes == ("max 6 → 8",)


def test_a_changed_bias_behind_identity_is_told(tmp_path: Path) -> None:
    through = gemm(*IDENTITIES, bias="d") | {"b": BIAS * 2}
    assert compare(tmp_path, GEMM, through).changed[0].changes == ("bias changed by 100.0%",)


def test_a_constant_that_cannot_be_computed_stays_a_node(tmp_path: Path) -> None:
    odd = {"nodes": [node("Odd", ["b"], ["c"], domain="example.com"), node("Add", ["x", "c"], ["y"])], "b": BIAS}
    result = compare(tmp_path, odd, odd)
    assert result.is_empty
    assert [n.state.op for n in result.nodes] == ["input", "Odd", "Add", "output"]


def test_random_numbers_are_not_constants(tmp_path: Path) -> None:
    noise = {"nodes": [node("RandomNormal", [], ["n"], shape=[1, 4, 6, 6]), node("Add", ["x", "n"], ["y"])]}
    assert compare(tmp_path, noise, noise).is_empty


def test_bfloat16_weights_and_biases_are_read(tmp_path: Path) -> None:
    half = [
        helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.flatten())
        for name, array in (("w", WEIGHT), ("b", BIAS))
    ]
    paths = []
    for name, factor in (("a", 1.0), ("b", 2.0)):
        path = write(tmp_path / f"{name}.onnx", [node("Conv", ["h", "w", "b"], ["y"])])
        model = onnx.load(path)
        bias = helper.make_tensor("b", TensorProto.BFLOAT16, BIAS.shape, (factor * BIAS).tolist())
        model.graph.initializer.extend([half[0], bias])
        model.graph.node.insert(0, node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16))
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
        model.opset_import[0].version = 22
        model.ir_version = 10
        onnx.save(model, path)
        paths.append(path)
    (changed,) = diff(*paths).changed
    assert changed.changes == ("bias changed by 100.0%",)
