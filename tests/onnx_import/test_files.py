"""Whole files, as the common exporters write them, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import torchvision
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

import fxprune
from fxprune.errors import OnnxImportError, TraceError
from fxprune.intake.record import intake
from tests.onnx_import.models import assert_same, in_onnxruntime, in_torch, make_model

RNG = np.random.default_rng(1)
IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str = "y", name: str = "", **attributes: Any) -> Any:
    names = ["" if n == "-" else n for n in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=name or f"{op}_{outputs.split()[0]}", **attributes)


# torch


class Net(nn.Module):
    """A bit of everything that torch's exporters write in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(16, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = F.silu(self.norm(self.down(first)))
        both = torch.cat([first, F.interpolate(self.up(second), size=first.shape[2:], mode="bilinear")], 1)
        pooled = F.adaptive_avg_pool2d(F.max_pool2d(both, 3, 2, ceil_mode=True), 1).flatten(1)
        return self.out(F.gelu(self.head(pooled)))


def export(net: nn.Module, path: Path, *, dynamo: bool, dynamic: bool, images: Tensor = IMAGES) -> Path:
    if dynamo:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        options: dict[str, Any] = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes}
    else:
        options = {"dynamo": False, "dynamic_axes": {"image": {0: "batch"}} if dynamic else None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (images[: 2 if dynamic else 1],),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            **options,
        )
    return path


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_both_exporters_of_torch(tmp_path: Path, dynamo: bool, dynamic: bool) -> None:
    net = Net().eval()
    net.stem[1].running_mean.normal_()
    graph_module = fxprune.import_onnx(export(net, tmp_path / "net.onnx", dynamo=dynamo, dynamic=dynamic))
    for images in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(graph_module(IMAGES[:images]), net(IMAGES[:images]), rtol=1e-4, atol=1e-5)
    names = {str(n.target) for n in graph_module.graph.find_nodes(op="call_module")}
    assert {"stem.0", "down", "up", "head", "out"} <= names


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=4)


def _swin() -> nn.Module:
    return torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=4)


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=4), 32),
    "shufflenet": (lambda: torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], num_classes=4), 32),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), 32),
    "vit": (_vit, 16),
    "swin": (_swin, 16),
}


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_with_one_fixed_image(tmp_path: Path, name: str, dynamo: bool) -> None:
    make, side = TORCHVISION[name]
    net = make().eval()
    images = torch.randn(3, 3, side, side)
    graph_module = fxprune.import_onnx(export(net, tmp_path / "net.onnx", dynamo=dynamo, dynamic=False, images=images))
    with torch.no_grad():
        torch.testing.assert_close(graph_module(images), net(images), rtol=1e-3, atol=1e-4)


# tf2onnx and Keras


def keras_like() -> ModelProto:
    """Images with channels last, Transpose at the door, SAME_UPPER, Pad nodes, Clip with constants, MatMul and Add."""
    nodes = [
        node("Transpose", "x:0", "nchw", "model/stem/Conv2D__6", perm=[0, 3, 1, 2]),
        node("Conv", "nchw model/stem/Conv2D/ReadVariableOp:0 model/stem/BiasAdd/ReadVariableOp:0", "c1", "model/stem/Conv2D",
             auto_pad="SAME_UPPER", strides=[2, 2]),
        node("Clip", "c1 zero six", "a1", "model/relu6"),
        node("Pad", "a1 pads", "p1", "model/pad/Pad"),
        node("Conv", "p1 dw", "c2", "model/dw/depthwise", strides=[2, 2], group=8),
        node("BatchNormalization", "c2 g b m v", "n2", "model/bn/FusedBatchNormV3", epsilon=0.001),
        node("Relu", "n2", "a2", "model/relu"),
        node("Conv", "a2 pw", "c3", "model/pw/Conv2D"),
        node("Transpose", "c3", "nhwc", "model/mean__12", perm=[0, 2, 3, 1]),
        node("ReduceMean", "nhwc", "mean", "model/mean", axes=[1, 2], keepdims=0),
        node("MatMul", "mean model/fc/MatMul/ReadVariableOp:0", "mm", "model/fc/MatMul"),
        node("Add", "mm fc_b", "logits", "model/fc/BiasAdd"),
        node("Softmax", "logits", "Identity:0", "model/softmax"),
    ]  # fmt: skip
    stored = {
        "model/stem/Conv2D/ReadVariableOp:0": floats(8, 3, 3, 3), "model/stem/BiasAdd/ReadVariableOp:0": floats(8),
        "zero": np.float32(0), "six": np.float32(6), "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1]), "dw": floats(8, 1, 3, 3),
        "g": floats(8), "b": floats(8), "m": floats(8), "v": np.abs(floats(8)) + 0.1, "pw": floats(16, 8, 1, 1),
        "model/fc/MatMul/ReadVariableOp:0": floats(16, 4), "fc_b": floats(4),
    }  # fmt: skip
    return make_model(nodes, {"x:0": ["unk__1", 15, 13, 3]}, ("Identity:0",), stored, opset=13)


def test_keras_like(tmp_path: Path) -> None:
    model = keras_like()
    graph_module = assert_same(model)
    modules = [str(n.target) for n in graph_module.graph.find_nodes(op="call_module")]
    assert modules == ["model.stem", "model.dw", "model.bn", "model.pw", "model.fc"]
    assert graph_module.get_submodule("model.fc").bias is not None
    images = torch.randn(64, 15, 13, 3)
    compiled = fxprune.compile(model, images.split(16), "2:4", progress=False)
    assert {row.name: row.status for row in compiled.report.layers if row.status == "pruned"} == {
        "model.pw": "pruned", "model.fc": "pruned",
    }  # fmt: skip
    report = fxprune.export_onnx(compiled, tmp_path / "out.onnx", images[:2])
    assert [text.split(": ")[0] for text in (*report.inputs, *report.outputs)] == ["x:0", "Identity:0"]


def test_images_with_channels_first_for_a_file_with_channels_last() -> None:
    with pytest.raises(OnnxImportError, match=r"channels last.*|channels first"):
        fxprune.compile(keras_like(), [torch.randn(8, 3, 15, 13)], progress=False)
    with pytest.raises(OnnxImportError, match=r"x:0: float32 \(unk__1, 15, 13, 3\).*Resize the images|permute"):
        fxprune.compile(keras_like(), [torch.randn(8, 15, 15, 3)], progress=False)


# PaddlePaddle and MMDeploy


def paddle_like() -> ModelProto:
    """Weights in Constant nodes, names with dots, shape arithmetic, HardSigmoid gates, Resize to another map's size."""
    constants = {
        "conv2d_0.w_0": floats(8, 3, 3, 3), "conv2d_1.w_0": floats(16, 8, 3, 3), "conv2d_2.w_0": floats(4, 16, 1, 1),
        "conv2d_2.b_0": floats(4), "conv2d_3.w_0": floats(16, 4, 1, 1), "conv2d_4.w_0": floats(8, 16, 1, 1),
        "batch_norm_0.w_0": floats(8), "batch_norm_0.b_0": floats(8), "batch_norm_0.w_1": floats(8),
        "batch_norm_0.w_2": np.abs(floats(8)) + 0.1, "shape4": np.array([1, 4, 1, 1]),
        "two": np.array([2]), "four": np.array([4]),
        "zero": np.array([0]), "first": np.array([0]), "linear_0.w_0": floats(16, 5), "linear_0.b_0": floats(5),
        "squash": np.array([0, -1]), "axes": np.array([2, 3]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))
        for name, array in constants.items()
    ]
    nodes += [
        node("Conv", "x conv2d_0.w_0", "c0", "p2o.Conv.0", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", "c0 batch_norm_0.w_0 batch_norm_0.b_0 batch_norm_0.w_1 batch_norm_0.w_2", "n0", "p2o.BN.0"),
        node("HardSwish", "n0", "a0", "p2o.HardSwish.0"),
        node("Conv", "a0 conv2d_1.w_0", "c1", "p2o.Conv.1", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("GlobalAveragePool", "c1", "pooled", "p2o.Pool.0"),
        node("Conv", "pooled conv2d_2.w_0", "s0", "p2o.Conv.2"),
        node("Reshape", "conv2d_2.b_0 shape4", "bias", "p2o.Reshape.0"),
        node("Add", "s0 bias", "s1", "p2o.Add.0"),
        node("Relu", "s1", "s2", "p2o.Relu.0"),
        node("Conv", "s2 conv2d_3.w_0", "s3", "p2o.Conv.3"),
        node("HardSigmoid", "s3", "gate", "p2o.HardSigmoid.0", alpha=0.2, beta=0.5),
        node("Mul", "c1 gate", "gated", "p2o.Mul.0"),
        node("Conv", "gated conv2d_4.w_0", "c4", "p2o.Conv.4"),
        node("Shape", "a0", "sa", "p2o.Shape.0"), node("Slice", "sa two four zero", "hw", "p2o.Slice.0"),
        node("Shape", "c4", "sc", "p2o.Shape.1"), node("Slice", "sc first two zero", "nc", "p2o.Slice.1"),
        node("Concat", "nc hw", "to", "p2o.Concat.0", axis=0),
        helper.make_node("Resize", ["c4", "", "", "to"], ["up"], name="p2o.Resize.0", mode="nearest",
                         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        node("Concat", "up a0", "both", "p2o.Concat.1", axis=1),
        node("ReduceMean", "both axes", "mean", "p2o.Mean.0", keepdims=1),
        node("Reshape", "mean squash", "flat", "p2o.Reshape.1"),
        node("MatMul", "flat linear_0.w_0", "mm", "p2o.MatMul.0"),
        node("Add", "mm linear_0.b_0", "out", "p2o.Add.1"),
        node("Split", "out", "left right", "p2o.Split.0", axis=1, num_outputs=2),
    ]  # fmt: skip
    return make_model(nodes, {"x": ["n", 3, "h", "w"]}, ("left", "right", "both"), opset=18)


def test_paddle_like(tmp_path: Path) -> None:
    model = paddle_like()
    graph_module = fxprune.import_onnx(model)
    assert intake(graph_module).lines == []  # type: ignore[union-attr]
    for shape in ((1, 3, 16, 16), (3, 3, 32, 24), (2, 3, 17, 21)):  # Height and width stay open.
        images = floats(*shape)
        for a, b in zip(in_onnxruntime(model, images), in_torch(graph_module, images), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)
    assert graph_module.get_submodule("conv2d_2").bias is not None
    compiled = fxprune.compile(model, IMAGES.split(16), "2:4", progress=False)
    pruned = {row.name for row in compiled.report.layers if row.status == "pruned"}
    assert pruned == {"conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4", "linear_0"}
    report = fxprune.export_onnx(compiled, tmp_path / "out.onnx", IMAGES[:2], dynamic_size=True)
    assert [text.split(": ")[0] for text in report.outputs] == ["left", "right", "both"]


# Everything behind it


def test_everything_behind_it(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=True, dynamic=True)
    compiled = fxprune.compile(str(path), IMAGES.split(16), "2:4", progress=False)
    assert compiled.report["down"].status == "pruned"
    assert compiled.report["down"].sparsity == 0.5
    exported = fxprune.export_onnx(compiled, tmp_path / "pruned.onnx", IMAGES[:3], loader=IMAGES.split(32))
    assert exported.parity.samples == 64
    assert [text.split(": ")[0] for text in (*exported.inputs, *exported.outputs)] == ["image", "logits"]
    fxprune.validate_onnx(compiled, tmp_path / "pruned.onnx", IMAGES.split(20), progress=False)
    between = fxprune.diff(path, tmp_path / "pruned.onnx")
    changed = {
        n.name
        for n in between.nodes
        if "pruned to 2:4" in " ".join(n.changes) or (n.after and n.after.pattern == "2:4")
    }
    assert {"down", "head", "out"} <= changed
    fxprune.save(compiled, tmp_path / "pruned.pt")
    loaded = fxprune.load(tmp_path / "pruned.pt")
    torch.testing.assert_close(loaded(IMAGES), compiled(IMAGES), rtol=0, atol=0)
    assert intake(loaded).inputs == ("image",)  # type: ignore[union-attr]
    again = fxprune.export_onnx(loaded, tmp_path / "again.onnx", IMAGES[:3])
    assert again.inputs == exported.inputs


def test_everything_excluded_is_the_files_function(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=False, dynamic=True)
    compiled = fxprune.compile(path, IMAGES.split(32), exclude=("*",), progress=False)
    torch.testing.assert_close(compiled(IMAGES), fxprune.import_onnx(path)(IMAGES), rtol=0, atol=0)
    assert all(row.status == "kept" for row in compiled.report.layers)


def test_layers_are_excluded_and_chosen_by_their_names(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=False, dynamic=True)
    compiled = fxprune.compile(
        path, IMAGES.split(32), {"head": "1:4", "*": "2:4"}, method="magnitude", exclude=("up",), progress=False
    )
    assert (compiled.report["head"].pattern, compiled.report["up"].reason) == ("1:4", "excluded")
    with pytest.raises(fxprune.FxPruneError, match=r"'stem\.9' matches no module"):
        fxprune.compile(path, IMAGES.split(32), exclude=("stem.9",), progress=False)


def test_low_rank_and_scan(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=True, dynamic=False)
    factored = fxprune.low_rank(path, IMAGES.split(32), "ratio:0.5", progress=False)
    assert any(row.status == "factored" for row in factored.report.layers)
    found = fxprune.scan(path, IMAGES.split(32), ["2:4"], method="magnitude", progress=False)
    assert found["down", "2:4"].cost > 0


def test_a_model_in_memory_is_a_file_too(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=False, dynamic=True)
    torch.testing.assert_close(
        fxprune.import_onnx(onnx.load(str(path)))(IMAGES), fxprune.import_onnx(path)(IMAGES), rtol=0, atol=0
    )


# Forms of storage


def test_external_data(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=False, dynamic=True)
    onnx.save(
        onnx.load(str(path)),
        str(tmp_path / "apart.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    torch.testing.assert_close(
        fxprune.import_onnx(tmp_path / "apart.onnx")(IMAGES), fxprune.import_onnx(path)(IMAGES), rtol=0, atol=0
    )
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(fxprune.FxPruneError, match="lack its external data"):
        fxprune.import_onnx(tmp_path / "apart.onnx")


def test_sparse_initializers(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 144, 8)
    ).eval()
    compiled = fxprune.compile(net, IMAGES.split(32), "0.9", method="magnitude", progress=False)
    report = fxprune.export_onnx(compiled, tmp_path / "sparse.onnx", IMAGES[:2], sparse_initializers=True)
    assert report.sparse_initializers
    graph_module = fxprune.import_onnx(tmp_path / "sparse.onnx")
    with torch.no_grad():
        torch.testing.assert_close(graph_module(IMAGES), compiled(IMAGES), rtol=1e-4, atol=1e-5)
    assert float((graph_module.get_submodule("2").weight == 0).double().mean()) == pytest.approx(0.9, abs=0.01)


def test_half_precision_is_taken_in_half(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, 8)).eval()
    compiled = fxprune.compile(net, IMAGES.split(32), "2:4", method="magnitude", exclude=("*",), progress=False)
    fxprune.export_onnx(compiled, tmp_path / "half.onnx", IMAGES[:2], precision="fp16")
    pruned = fxprune.compile(tmp_path / "half.onnx", IMAGES.split(32), "2:4", progress=False)
    weight = pruned.get_submodule("2").weight
    assert weight.dtype == torch.float16
    assert float((weight == 0).double().mean()) == 0.5
    assert pruned(IMAGES).dtype == torch.float32
    again = fxprune.export_onnx(pruned, tmp_path / "again.onnx", IMAGES[:2], precision="fp16")
    assert again.precision == "fp16"


def test_weights_that_two_nodes_share_are_one_layer() -> None:
    nodes = [node("Conv", "x layer.weight", "a", pads=[1, 1, 1, 1]), node("Conv", "a layer.weight", "b", pads=[1, 1, 1, 1]),
             node("Conv", "b layer.weight", pads=[1, 1, 1, 1], strides=[2, 2])]  # fmt: skip
    graph_module = assert_same(make_model(nodes, {"x": ["N", 4, 8, 8]}, stored={"layer.weight": floats(4, 4, 3, 3)}))
    called = [str(n.target) for n in graph_module.graph.find_nodes(op="call_module")]
    assert called[0] == called[1] == "layer"
    assert called[2] != "layer"
    assert graph_module.get_submodule(called[2]).weight is graph_module.get_submodule("layer").weight


# Subgraphs


def branching(condition: list[Any], stored: dict[str, Any]) -> ModelProto:
    def branch(name: str, nodes: list[Any], output: str) -> Any:
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])

    then = branch("then", [node("Relu", "x", "t")], "t")
    other = branch("other", [node("Constant", "", "two", value_float=2.0), node("Mul", "x two", "e")], "e")
    other.node[0].ClearField("input")
    choice = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other)
    return make_model([*condition, choice], {"x": ["N", 3, 4]}, stored=stored)


@pytest.mark.parametrize("value", [False, True])
def test_a_branch_that_is_always_taken(value: bool) -> None:
    assert_same(branching([], {"c": np.array(value)}))


def test_a_branch_by_a_size_that_is_known() -> None:
    condition = [node("Shape", "x", "s"), node("Gather", "s one", "n"), node("Equal", "n three", "c")]
    graph_module = assert_same(branching(condition, {"one": np.array(1), "three": np.array(3)}))
    assert any("relu" in str(n.target) for n in graph_module.graph.nodes)


def test_a_branch_by_numbers_of_an_image_is_named() -> None:
    condition = [node("ReduceSum", "x", "s", keepdims=0), node("Greater", "s zero", "c")]
    with pytest.raises(OnnxImportError, match=r"node 'choice' \(If\) cannot be taken: it chooses a branch by numbers"):
        fxprune.import_onnx(branching(condition, {"zero": np.float32(0)}))


# Refused


def test_an_unknown_operator_is_named() -> None:
    model = make_model(
        [node("Conv", "x w", "c"), node("NonMaxSuppression", "c c", "y", "boxes")],
        {"x": ["N", 3, 4, 4]},
        stored={"w": floats(3, 3, 1, 1)},
    )
    with pytest.raises(
        OnnxImportError, match=r"node 'boxes' \(NonMaxSuppression\) .*no such operator.*onnx.utils.extract_model"
    ):
        fxprune.import_onnx(model)
    assert issubclass(OnnxImportError, TraceError)


def test_the_remedy_for_an_unknown_operator_works(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("Det", "c", "y", "the end")]
    model = make_model(nodes, {"x": ["N", 3, 4, 4]}, stored={"w": floats(3, 3, 1, 1)})
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    onnx.save(model, str(tmp_path / "whole.onnx"))
    with pytest.raises(OnnxImportError, match="extract_model"):
        fxprune.import_onnx(tmp_path / "whole.onnx")
    onnx.utils.extract_model(str(tmp_path / "whole.onnx"), str(tmp_path / "part.onnx"), ["x"], ["c"])
    assert_same(onnx.load(str(tmp_path / "part.onnx")))


def test_an_engines_own_operator_is_named() -> None:
    model = make_model(
        [helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft", name="f")],
        {"x": ["N", 3, 4, 4]},
        stored={"w": floats(3, 3, 1, 1)},
    )
    with pytest.raises(OnnxImportError, match=r"'f' \(com.microsoft.FusedConv\).*before a tool for one engine"):
        fxprune.import_onnx(model)


@pytest.mark.parametrize("op", ["QDQ", "QLinearConv"])
def test_quantised_files_are_refused(op: str) -> None:
    stored: dict[str, Any] = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": RNG.integers(-9, 9, (4, 3, 1, 1)).astype(np.int8),
    }
    if op == "QDQ":
        nodes = [node("DequantizeLinear", "w s z", "wf"), node("Conv", "x wf")]
    else:
        nodes = [
            node("QuantizeLinear", "x s z", "q"),
            node("QLinearConv", "q s z w s z s z", "c"),
            node("DequantizeLinear", "c s z"),
        ]
    with pytest.raises(OnnxImportError, match=r"is quantised .* give the float file"):
        fxprune.import_onnx(make_model(nodes, {"x": ["N", 3, 4, 4]}, stored=stored))


def test_loops_are_named() -> None:
    body = helper.make_graph(
        [node("Identity", "c", "c2"), node("Relu", "v", "v2")], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v2", TensorProto.FLOAT, None)],
    )  # fmt: skip
    loop = helper.make_node("Loop", ["n", "c", "x"], ["y"], name="again", body=body)
    model = make_model([loop], {"x": ["N", 3]}, stored={"n": np.array(3), "c": np.array(True)})
    with pytest.raises(OnnxImportError, match=r"'again' \(Loop\)"):
        fxprune.import_onnx(model)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(fxprune.FxPruneError, match="there is no file"):
        fxprune.compile(tmp_path / "no.onnx", [IMAGES], progress=False)
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x07nothing")
    with pytest.raises(fxprune.FxPruneError, match="not a complete ONNX file"):
        fxprune.compile(tmp_path / "bad.onnx", [IMAGES], progress=False)
    with pytest.raises(TraceError, match=r"expected a torch\.nn\.Module"):
        fxprune.compile(tmp_path / "weights.pt", [IMAGES], progress=False)  # type: ignore[arg-type]


def test_images_of_another_size(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=False, dynamic=True)
    with pytest.raises(
        OnnxImportError,
        match=r"float32 \(batch, 3, 16, 16\), and the images are \(4, 3, 32, 32\). Resize the images to 16 x 16",
    ):
        fxprune.compile(path, [torch.randn(4, 3, 32, 32)], progress=False)


def test_images_of_another_type(tmp_path: Path) -> None:
    path = export(Net(), tmp_path / "net.onnx", dynamo=False, dynamic=True)
    for dtype, said in ((torch.uint8, r"to\(torch.float32\) / 255"), (torch.float64, r"to\(torch.float32\)$")):
        with pytest.raises(OnnxImportError, match=said):
            fxprune.compile(path, [torch.ones(4, 3, 16, 16, dtype=dtype)], progress=False)


def test_a_height_that_the_file_needs_is_frozen() -> None:
    nodes = [node("Conv", "x w", "c"), node("Flatten", "c", "f"), node("MatMul", "f m")]
    model = make_model(nodes, {"x": ["N", 3, "h", "w"]}, stored={"w": floats(4, 3, 1, 1), "m": floats(4 * 30, 4)})
    with pytest.raises(OnnxImportError, match="give example_inputs"):
        fxprune.import_onnx(model)
    graph_module = fxprune.import_onnx(model, torch.randn(2, 3, 5, 6))
    assert "MatMul_y" in intake(graph_module).lines[0]  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="for inputs 'x' of 5 along axis 2"):
        graph_module(torch.randn(2, 3, 6, 5))


# Old operator sets


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operator_set_6() -> None:
    """Add with the attributes broadcast and axis, BatchNormalization with is_test, as Caffe2 wrote them."""
    nodes = [
        node("Conv", "x w", "c"), helper.make_node("Add", ["c", "b"], ["d"], name="add", broadcast=1, axis=1),
        node("BatchNormalization", "d s b m v", "n", is_test=1), node("Dropout", "n", "o", is_test=1),
        node("Reshape", "o to", "r"), helper.make_node("Gemm", ["r", "g", "gb"], ["y"], name="fc", broadcast=1, transB=1),
    ]  # fmt: skip
    stored = {
        "w": floats(4, 3, 1, 1), "b": floats(4), "s": floats(4), "m": floats(4), "v": np.abs(floats(4)) + 0.1,
        "to": np.array([0, -1]), "g": floats(5, 64), "gb": floats(5),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "old", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )  # fmt: skip
    for name, array in stored.items():  # As files of that time have it: stored tensors are inputs too.
        graph.input.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3)
    graph_module = fxprune.import_onnx(model)
    images = floats(3, 3, 4, 4)
    c = np.einsum("oi,nihw->nohw", stored["w"][:, :, 0, 0], images) + stored["b"][:, None, None]
    scale = stored["s"] / np.sqrt(stored["v"] + 1e-5)
    n = (c - stored["m"][:, None, None]) * scale[:, None, None] + stored["b"][:, None, None]
    wanted = n.reshape(3, -1) @ stored["g"].T + stored["gb"]
    np.testing.assert_allclose(in_torch(graph_module, images)[0], wanted, rtol=1e-4, atol=1e-4)
