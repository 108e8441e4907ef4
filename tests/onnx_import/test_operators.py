"""Each operator, with random attributes and odd shapes, against onnxruntime on batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

import fxprune
from tests.onnx_import.models import assert_same, make_model

Random = np.random.Generator
Case = Callable[[Random], ModelProto]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def floats(rng: Random, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def pick(rng: Random, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    return helper.make_node(
        op,
        ["" if name == "-" else name for name in inputs.split()],
        outputs.split(),
        name=f"the_{op}_{outputs}",
        **attributes,
    )


def window(rng: Random, dims: int, *, dilated: bool = True, padded: bool = True) -> dict[str, Any]:
    """Kernel, strides, dilations and padding of a convolution or pool."""
    kernel = [int(k) for k in rng.integers(1, 4, dims)]
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": [int(s) for s in rng.integers(1, 4, dims)]}
    if dilated and rng.random() < 0.5:
        found["dilations"] = [int(d) for d in rng.integers(1, 3, dims)]
    how = pick(rng, "none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID")
    if how == "pads" and padded:
        found["pads"] = [int(rng.integers(0, kernel[i % dims])) for i in range(2 * dims)]
    elif how != "none" and how != "pads":
        found["auto_pad"] = how
        if how.startswith("SAME"):  # onnxruntime refuses it for convolutions, and pools as if there were none
            found.pop("dilations", None)
    return found


def sizes(rng: Random, dims: int, least: int = 7) -> list[int]:
    return [int(n) for n in rng.integers(least, least + 5, dims)]


@case
def conv(rng: Random) -> ModelProto:
    dims, groups = int(rng.integers(1, 4)), pick(rng, 1, 2, 3)
    attributes = window(rng, dims)
    weight = floats(rng, 2 * groups, 2, *attributes["kernel_shape"])
    stored = {"layer.weight": weight} | ({"layer.bias": floats(rng, 2 * groups)} if rng.random() < 0.5 else {})
    inputs = "x layer.weight" + (" layer.bias" if len(stored) > 1 else "")
    return make_model(
        [node("Conv", inputs, group=groups, **attributes)], {"x": ["N", 2 * groups, *sizes(rng, dims)]}, stored=stored
    )


@case
def conv_of_a_computed_weight(rng: Random) -> ModelProto:
    nodes = [node("Mul", "w s", "scaled"), node("Conv", "x scaled", pads=[1, 0, 1, 0])]
    inputs = {"x": ["N", 3, *sizes(rng, 2)], "s": [1, 1, 1, 1]}
    return make_model(nodes, inputs, stored={"w": floats(rng, 4, 3, 3, 2)})


@case
def conv_transpose(rng: Random) -> ModelProto:
    dims, groups = int(rng.integers(1, 4)), pick(rng, 1, 2)
    attributes = window(rng, dims)
    if rng.random() < 0.4:
        attributes["output_padding"] = [int(rng.integers(0, s)) for s in attributes["strides"]]
    if attributes.get("auto_pad", "").startswith("SAME"):
        attributes.pop("output_padding", None)
        attributes["dilations"] = [1] * dims
        attributes["strides"] = [
            min(s, k) for s, k in zip(attributes["strides"], attributes["kernel_shape"], strict=True)
        ]
    if "pads" in attributes:
        attributes["kernel_shape"] = [k + 1 for k in attributes["kernel_shape"]]
    weight = floats(rng, 2 * groups, 3, *attributes["kernel_shape"])
    stored = {"w": weight} | ({"b": floats(rng, 3 * groups)} if rng.random() < 0.5 else {})
    return make_model(
        [node("ConvTranspose", " ".join(["x", *stored]), group=groups, **attributes)],
        {"x": ["N", 2 * groups, *sizes(rng, dims, 4)]}, stored=stored,
    )  # fmt: skip


@case
def conv_transpose_to_a_shape(rng: Random) -> ModelProto:
    attributes = {
        "strides": [2, 2],
        "kernel_shape": [3, 3],
        "output_shape": [int(9 + rng.integers(0, 3)), int(9 + rng.integers(0, 3))],
    }
    return make_model(
        [node("ConvTranspose", "x w", **attributes)], {"x": ["N", 2, 5, 5]}, stored={"w": floats(rng, 2, 3, 3, 3)}
    )


@case
def gemm(rng: Random) -> ModelProto:
    attributes = {"alpha": pick(rng, 1.0, 0.5), "beta": pick(rng, 1.0, 2.0), "transB": pick(rng, 0, 1)}
    weight = floats(rng, *((3, 5) if attributes["transB"] else (5, 3)))
    bias = pick(rng, floats(rng, 3), floats(rng, 1, 3), floats(rng, 1), None)
    stored = {"w": weight} | ({} if bias is None else {"b": bias})
    return make_model([node("Gemm", " ".join(["x", *stored]), **attributes)], {"x": ["N", 5]}, stored=stored)


@case
def gemm_of_two_inputs(rng: Random) -> ModelProto:
    nodes = [node("Gemm", "x w2 c", transA=1, transB=1, alpha=0.5, beta=3.0)]
    return make_model(nodes, {"x": [4, 6], "w2": [5, 4], "c": [5]})


@case
def matmul(rng: Random) -> ModelProto:
    shape = pick(rng, [6], [4, 6], [2, 4, 6])
    return make_model(
        [node("MatMul", "x w")], {"x": ["N", *shape]}, stored={"w": floats(rng, *pick(rng, (6, 5), (1, 6, 5)))}
    )


@case
def matmul_from_the_left(rng: Random) -> ModelProto:
    return make_model([node("MatMul", "w x")], {"x": ["N", 6, 5]}, stored={"w": floats(rng, 4, 6)})


@case
def matmul_with_a_bias(rng: Random) -> ModelProto:
    bias = floats(rng, *pick(rng, (5,), (1, 5)))
    nodes = [node("MatMul", "x w", "product"), node("Add", pick(rng, "product b", "b product"))]
    return make_model(nodes, {"x": ["N", 6]}, stored={"w": floats(rng, 6, 5), "b": bias})


@case
def conv_with_a_bias_behind_it(rng: Random) -> ModelProto:
    nodes = [node("Conv", "x w", "made"), node("Add", "made b")]
    return make_model(
        nodes,
        {"x": ["N", 3, 5, 5]},
        stored={"w": floats(rng, 4, 3, 1, 1), "b": floats(rng, *pick(rng, (1, 4, 1, 1), (4, 1, 1)))},
    )


@case
def matmul_of_two_inputs(rng: Random) -> ModelProto:
    return make_model([node("MatMul", "x z")], {"x": ["N", 2, 3, 4], "z": ["N", 2, 4, 5]})


@case
def einsum(rng: Random) -> ModelProto:
    return make_model([node("Einsum", "x z", equation="bij,bjk->bik")], {"x": ["N", 3, 4], "z": ["N", 4, 5]})


@case
def batch_normalization(rng: Random) -> ModelProto:
    stored = {"scale": floats(rng, 4), "b": floats(rng, 4), "mean": floats(rng, 4), "var": np.abs(floats(rng, 4)) + 0.1}
    shape = pick(rng, [], [5], [3, 5], [2, 3, 5])
    return make_model(
        [node("BatchNormalization", "x scale b mean var", epsilon=1e-3)],
        {"x": ["N", 4, *shape]},
        stored=stored,
        opset=pick(rng, 9, 13, 17),
    )


@case
def instance_normalization(rng: Random) -> ModelProto:
    stored = {"s": floats(rng, 4), "b": floats(rng, 4)}
    return make_model(
        [node("InstanceNormalization", "x s b", epsilon=1e-3)],
        {"x": ["N", 4, *sizes(rng, pick(rng, 1, 2, 3))]},
        stored=stored,
    )


@case
def layer_normalization(rng: Random) -> ModelProto:
    axis = pick(rng, -1, 1, -2)
    stored = {
        "s": floats(rng, *([3, 5] if axis in (1, -2) else [5])),
        "b": floats(rng, *([3, 5] if axis in (1, -2) else [5])),
    }
    return make_model([node("LayerNormalization", "x s b", axis=axis)], {"x": ["N", 3, 5]}, stored=stored)


@case
def layer_normalization_that_broadcasts(rng: Random) -> ModelProto:
    return make_model([node("LayerNormalization", "x s", axis=1)], {"x": ["N", 3, 5]}, stored={"s": floats(rng, 1, 5)})


@case
def group_normalization(rng: Random) -> ModelProto:
    return make_model(
        [node("GroupNormalization", "x s b", num_groups=2)],
        {"x": ["N", 6, 3, 4]},
        stored={"s": floats(rng, 6), "b": floats(rng, 6)},
        opset=21,
    )


@case
def lrn(rng: Random) -> ModelProto:
    return make_model([node("LRN", "x", size=pick(rng, 1, 3, 5), alpha=0.1, beta=0.5, bias=2.0)], {"x": ["N", 7, 3, 4]})


@case
def lp_normalization(rng: Random) -> ModelProto:
    return make_model([node("LpNormalization", "x", p=pick(rng, 1, 2), axis=pick(rng, -1, 1))], {"x": ["N", 4, 5]})


@case
def max_pool(rng: Random) -> ModelProto:
    dims = int(rng.integers(1, 4))
    return make_model(
        [node("MaxPool", "x", ceil_mode=pick(rng, 0, 0, 1), **window(rng, dims))], {"x": ["N", 3, *sizes(rng, dims)]}
    )


@case
def average_pool(rng: Random) -> ModelProto:
    dims = int(rng.integers(1, 4))
    attributes = window(rng, dims, dilated=False)
    return make_model(
        [node("AveragePool", "x", ceil_mode=pick(rng, 0, 0, 1), count_include_pad=pick(rng, 0, 1), **attributes)],
        {"x": ["N", 3, *sizes(rng, dims)]}, opset=19,
    )  # fmt: skip


@case
def lp_pool(rng: Random) -> ModelProto:
    return make_model(
        [node("LpPool", "x", p=pick(rng, 1, 2, 3), kernel_shape=[2, 3], strides=[1, 2], pads=[0, 1, 1, 1])],
        {"x": ["N", 3, *sizes(rng, 2)]},
    )


@case
def global_pools(rng: Random) -> ModelProto:
    op = pick(rng, "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
    return make_model([node(op, "x")], {"x": ["N", 3, *sizes(rng, pick(rng, 1, 2, 3))]})


@case
def pad(rng: Random) -> ModelProto:
    mode = pick(rng, "constant", "reflect", "edge", "wrap")
    lowest = pick(rng, 0, -1) if mode == "constant" else 0
    pads = [
        0,
        pick(rng, 0, 1),
        *map(int, rng.integers(lowest, 3, 2)),
        0,
        pick(rng, 0, 1),
        *map(int, rng.integers(lowest, 3, 2)),
    ]
    stored = {"p": np.array(pads)} | ({"v": np.float32(1.5)} if mode == "constant" and rng.random() < 0.5 else {})
    return make_model(
        [node("Pad", " ".join(["x", *stored]), mode=mode)], {"x": ["N", 3, *sizes(rng, 2)]}, stored=stored, opset=19
    )


@case
def pad_of_named_axes(rng: Random) -> ModelProto:
    stored = {"p": np.array([1, 2, 0, 3]), "axes": np.array([3, -2])}
    return make_model([node("Pad", "x p - axes")], {"x": ["N", 3, 5, 6]}, stored=stored, opset=19)


@case
def pad_of_operator_set_10(rng: Random) -> ModelProto:
    return make_model([node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 3, 0], value=0.5)], {"x": ["N", 3, 5, 6]}, opset=10)


UNARY = (
    "Abs Acos Atan Asinh Ceil Cos Cosh Elu Erf Exp Floor Neg Reciprocal Relu Round Sigmoid Sign Sin Sinh Softplus Softsign "
    "Sqrt Tan Tanh HardSwish Mish Celu Selu LeakyRelu ThresholdedRelu HardSigmoid Identity Shrink Log"
).split()


@case
def unary(rng: Random) -> ModelProto:
    op = pick(rng, *UNARY)
    attributes: dict[str, Any] = {}
    if op in ("Elu", "Celu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid") and rng.random() < 0.7:
        attributes["alpha"] = pick(rng, 0.3, 1.5)
    if op == "HardSigmoid" and rng.random() < 0.5:
        attributes = {"alpha": 1 / 6, "beta": 0.5}
    if op == "Selu" and rng.random() < 0.5:
        attributes = {"alpha": 1.2, "gamma": 1.1}
    if op == "Shrink":
        attributes = {"lambd": 0.4, "bias": pick(rng, 0.0, 0.4)}
    return make_model([node(op, "x", **attributes)], {"x": ["N", 3, 4]}, opset=18)


@case
def gelu(rng: Random) -> ModelProto:
    return make_model([node("Gelu", "x", approximate=pick(rng, "none", "tanh"))], {"x": ["N", 3]}, opset=20)


@case
def prelu(rng: Random) -> ModelProto:
    slope = floats(rng, *pick(rng, (1,), (4, 1, 1), (1, 4, 1, 1), (4, 3, 5), (5,)))
    return make_model([node("PRelu", "x s")], {"x": ["N", 4, 3, 5]}, stored={"s": slope})


@case
def clip(rng: Random) -> ModelProto:
    low, high = pick(rng, (0.0, 6.0), (0.0, None), (-0.5, 0.5), (None, 0.3))
    stored = (
        {}
        | ({"lo": np.float32(low)} if low is not None else {})
        | ({"hi": np.float32(high)} if high is not None else {})
    )
    return make_model(
        [node("Clip", f"x {'lo' if low is not None else '-'} {'hi' if high is not None else ''}")],
        {"x": ["N", 4]},
        stored=stored,
    )


@case
def clip_of_operator_set_6(rng: Random) -> ModelProto:
    return make_model(
        [node("Clip", "x", **pick(rng, {"min": 0.0, "max": 6.0}, {"min": -0.2}, {"max": 0.1}, {}))],
        {"x": ["N", 4]},
        opset=8,
    )


BINARY = "Add Sub Mul Div Pow Greater Less Equal GreaterOrEqual LessOrEqual Max Min Sum Mean PRelu".split()


@case
def binary(rng: Random) -> ModelProto:
    op = pick(rng, *BINARY[:-1])
    other = pick(rng, floats(rng), floats(rng, 1), floats(rng, 4, 1, 1), floats(rng, 1, 1, 1, 5), np.float32(2.0))
    names = pick(rng, "x c", "c x") if op not in ("Pow",) else "x c"
    if op == "Pow":
        other = np.float32(pick(rng, 2.0, 3.0))
    return make_model([node(op, names)], {"x": ["N", 4, 3, 5]}, stored={"c": np.asarray(other, np.float32)})


@case
def binary_of_two_inputs(rng: Random) -> ModelProto:
    return make_model([node(pick(rng, *BINARY[:4], *BINARY[5:-1]), "x z")], {"x": ["N", 4, 3], "z": ["N", 1, 3]})


@case
def whole_numbers(rng: Random) -> ModelProto:
    nodes = [node("Div", "x c", "d"), node("Mod", "x c", "m"), node("Add", "d m")]
    return make_model(nodes, {"x": ["N", 4]}, stored={"c": np.array([3, -2, 5, 7])}, dtypes={"x": TensorProto.INT64})


@case
def logic(rng: Random) -> ModelProto:
    nodes = [
        node("Greater", "x c", "a"), node("Less", "x c2", "b"), node(pick(rng, "And", "Or", "Xor"), "a b", "both"),
        node("Not", "both", "n"),
        node("Where", "n x c"),
    ]  # fmt: skip
    return make_model(nodes, {"x": ["N", 4]}, stored={"c": floats(rng), "c2": floats(rng, 4)})


@case
def softmax(rng: Random) -> ModelProto:
    axis = pick(rng, -1, 1, 2, 3, None)
    attributes = {} if axis is None else {"axis": axis}
    return make_model(
        [node(pick(rng, "Softmax", "LogSoftmax"), "x", **attributes)],
        {"x": ["N", 4, 3, 5]},
        opset=pick(rng, 9, 11, 12, 13, 17),
    )


@case
def cast(rng: Random) -> ModelProto:
    to = pick(rng, TensorProto.INT64, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.INT32)
    return make_model([node("Cast", "x", "c", to=to), node("Cast", "c", to=TensorProto.FLOAT)], {"x": ["N", 4]})


REDUCTIONS = (
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp".split()
)


@case
def reductions(rng: Random) -> ModelProto:
    op, opset = pick(rng, *REDUCTIONS), pick(rng, 11, 13, 18)
    axes = pick(rng, [1], [2, 3], [-1], [1, 3], [-2, -1])
    keep = pick(rng, 0, 1)
    if opset == 18 or (opset == 13 and op == "ReduceSum"):
        return make_model(
            [node(op, "x axes", keepdims=keep)], {"x": ["N", 4, 3, 5]}, stored={"axes": np.array(axes)}, opset=opset
        )
    return make_model([node(op, "x", axes=axes, keepdims=keep)], {"x": ["N", 4, 3, 5]}, opset=opset)


@case
def reduction_of_nothing(rng: Random) -> ModelProto:
    return make_model([node("ReduceSum", "x", noop_with_empty_axes=1, keepdims=0)], {"x": ["N", 4]}, opset=13)


@case
def arg(rng: Random) -> ModelProto:
    return make_model(
        [node(pick(rng, "ArgMax", "ArgMin"), "x", axis=pick(rng, 1, -1), keepdims=pick(rng, 0, 1))], {"x": ["N", 4, 7]}
    )


@case
def top_k(rng: Random) -> ModelProto:
    attributes = {"axis": pick(rng, 1, -1), "largest": pick(rng, 0, 1)}
    return make_model(
        [node("TopK", "x k", "y i", **attributes)],
        {"x": ["N", 6, 5]},
        ("y", "i"),
        {"k": np.array([3])},
        dtypes={"i": TensorProto.INT64},
    )


@case
def cumsum(rng: Random) -> ModelProto:
    attributes = {"exclusive": pick(rng, 0, 1), "reverse": pick(rng, 0, 1)}
    return make_model(
        [node("CumSum", "x a", **attributes)], {"x": ["N", 6, 5]}, stored={"a": np.array(pick(rng, 1, -1))}
    )


@case
def reshape(rng: Random) -> ModelProto:
    target = pick(rng, [0, -1], [-1, 60], [0, 4, 15], [0, 0, -1], [-1, 5, 12], [0, 2, 2, -1, 5])
    return make_model([node("Reshape", "x s")], {"x": ["N", 4, 3, 5]}, stored={"s": np.array(target)})


@case
def flatten(rng: Random) -> ModelProto:
    return make_model([node("Flatten", "x", axis=pick(rng, 1, 2, 3, -1))], {"x": ["N", 4, 3, 5]})


@case
def transpose(rng: Random) -> ModelProto:
    attributes = pick(
        rng, {"perm": [0, 2, 3, 1]}, {"perm": [0, 3, 1, 2]}, {"perm": [1, 0, 2, 3]}, {}, {"perm": [0, 1, 2, 3]}
    )
    return make_model([node("Transpose", "x", **attributes)], {"x": ["N", 4, 3, 5]})


@case
def squeeze_and_unsqueeze(rng: Random) -> ModelProto:
    axes = pick(rng, [1], [-1], [1, 3], [-1, -3])
    if rng.random() < 0.5:
        nodes = [node("Squeeze", "x", "s", axes=axes), node("Unsqueeze", "s", axes=[a for a in axes if a > 0] or axes)]
        return make_model(nodes, {"x": ["N", 1, 3, 1]}, opset=11)
    nodes = [node("Squeeze", "x a", "s"), node("Unsqueeze", "s b")]
    return make_model(
        nodes, {"x": ["N", 1, 3, 1]}, stored={"a": np.array(axes), "b": np.array(pick(rng, [1], [2, 1], [-1, 1]))}
    )


@case
def concat(rng: Random) -> ModelProto:
    axis = pick(rng, 1, -1, 2)
    nodes = [node("Relu", "x", "r"), node("Concat", "x r x", axis=axis)]
    return make_model(nodes, {"x": ["N", 4, 3]})


@case
def split(rng: Random) -> ModelProto:
    form = pick(rng, "even", "input", "attribute", "number")
    if form == "attribute":
        return make_model([node("Split", "x", "a b", axis=1, split=[2, 5])], {"x": ["N", 7, 3]}, ("b", "a"), opset=11)
    if form == "input":
        return make_model(
            [node("Split", "x s", "a b", axis=-2)], {"x": ["N", 7, 3]}, ("b", "a"), {"s": np.array([4, 3])}
        )
    if form == "number":
        return make_model(
            [node("Split", "x", "a b c", axis=1, num_outputs=3)], {"x": ["N", 7, 3]}, ("a", "b", "c"), opset=18
        )
    return make_model([node("Split", "x", "a b", axis=1)], {"x": ["N", 6, 3]}, ("a", "b"), opset=13)


@case
def slices(rng: Random) -> ModelProto:
    start, end, step = pick(
        rng,
        (1, 6, 1),
        (0, 2**63 - 1, 2),
        (-4, -1, 1),
        (-1, -(2**63), -1),
        (6, 1, -2),
        (2, 100, 3),
        (-100, 5, 1),
        (5, -100, -1),
        (1, 2**31 - 1, 1),
    )
    axis = pick(rng, 1, 2, -1)
    stored = {"s": np.array([start]), "e": np.array([end]), "a": np.array([axis]), "p": np.array([step])}
    return make_model([node("Slice", "x s e a p")], {"x": ["N", 7, 8]}, stored=stored)


@case
def slices_of_operator_set_9(rng: Random) -> ModelProto:
    return make_model([node("Slice", "x", starts=[1, -3], ends=[5, 9999], axes=[1, 2])], {"x": ["N", 7, 8]}, opset=9)


@case
def gather(rng: Random) -> ModelProto:
    places = pick(rng, 2, -1, [0, 2, 4], [-1, 1, -2], [[0, 1], [3, -2]])
    return make_model(
        [node("Gather", "x i", axis=pick(rng, 1, 2, -1))], {"x": ["N", 5, 6]}, stored={"i": np.array(places)}
    )


@case
def gather_from_a_table(rng: Random) -> ModelProto:
    return make_model(
        [node("Gather", "t x", axis=pick(rng, 0, 1))],
        {"x": ["N", 4]},
        stored={"t": floats(rng, 5, 6)},
        dtypes={"x": TensorProto.INT64},
    )


@case
def gather_by_another_input(rng: Random) -> ModelProto:
    return make_model(
        [node("Gather", "x i", axis=1)],
        {"x": ["N", 5, 6], "i": pick(rng, [3], [2, 3])},
        dtypes={"i": TensorProto.INT64},
    )


@case
def gather_elements(rng: Random) -> ModelProto:
    nodes = [node("ArgMax", "x", "i", axis=1), node("GatherElements", "x i", axis=1)]
    return make_model(nodes, {"x": ["N", 5, 6]})


@case
def scatter(rng: Random) -> ModelProto:
    nodes = [
        node("ArgMax", "x", "i", axis=1),
        node("GatherElements", "x i", "g", axis=1),
        node("Neg", "g", "n"),
        node("ScatterElements", "x i n", axis=1),
    ]
    return make_model(nodes, {"x": ["N", 5, 6]})


@case
def expand_and_tile(rng: Random) -> ModelProto:
    nodes = [node("Expand", "x s", "e"), node("Tile", "e r")]
    return make_model(
        nodes,
        {"x": ["N", 1, 3]},
        stored={"s": np.array(pick(rng, [1, 4, 3], [4, 1], [2, 1, 1, 3])[-3:]), "r": np.array([1, 2, 3])},
    )


@case
def depth_to_space(rng: Random) -> ModelProto:
    if rng.random() < 0.3:
        return make_model([node("SpaceToDepth", "x", blocksize=2)], {"x": ["N", 3, 4, 6]})
    return make_model([node("DepthToSpace", "x", blocksize=2, mode=pick(rng, "DCR", "CRD"))], {"x": ["N", 8, 3, 5]})


@case
def trilu(rng: Random) -> ModelProto:
    return make_model(
        [node("Trilu", "x k", upper=pick(rng, 0, 1))], {"x": ["N", 4, 5]}, stored={"k": np.array(pick(rng, 0, 1, -1))}
    )


@case
def grid_sample(rng: Random) -> ModelProto:
    attributes = {
        "mode": pick(rng, "bilinear", "nearest"),
        "padding_mode": pick(rng, "zeros", "border", "reflection"),
        "align_corners": pick(rng, 0, 1),
    }
    return make_model([node("GridSample", "x g", **attributes)], {"x": ["N", 2, 5, 6], "g": ["N", 3, 4, 2]})


CONVENTIONS = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners", "half_pixel_symmetric")


@case
def resize_to_the_nearest(rng: Random) -> ModelProto:
    attributes = {
        "mode": "nearest", "coordinate_transformation_mode": pick(rng, *CONVENTIONS),
        "nearest_mode": pick(rng, "floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    }  # fmt: skip
    return resized(rng, attributes)


@case
def resize_linearly(rng: Random) -> ModelProto:
    return resized(rng, {"mode": "linear", "coordinate_transformation_mode": pick(rng, *CONVENTIONS)})


@case
def resize_cubically(rng: Random) -> ModelProto:
    kind = pick(rng, "half_pixel", "align_corners", "pytorch_half_pixel")
    return resized(rng, {"mode": "cubic", "coordinate_transformation_mode": kind, "cubic_coeff_a": -0.75})


def resized(rng: Random, attributes: dict[str, Any]) -> ModelProto:
    side = sizes(rng, 2, 4)
    if rng.random() < 0.5:
        stored = {"f": np.array([1, 1, *pick(rng, (2, 2), (2, 3), (0.5, 2), (1.5, 2.5), (0.6, 0.7))], np.float32)}
        return make_model([node("Resize", "x - f", **attributes)], {"x": ["N", 2, *side]}, stored=stored, opset=19)
    to = pick(rng, [2 * side[0], 2 * side[1]], [7, 9], [3, 3], [11, 5])
    if rng.random() < 0.5:
        return make_model(
            [node("Resize", "x - - s", axes=[2, 3], **attributes)],
            {"x": ["N", 2, *side]},
            stored={"s": np.array(to)},
            opset=19,
        )
    return make_model(
        [node("Resize", "x - - s", **attributes)], {"x": [1, 2, *side]}, stored={"s": np.array([1, 2, *to])}, opset=19
    )


@case
def upsample(rng: Random) -> ModelProto:
    mode = pick(rng, "nearest", "linear")
    scales = [1.0, 1.0, *pick(rng, (2.0, 2.0), (3.0, 2.0), (1.5, 2.5))]
    if rng.random() < 0.5:
        return make_model(
            [node("Upsample", "x", mode=mode, scales=scales)], {"x": ["N", 2, *sizes(rng, 2, 4)]}, opset=8
        )
    return make_model(
        [node("Upsample", "x f", mode=mode)],
        {"x": ["N", 2, *sizes(rng, 2, 4)]},
        stored={"f": np.array(scales, np.float32)},
        opset=9,
    )


@case
def resize_of_operator_set_10(rng: Random) -> ModelProto:
    scales = np.array([1.0, 1.0, *pick(rng, (2.0, 2.0), (1.5, 2.5))], np.float32)
    return make_model(
        [node("Resize", "x f", mode=pick(rng, "nearest", "linear"))],
        {"x": ["N", 2, *sizes(rng, 2, 4)]},
        stored={"f": scales},
        opset=10,
    )


@case
def recurrent(rng: Random) -> ModelProto:
    op, direction = pick(rng, "LSTM", "GRU", "RNN"), pick(rng, "forward", "reverse", "bidirectional")
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    stored = {"w": floats(rng, ways, gates * 5, 3), "r": floats(rng, ways, gates * 5, 5)}
    if rng.random() < 0.6:
        stored["b"] = floats(rng, ways, gates * 10)
    attributes = {"linear_before_reset": 1} if op == "GRU" else {}
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]),
        node(op, " ".join(["t", *stored]), "y h", hidden_size=5, direction=direction, **attributes),
    ]
    return make_model(nodes, {"x": ["N", 4, 3]}, ("y", "h"), stored)


SEEDS = 8


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    for seed in range(SEEDS):
        model = CASES[name](np.random.default_rng([seed, len(name)]))
        fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        images = (fixed,) if fixed else (1, 2, 5)
        try:
            assert_same(model, images=images, seed=seed)
        except Exception as error:
            error.add_note(f"seed {seed}: {model.graph.node}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_imported_can_be_exported_again(name: str, tmp_path: Path) -> None:
    model = CASES[name](np.random.default_rng([1, len(name)]))
    given = []
    for value in model.graph.input:
        sizes = [d.dim_value or 7 for d in value.type.tensor_type.shape.dim]
        is_float = value.type.tensor_type.elem_type == TensorProto.FLOAT
        given.append(torch.randn(sizes) if is_float else torch.ones(sizes, dtype=torch.int64))
    is_open = bool(model.graph.input[0].type.tensor_type.shape.dim[0].dim_param)
    graph_module = fxprune.import_onnx(model)
    report = fxprune.export_onnx(graph_module, tmp_path / "again.onnx", tuple(given), dynamic_batch=is_open)
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    assert [text.split(": ")[0] for text in (*report.inputs, *report.outputs)] == names
