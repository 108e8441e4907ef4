"""A batch size that a file fixes is opened where its operators allow that, and named where they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, helper
from torch import nn

import fxprune
from fxprune.errors import OnnxImportError
from fxprune.intake.record import intake
from tests.onnx_import.models import assert_same, in_torch, make_model

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str = "y", **attributes: object) -> helper.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op}_{outputs}", **attributes)


def assert_open(model: ModelProto) -> None:
    """For several images together the graph gives what onnxruntime gives for each."""
    graph_module = assert_same(model, images=(1,))
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    images = floats(4 * shape[0], *shape[1:])
    together = in_torch(graph_module, images)
    alone = [in_torch(graph_module, images[i : i + shape[0]]) for i in range(0, len(images), shape[0])]
    for i, whole in enumerate(together):
        axis = next(d for d, (a, b) in enumerate(zip(whole.shape, alone[0][i].shape, strict=True)) if a != b)
        np.testing.assert_allclose(whole, np.concatenate([part[i] for part in alone], axis), rtol=1e-5, atol=1e-5)


def reshapes(*targets: list[int], shape: list[int], batch: int = 1) -> ModelProto:
    nodes, stored, name = [], {}, "x"
    for i, target in enumerate(targets):
        stored[f"s{i}"] = np.array(target)
        nodes.append(node("Reshape", f"{name} s{i}", "y" if i == len(targets) - 1 else f"r{i}"))
        name = f"r{i}"
    return make_model(nodes, {"x": [batch, *shape]}, stored=stored)


@pytest.mark.parametrize(
    "targets",
    [
        ([1, 60],), ([1, -1],), ([-1, 60],), ([1, 4, 15],), ([1, -1, 5],), ([4, 15], [1, 60]),
        ([1, 2, 2, 3, 5], [2, 30], [1, 2, 30]),
        ([1, 1, 1, 60], [60], [1, 60]),
    ],
)  # fmt: skip
def test_reshape(targets: tuple[list[int], ...]) -> None:
    assert_open(reshapes(*targets, shape=[4, 3, 5]))


@pytest.mark.parametrize("targets", [([2, 60],), ([2, -1],), ([8, 15], [2, 60]), ([2, 4, -1],)])
def test_reshape_of_a_batch_of_two(targets: tuple[list[int], ...]) -> None:
    assert_open(reshapes(*targets, shape=[4, 3, 5], batch=2))


def test_windows_of_a_transformer() -> None:
    nodes = [
        node("Reshape", "x to_parts", "parts"), node("Transpose", "parts", "turned", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "turned to_windows", "windows"), node("MatMul", "windows w", "made"), node("Reshape", "made back", "b"),
        node("Transpose", "b", "c", perm=[0, 1, 3, 2, 4, 5]), node("Reshape", "c whole"),
    ]  # fmt: skip
    stored = {
        "to_parts": np.array([1, 2, 4, 2, 4, 6]), "to_windows": np.array([4, 16, 6]), "w": floats(6, 6),
        "back": np.array([1, 2, 2, 4, 4, 6]), "whole": np.array([1, 8, 8, 6]),
    }  # fmt: skip
    assert_open(make_model(nodes, {"x": [1, 8, 8, 6]}, stored=stored))


def test_attention_with_positions_first() -> None:
    """torch's own attention: [L, N, E] -> [L, N * heads, D], and [L, N, E] -> [L * N, E], where N = 1 does not show."""
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]), node("MatMul", "t wq", "q"), node("Reshape", "q heads", "h"),
        node("Transpose", "h", "ht", perm=[1, 0, 2]), node("Transpose", "h", "hk", perm=[1, 2, 0]),
        node("MatMul", "ht hk", "scores"),
        node("Softmax", "scores", "p", axis=-1), node("MatMul", "p ht", "o"), node("Transpose", "o", "ot", perm=[1, 0, 2]),
        node("Reshape", "ot rows", "flat"), node("Gemm", "flat wo", "g"), node("Reshape", "g again", "a"),
        node("Transpose", "a", perm=[1, 0, 2]),
    ]  # fmt: skip
    stored = {
        "wq": floats(6, 6), "heads": np.array([5, 2, 3]), "rows": np.array([5, 6]), "wo": floats(6, 6),
        "again": np.array([5, 1, 6]),
    }  # fmt: skip
    assert_open(make_model(nodes, {"x": [1, 5, 6]}, stored=stored))


def test_a_class_token_is_given_to_each_image() -> None:
    nodes = [node("Concat", "token x", "joined", axis=1), node("Add", "joined positions")]
    assert_open(make_model(nodes, {"x": [1, 4, 6]}, stored={"token": floats(1, 1, 6), "positions": floats(1, 5, 6)}))


def test_a_class_token_stored_for_two_images() -> None:
    token = floats(1, 1, 6).repeat(2, 0)
    assert_open(make_model([node("Concat", "token x", axis=1)], {"x": [2, 4, 6]}, stored={"token": token}))


def test_expand_and_resize_to_sizes() -> None:
    nodes = [
        node("ReduceMean", "x", "m", axes=[2, 3]),
        node("Expand", "m s", "e"),
        node("Resize", "e  to"),
    ]
    nodes[2] = helper.make_node("Resize", ["e", "", "", "to"], ["y"], mode="nearest", name="r")
    assert_open(
        make_model(nodes, {"x": [1, 3, 4, 4]}, stored={"s": np.array([1, 3, 2, 2]), "to": np.array([1, 3, 6, 6])})
    )


def test_shapes_that_the_file_computes() -> None:
    """Shape -> Gather -> Unsqueeze -> Concat -> Reshape, as torch's older exporter writes `x.view(x.size(0), -1, w)`."""
    nodes = [
        node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Gather", "s three", "w"),
        node("Unsqueeze", "n axis", "n1"),
        node("Unsqueeze", "w axis", "w1"), node("Concat", "n1 rest w1", "to", axis=0), node("Reshape", "x to", "r"),
        node("Mul", "w two", "ww"), node("Unsqueeze", "ww axis", "ww1"), node("Slice", "r start ww1 last"),
    ]  # fmt: skip
    stored = {
        "zero": np.array(0), "three": np.array(3), "axis": np.array([0]), "rest": np.array([-1]), "two": np.array(2),
        "start": np.array([0]), "last": np.array([1]),
    }  # fmt: skip
    model = make_model(nodes, {"x": ["N", 4, "h", "w"]}, stored=stored)
    graph_module = fxprune.import_onnx(model)
    for shape in ((1, 4, 5, 3), (3, 4, 6, 2)):
        images = floats(*shape)
        wanted = images.reshape(shape[0], -1, shape[3])[:, : 2 * shape[3]]
        np.testing.assert_array_equal(in_torch(graph_module, images)[0], wanted)


def test_a_batch_that_is_mixed_is_named() -> None:
    nodes = [node("Conv", "x w", "c"), node("Softmax", "c", "s", axis=0), node("MatMul", "s m")]
    model = make_model(nodes, {"x": [2, 3, 4, 4]}, stored={"w": floats(4, 3, 1, 1), "m": floats(4, 4)})
    with pytest.raises(
        OnnxImportError, match=r"2 images at a time and cannot be opened to 8: its output 0 mixes.*batches of 2"
    ):
        fxprune.compile(model, [torch.randn(8, 3, 4, 4)] * 2, method="magnitude", progress=False)
    compiled = fxprune.compile(model, torch.randn(16, 3, 4, 4).split(2), method="magnitude", progress=False)
    assert any("for batches of 2 only" in line for line in intake(compiled).lines)  # type: ignore[union-attr]


def test_a_node_that_needs_the_files_batch_size_is_named() -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c offsets")]
    model = make_model(nodes, {"x": [3, 4, 2, 2]}, stored={"w": floats(4, 4, 1, 1), "offsets": floats(3, 4, 2, 2)})
    with pytest.raises(OnnxImportError, match=r"takes 3 images at a time .* node 'Add_y' \(Add\)"):
        fxprune.compile(model, [torch.randn(8, 4, 2, 2)], method="magnitude", progress=False)


def test_a_file_for_one_image_is_calibrated_on_many(tmp_path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 6 * 6, 4)
    ).eval()
    torch.onnx.export(net, (torch.randn(1, 3, 16, 16),), str(tmp_path / "one.onnx"), dynamo=True, verbose=False)
    images = torch.randn(64, 3, 16, 16)
    compiled = fxprune.compile(tmp_path / "one.onnx", images.split(16), "2:4", progress=False)
    assert (
        compiled.report.layers_pruned
        if hasattr(compiled.report, "layers_pruned")
        else compiled.report["4"].status == "pruned"
    )
    report = fxprune.export_onnx(compiled, tmp_path / "open.onnx", images[:2])
    assert len(report.parity.batch_sizes) == 2


def test_tensors_made_of_sizes() -> None:
    """ConstantOfShape, Range and a size as a number, of a batch that is open."""
    nodes = [
        node("Shape", "x", "s"), node("ConstantOfShape", "s", "filled"), node("Add", "x filled", "a"),
        node("Gather", "s three", "w"),
        node("Range", "zero w one", "counted"), node("Cast", "counted", "c", to=1), node("Add", "a c", "b"),
        node("Cast", "s", "sizes", to=1), node("ReduceSum", "sizes", "total"), node("Mul", "b total"),
    ]  # fmt: skip
    stored = {"three": np.array(3), "zero": np.array(0), "one": np.array(1)}
    model = make_model(nodes, {"x": ["N", 2, "h", "w"]}, stored=stored)
    graph_module = fxprune.import_onnx(model)
    for shape in ((1, 2, 5, 3), (3, 2, 6, 2)):
        images = floats(*shape)
        wanted = (images + np.arange(shape[3])) * sum(shape)
        np.testing.assert_allclose(in_torch(graph_module, images)[0], wanted, rtol=1e-5)


def test_a_node_of_another_form_is_named() -> None:
    model = make_model([node("Transpose", "x", perm=[0, 1, 2, 3, 4, 5])], {"x": ["N", 3, 4]})
    with pytest.raises(OnnxImportError, match=r"node 'Transpose_y' \(Transpose\)"):
        fxprune.import_onnx(model)
    model = make_model([node("Relu", "x", "r"), node("Softmax", "r", axis="last")], {"x": ["N", 3, 4]})
    with pytest.raises(OnnxImportError, match=r"node 'Softmax_y' \(Softmax\) is not as its operator set has it"):
        fxprune.import_onnx(model)
