"""Files as other programs write them, and files that are broken or hostile: read rightly, or refused with a clear error."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from fxprune.errors import FxPruneError, ValidationError
from fxprune.export import inspect_onnx, validate_onnx
from fxprune.export.constant_folding import attributes_with_defaults, constants, fold_constants, opset_versions
from fxprune.export.weight_uses import graph_weights

Build = Callable[[], ModelProto]
# (R, C) = (8, 8), whole numbers, 2:4 along C and in no other direction.
W = np.array([[1, 2, 0, 0], [0, 3, 4, 0], [5, 0, 0, 6], [0, 0, 7, 1]] * 4, np.float32).reshape(8, 8)
FLOAT = TensorProto.FLOAT


def node(op: str, inputs: str, output: str = "y", **attributes: Any) -> NodeProto:
    """A node; `domain=` is the operator's, "-" an input left out."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, output.split(), **attributes)


def model(
    nodes: Sequence[NodeProto], tensors: dict[str, Any] | None = None, opset: int = 17, **options: Any
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 8])],
        [
            t if isinstance(t, TensorProto) else numpy_helper.from_array(np.asarray(t), n)
            for n, t in (tensors or {}).items()
        ],
    )
    opsets = [helper.make_opsetid(*pair) for pair in (("", opset), ("com.microsoft", 1), ("local", 1))]
    return helper.make_model(graph, opset_imports=opsets, **({"ir_version": 10} | options))


def through(nodes: Sequence[NodeProto], tensors: dict[str, Any], opset: int = 17) -> ModelProto:
    """A Gemm that reads its weight "w" through nodes."""
    return model([*nodes, node("Gemm", "x w", transB=1)], tensors, opset)


def stored(kind: int, values: np.ndarray = W, name: str = "q") -> TensorProto:
    return helper.make_tensor(name, kind, values.shape, values.ravel())


MS = {"domain": "com.microsoft"}
Q = W.astype(np.int8)
SCALES = np.linspace(0.5, 2, 8, dtype=np.float32)
ONE = np.float32(1)
KERNEL = W.reshape(8, 8, 1, 1)


def sparse(indices: np.ndarray) -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(W[W != 0], "w")
    return helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), list(W.shape))


def with_sparse(indices: np.ndarray) -> ModelProto:
    file = through([], {})
    file.graph.sparse_initializer.append(sparse(indices))
    return file


def body(nodes: Sequence[NodeProto], inputs: Sequence[Any], outputs: Sequence[str], **tensors: Any) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes),
        "body",
        list(inputs),
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )


def loop() -> ModelProto:
    inner = body(
        [node("Identity", "c", "go"), node("Gemm", "state w", "next", transB=1)],
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        ["go", "next"],
        w=W,
    )
    return model([node("Loop", "n c0 x", body=inner)], {"n": np.int64(3), "c0": np.array(True)})


def conditional(depth: int = 1) -> ModelProto:
    inner = [node("Transpose", "v", "w", perm=[1, 0]), node("Gemm", "x w", "b", transB=1)]
    otherwise = body([node("Neg", "x", "b")], [], ["b"])
    for _ in range(depth - 1):
        inner = [helper.make_node("If", ["c"], ["b"], then_branch=body(inner, [], ["b"]), else_branch=otherwise)]
    last = helper.make_node("If", ["c"], ["y"], then_branch=body(inner, [], ["b"]), else_branch=otherwise)
    return model([node("Cast", "n", "c", to=TensorProto.BOOL), last], {"n": np.int64(1), "v": W.T.copy()})


def function(*calls: tuple[str, list[NodeProto]], opset: int = 17) -> ModelProto:
    file = through([], {"w": W})
    file.graph.node[0].CopyFrom(node("F", "x w", domain="local"))
    for name, nodes in calls:
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
        file.functions.append(helper.make_function("local", name, ["a", "v"], ["b"], nodes, opsets))
    return file


def packed_four_bits() -> np.ndarray:
    """MatMulNBits: (N, blocks of 16, 8 bytes), low half first, 8 for zero."""
    values = np.full((8, 16), 8, np.uint8)
    values[:, :8] = (W + 8).astype(np.uint8)
    return (values[:, 0::2] | values[:, 1::2] << 4).reshape(8, 1, 8)


def as_inputs() -> ModelProto:
    """As files up to IR version 3: every initializer is an input too."""
    file = through([], {"w": W}, opset=8)
    file.ir_version = 3
    file.graph.input.append(helper.make_tensor_value_info("w", FLOAT, W.shape))
    return file


def quantized(op: str, inputs: str, **attributes: Any) -> ModelProto:
    """A node on integers: w at the zero point 5 or, for each output channel, at 1 to 8; all else scales and zero points."""
    ones = np.arange(1, 9, dtype=np.uint8)
    tensors = {"w": (W + 5).astype(np.uint8), "wz": np.uint8(5), "s": ONE, "z": np.uint8(0), "zs": ones}
    tensors |= {"k": tensors["w"].reshape(8, 8, 1, 1), "t": tensors["w"].T.copy()}
    tensors |= {"wr": (W + ones[:, None]).astype(np.uint8), "tr": (W + ones[:, None]).astype(np.uint8).T.copy()}
    used = set(inputs.split())
    return model([node(op, inputs, **attributes)], {name: t for name, t in tensors.items() if name in used})


HOLD_THE_PATTERN: dict[str, Build] = {
    **{f"opset {n}": (lambda n=n: through([], {"w": W}, n)) for n in (7, 9, 11, 13, 18, 21, 23)},
    "IR version 3": as_inputs,
    # The same operation in several operator sets.
    "Unsqueeze 11": lambda: through(
        [node("Unsqueeze", "v", "u", axes=[0]), node("Squeeze", "u", "w", axes=[0])], {"v": W}, 11
    ),
    "Unsqueeze 13": lambda: through(
        [node("Unsqueeze", "v a", "u"), node("Squeeze", "u a", "w")], {"v": W, "a": np.array([0])}, 13
    ),
    "Slice 9": lambda: through([node("Slice", "v", "w", starts=[0], ends=[8], axes=[0])], {"v": np.tile(W, (2, 1))}, 9),
    "Slice 13": lambda: through(
        [node("Slice", "v s e", "w")], {"v": np.tile(W, (2, 1)), "s": np.array([0, 0]), "e": np.array([8, 8])}, 13
    ),
    "Split 11": lambda: through([node("Split", "v", "w rest", split=[8, 8])], {"v": np.tile(W, (2, 1))}, 11),
    "Split 13": lambda: through(
        [node("Split", "v s", "w rest")], {"v": np.tile(W, (2, 1)), "s": np.array([8, 8])}, 13
    ),
    "Split 18": lambda: through([node("Split", "v", "w rest", num_outputs=2)], {"v": np.tile(W, (2, 1))}, 18),
    "Clip 6": lambda: through([node("Clip", "v", "w", min=-9.0, max=9.0)], {"v": W}, 10),
    "Clip 13": lambda: through([node("Clip", "v - m", "w")], {"v": W, "m": np.float32(9)}, 13),
    "ReduceL2 11": lambda: through(
        [node("ReduceL2", "v", "n", axes=[1], keepdims=1), node("Div", "v n", "w")], {"v": W}, 11
    ),
    "ReduceL2 18": lambda: through(
        [node("ReduceL2", "v a", "n", keepdims=1), node("Div", "v n", "w")], {"v": W, "a": np.array([1])}, 18
    ),
    # Constants in every form.
    "Constant value": lambda: through([node("Constant", "", "w", value=numpy_helper.from_array(W))], {}),
    "Constant floats": lambda: through(
        [
            node("Constant", "", "f", value_floats=W.ravel().tolist()),
            node("Constant", "", "s", value_ints=[8, 8]),
            node("Reshape", "f s", "w"),
        ],
        {},
    ),
    "Constant sparse": lambda: through([node("Constant", "", "w", sparse_value=sparse(np.flatnonzero(W)))], {}),
    "Constant scalar": lambda: through([node("Constant", "", "c", value_float=2.0), node("Mul", "v c", "w")], {"v": W}),
    "sparse initializer": lambda: with_sparse(np.flatnonzero(W).astype(np.int64)),
    "sparse initializer, an index for each axis": lambda: with_sparse(np.argwhere(W).astype(np.int64)),
    # Chains.
    "Identity x 50": lambda: through(
        [node("Identity", f"v{i}" if i else "v", f"v{i + 1}" if i < 49 else "w") for i in range(50)], {"v": W}
    ),
    "Transpose": lambda: through([node("Transpose", "v", "w")], {"v": W.T.copy()}),
    "Cast from float16": lambda: through([node("Cast", "v", "w", to=FLOAT)], {"v": W.astype(np.float16)}),
    "Cast from bfloat16": lambda: through([node("Cast", "q", "w", to=FLOAT)], {"q": stored(TensorProto.BFLOAT16)}),
    "Cast from float8": lambda: through([node("Cast", "q", "w", to=FLOAT)], {"q": stored(TensorProto.FLOAT8E4M3FN)}, 19),
    "CastLike": lambda: through([node("CastLike", "v one", "w")], {"v": W.astype(np.float64), "one": ONE}, 15),
    "Flatten": lambda: through([node("Flatten", "v", "w")], {"v": KERNEL}),
    "mask": lambda: through([node("Mul", "v m", "w")], {"v": W + 9 * np.float32(W == 0), "m": np.float32(W != 0)}),
    "Where": lambda: through([node("Where", "m v z", "w")], {"v": W + (W == 0), "m": W != 0, "z": np.float32(0)}),
    "ConstantOfShape": lambda: through(
        [node("ConstantOfShape", "s", "o", value=numpy_helper.from_array(np.float32([1]))), node("Mul", "o v", "w")],
        {"s": np.array([8, 8]), "v": W},
    ),
    "Concat": lambda: through([node("Concat", "a b", "w", axis=0)], {"a": W[:3], "b": W[3:]}),
    "Gather": lambda: through([node("Gather", "v i", "w", axis=0)], {"v": W, "i": np.array([3, 1, 2, 0])}),
    "Expand": lambda: through([node("Expand", "v s", "w")], {"v": W[:1], "s": np.array([8, 8])}),
    "Shape of a weight": lambda: through([node("Shape", "w", "s"), node("Size", "s", "n")], {"w": W}),
    # Quantised.
    **{
        f"DequantizeLinear {kind} {domain or 'ai.onnx'}": (
            lambda kind=kind, domain=domain: through(
                [node("DequantizeLinear", "q s z", "w", domain=domain)],
                {"q": (W + 3).astype(kind), "s": ONE, "z": np.array(3, kind)}, 21,
            )
        )
        for kind in ("int8", "uint8", "int16", "uint16", "int32")
        for domain in ("", "com.microsoft")
    },
    "DequantizeLinear 13, one scale a channel": lambda: through(
        [node("DequantizeLinear", "q s z", "w", axis=0)], {"q": Q, "s": SCALES, "z": np.zeros(8, np.int8)}, 13
    ),
    "DequantizeLinear int4": lambda: through(
        [node("DequantizeLinear", "q s", "w")], {"q": stored(TensorProto.INT4), "s": ONE}, 21
    ),
    "DequantizeLinear in blocks": lambda: through(
        [node("DequantizeLinear", "q s", "w", axis=1, block_size=4)], {"q": Q, "s": np.ones((8, 2), np.float32)}, 21
    ),
    "DequantizeLinear of float8": lambda: through(
        [node("DequantizeLinear", "q s", "w")], {"q": stored(TensorProto.FLOAT8E5M2), "s": ONE}, 19
    ),
    "Quantize and Dequantize": lambda: through(
        [node("QuantizeLinear", "v s z", "q"), node("DequantizeLinear", "q s z", "w")],
        {"v": W, "s": np.float32(0.1), "z": np.int8(3)},
    ),
    "QLinearConv": lambda: quantized("QLinearConv", "x s z k s wz s z"),
    "QLinearMatMul": lambda: quantized("QLinearMatMul", "x s z t s wz s z"),
    "QLinearMatMul, one zero point a channel": lambda: quantized("QLinearMatMul", "x s z tr s zs s z"),
    "ConvInteger": lambda: quantized("ConvInteger", "x k z wz"),
    "MatMulInteger": lambda: quantized("MatMulInteger", "x t z wz"),
    "QGemm": lambda: quantized("QGemm", "x s z w s wz", transB=1, **MS),
    "QGemm, one zero point a channel": lambda: quantized("QGemm", "x s z wr s zs", transB=1, **MS),
    "MatMulIntegerToFloat": lambda: quantized("MatMulIntegerToFloat", "x t s s z wz", **MS),
    "DynamicQuantizeMatMul": lambda: quantized("DynamicQuantizeMatMul", "x t s wz", **MS),
    "MatMulNBits": lambda: model(
        [node("MatMulNBits", "x b s", K=8, N=8, bits=4, block_size=16, **MS)],
        {"b": packed_four_bits(), "s": np.ones(8, np.float32)},
    ),
    # Stored types, fused nodes, nesting.
    "float64": lambda: through([], {"w": W.astype(np.float64)}),
    "bfloat16": lambda: through([], {"w": W.astype(ml_dtypes.bfloat16)}),
    "FusedMatMul": lambda: model([node("FusedMatMul", "x w", transB=1, **MS)], {"w": W}),
    "FusedGemm": lambda: model([node("FusedGemm", "x w", transB=1, activation="Relu", **MS)], {"w": W}),
    "FusedConv": lambda: model([node("FusedConv", "x w", activation="Relu", **MS)], {"w": KERNEL}),
    "If": conditional,
    "If 20 deep": lambda: conditional(20),
    "Loop": loop,
    "a local function": lambda: function(("F", [node("Gemm", "a v", "b", transB=1)])),
    "functions in functions": lambda: function(
        ("F", [node("G", "a v", "b", domain="local")]), ("G", [node("Identity", "v", "u"), node("Gemm", "a u", "b", transB=1)])
    ),
    "a function of an older operator set": lambda: function(("F", [node("Gemm", "a v", "b", transB=1)]), opset=13),
    "the same name for all nodes": lambda: model(
        [node("Neg", "x", "u", name="n"), node("Gemm", "u w", name="n", transB=1)], {"w": W}
    ),
    "names in other scripts": lambda: model([node("Gemm", "x 重み/ω", name="層 1", transB=1)], {"重み/ω": W}),
}  # fmt: skip


def damaged(change: Callable[[ModelProto], Any]) -> ModelProto:
    file = through([node("Identity", "v", "w")], {"v": W})
    change(file)
    return file


def _set_raw(data: bytes) -> Callable[[ModelProto], None]:
    return lambda file: setattr(file.graph.initializer[0], "raw_data", data)


def _call_itself() -> ModelProto:
    return function(("F", [node("F", "a v", "b", domain="local")]))


def _function_bomb() -> ModelProto:
    names = ["F", *(f"F{i}" for i in range(1, 40))]
    calls = [
        (name, [node(after, "a v", "c", domain="local"), node(after, "c v", "b", domain="local")])
        for name, after in itertools.pairwise(names)
    ]
    return function(*calls, (names[-1], [node("Gemm", "a v", "b", transB=1)]))


def _doubling() -> ModelProto:
    chain = [node("Concat", f"v{i} v{i}", f"v{i + 1}", axis=0) for i in range(60)]
    return through([*chain, node("Slice", "v60 s e", "w")], {"v0": W, "s": np.array([0, 0]), "e": np.array([8, 8])})


BROKEN_OR_HOSTILE: dict[str, Build] = {
    "raw data too short": lambda: damaged(_set_raw(b"\0" * 7)),
    "raw data too long": lambda: damaged(_set_raw(b"\0" * 4096)),
    "a number type of the future": lambda: damaged(lambda m: setattr(m.graph.initializer[0], "data_type", 999)),
    "an input type of the future": lambda: damaged(
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 777)
    ),
    "a negative size": lambda: damaged(lambda m: m.graph.initializer[0].dims.__setitem__(0, -8)),
    "a huge size": lambda: damaged(lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**60)),
    "terabytes of ones": lambda: through([node("ConstantOfShape", "s", "w")], {"s": np.array([2**20, 2**20])}),
    "a negative ConstantOfShape": lambda: through([node("ConstantOfShape", "s", "w")], {"s": np.array([-8, 8])}),
    "a huge Expand": lambda: through([node("Expand", "v s", "w")], {"v": W[:1], "s": np.array([2**40, 8])}),
    "a huge Tile": lambda: through([node("Tile", "v s", "w")], {"v": W, "s": np.array([2**20, 2**20])}),
    "a huge Pad": lambda: through([node("Pad", "v s", "w")], {"v": W, "s": np.array([2**40, 0, 0, 0])}),
    "a huge outer sum": lambda: through([node("Add", "a b", "w")], {"a": np.ones((2**16, 1)), "b": np.ones((1, 2**16))}),
    "an endless Range": lambda: through([node("Range", "a b c", "w")], {"a": ONE, "b": ONE + 1, "c": np.float32(0)}),
    "doubling 60 times": _doubling,
    "an If 90 deep": lambda: conditional(30),
    "a circle": lambda: model([node("Add", "x b", "a"), node("Gemm", "a w", "b", transB=1)], {"w": W}),
    "the wrong order": lambda: through([node("Identity", "u", "w"), node("Identity", "v", "u")], {"v": W}),
    "no output": lambda: damaged(lambda m: m.graph.node[0].output.pop()),
    "no input": lambda: damaged(lambda m: m.graph.node[0].input.pop()),
    "no node": lambda: damaged(lambda m: m.graph.ClearField("node")),
    "no operator set": lambda: damaged(lambda m: m.ClearField("opset_import")),
    "operator set 9999": lambda: through([node("Identity", "v", "w")], {"v": W}, 9999),
    "operator set -1": lambda: through([node("Identity", "v", "w")], {"v": W}, -1),
    "IR version 9999": lambda: damaged(lambda m: setattr(m, "ir_version", 9999)),
    "an unknown operation": lambda: through([node("Sparkle", "v", "w")], {"v": W}),
    "an unknown domain": lambda: model([node("Conv", "x w", domain="my.own")], {"w": KERNEL}),
    "a Constant without a value": lambda: through([node("Constant", "", "w")], {}),
    "an attribute of the wrong type": lambda: model([node("Gemm", "x w", transB="yes")], {"w": W}),
    "an attribute without a type": lambda: damaged(lambda m: m.graph.node[1].attribute[0].ClearField("type")),
    "an impossible perm": lambda: through([node("Transpose", "v", "w", perm=[0, 7])], {"v": W}),
    "an impossible Reshape": lambda: through([node("Reshape", "v s", "w")], {"v": W, "s": np.array([3, 5])}),
    "an impossible axis": lambda: through([node("Concat", "v v", "w", axis=9)], {"v": W}),
    "a Conv with a vector": lambda: model([node("Conv", "x w")], {"w": W[0]}),
    "a ConvTranspose with a matrix": lambda: model([node("ConvTranspose", "x w")], {"w": W}),
    "group 0": lambda: model([node("Conv", "x w", group=0)], {"w": KERNEL}),
    "group of text": lambda: model([node("Conv", "x w", group="two")], {"w": KERNEL}),
    "a weight of strings": lambda: through([], {"w": np.array([["a", "b"]], object)}),
    "a weight without numbers": lambda: through([], {"w": np.zeros((8, 0), np.float32)}),
    "zero points that do not fit": lambda: model(
        [node("ConvInteger", "x w z wz")], {"w": KERNEL.astype(np.int8), "z": np.int8(0), "wz": np.zeros(5, np.int8)}
    ),
    "scales that do not fit": lambda: through(
        [node("DequantizeLinear", "q s", "w", axis=0)], {"q": Q, "s": np.ones(5, np.float32)}
    ),
    "bits that do not fit": lambda: model(
        [node("MatMulNBits", "x b s", K=999, N=8, bits=4, **MS)], {"b": packed_four_bits(), "s": SCALES}
    ),
    "sparse indices out of range": lambda: with_sparse(np.arange(10**6, 10**6 + 32)),
    "too few sparse indices": lambda: with_sparse(np.arange(3)),
    "a huge sparse tensor": lambda: damaged(
        lambda m: m.graph.sparse_initializer.append(
            helper.make_sparse_tensor(numpy_helper.from_array(W[0], "s"), numpy_helper.from_array(np.arange(8), "i"), [2**40])
        )
    ),
    "the same initializer twice": lambda: damaged(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
    "a sequence as input": lambda: damaged(
        lambda m: m.graph.input.append(helper.make_tensor_sequence_value_info("more", FLOAT, None))
    ),
    "metadata that is no JSON": lambda: damaged(
        lambda m: [m.metadata_props.add(key=f"fxprune.{key}", value="{[") for key in ("layers", "channels")]
    ),
    "a function that calls itself": _call_itself,
    "two to the fortieth nodes in functions": _function_bomb,
    "a Loop without a body": lambda: model([node("Loop", "n c x")], {"n": np.int64(3), "c": np.array(True)}),
}  # fmt: skip


def save(build: Build, path: Path) -> Path:
    path.write_bytes(build().SerializeToString())
    return path


def never_a_traceback(path: Path) -> str:
    """Inspection and validation either work or raise one of our errors, whose text is returned."""
    texts = []
    try:
        texts.append(str(inspect_onnx(path)))
    except FxPruneError as error:
        texts.append(str(error))
    try:
        texts.append(str(validate_onnx(nn.Linear(8, 8, bias=False), path, [torch.ones(2, 8)], progress=False)))
    except FxPruneError as error:
        texts.append(str(error))
    return "\n".join(texts)


@pytest.mark.parametrize("name", HOLD_THE_PATTERN)
def test_the_pattern_is_found(name: str, tmp_path: Path) -> None:
    path = save(HOLD_THE_PATTERN[name], tmp_path / "m.onnx")
    found = inspect_onnx(path)
    (layer,) = found.layers
    assert layer.patterns == ("2:4",)
    assert layer.sparsity == 0.5
    assert found.unreadable == ()
    assert never_a_traceback(path)


@pytest.mark.parametrize("name", BROKEN_OR_HOSTILE)
def test_broken_or_hostile(name: str, tmp_path: Path) -> None:
    assert str(tmp_path) in never_a_traceback(save(BROKEN_OR_HOSTILE[name], tmp_path / "m.onnx"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated(share: float, tmp_path: Path) -> None:
    whole = through([node("Identity", "v", "w")], {"v": W}).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole[: int(share * len(whole))])
    assert "m.onnx" in never_a_traceback(tmp_path / "m.onnx")


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes(seed: int, tmp_path: Path) -> None:
    data = bytearray(through([node("Identity", "v", "w")], {"v": W}).SerializeToString())
    rng = np.random.default_rng(seed)
    for place in rng.integers(len(data), size=1 + seed % 5):
        data[place] = rng.integers(256)
    (tmp_path / "m.onnx").write_bytes(data)
    assert never_a_traceback(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04zip", b"\x00" * 64, bytes(range(256))])
def test_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ValidationError, match="not a complete ONNX file"):
        inspect_onnx(tmp_path / "m.onnx")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="there is no file"):
        inspect_onnx(tmp_path)


def external(path: Path, **entries: str) -> Path:
    file = through([], {"w": W})
    tensor = file.graph.initializer[0]
    (path.parent / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(file.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    found = inspect_onnx(external(tmp_path / "m.onnx", location="w.bin"))
    assert found["w"].patterns == ("2:4",)
    assert found.size.file == sum(os.path.getsize(tmp_path / name) for name in ("m.onnx", "w.bin"))


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "gone.bin"}, {"location": "../w.bin"}, {"location": "/etc/passwd"}, {"location": ""}, {},
        {"location": "w.bin", "offset": "200"}, {"location": "w.bin", "length": "7"},
        {"location": "w.bin", "offset": "-4"}, {"location": "w.bin", "length": "many"}, {"location": "."},
    ],
)  # fmt: skip
def test_external_data_that_is_not_there(entries: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    assert "m.onnx" in never_a_traceback(external(tmp_path / "model" / "m.onnx", **entries))


# --- what the folder itself gives -------------------------------------------------------------------------------------


def test_values_origins_and_axes() -> None:
    nodes = [
        node("Transpose", "v", "t"),
        node("Unsqueeze", "t a", "u"),
        node("Concat", "v v2", "c", axis=0),
        node("RandomNormalLike", "v", "r"),
        node("Shape", "x", "s"),
        node("Sparkle", "v", "q", domain="com.microsoft"),
    ]
    scope = constants(through(nodes, {"v": W, "v2": 2 * W, "a": np.array([0]), "w": W}))
    assert scope.keys() >= {"v", "t", "u", "c", "q"}
    assert not {"x", "r", "s", "y"} & scope.keys()
    assert scope["q"] is None  # fixed, but what it is cannot be told
    t, u, c = scope["t"], scope["u"], scope["c"]
    assert t is not None
    assert (t.initializer, t.axes) == ("v", (1, 0))
    np.testing.assert_array_equal(t.array, W.T)
    assert u is not None
    assert (u.array.shape, u.axes) == ((1, 8, 8), (None, 1, 0))
    assert c is not None
    assert (c.initializer, c.sources) == ("c", {"v", "v2"})


def test_a_body_does_not_see_an_outer_value_of_the_name_of_its_input() -> None:
    file = loop()
    file.graph.initializer.append(numpy_helper.from_array(W, "state"))
    file.graph.node[0].attribute[0].g.node.append(node("Gemm", "go state", "z"))
    (use,) = graph_weights(file).uses
    assert use.initializer == "w"


def test_folding_in_place() -> None:
    file = through([node("Transpose", "v", "t"), node("Transpose", "t", "w")], {"v": W})
    arrays, origins = fold_constants(file)
    assert [n.op_type for n in file.graph.node] == ["Gemm"]
    assert origins == {"t": "v", "w": "v"}
    np.testing.assert_array_equal(arrays["w"], W)
    onnx.checker.check_model(file)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (node("Gemm", "x w"), node("Gemm", "x w", alpha=1.0, transA=0)),
        (
            node("Conv", "x w"),
            node("Conv", "x w", strides=[1, 1], pads=[0] * 4, dilations=[1, 1], group=1, kernel_shape=[3, 3]),
        ),
        (node("Transpose", "x"), node("Transpose", "x", perm=[2, 1, 0])),
        (node("BatchNormalization", "x"), node("BatchNormalization", "x", epsilon=1e-5, momentum=0.9)),
    ],
)
def test_attributes_after_defaults(one: NodeProto, other: NodeProto) -> None:
    opsets = opset_versions(through([], {}))
    assert attributes_with_defaults(one, opsets) == attributes_with_defaults(other, opsets)


def test_attributes_that_are_not_the_default() -> None:
    opsets = opset_versions(through([], {}))
    assert attributes_with_defaults(node("Gemm", "x w", alpha=2.0), opsets)["alpha"] == 2
    assert attributes_with_defaults(node("Conv", "x w", strides=[2, 1]), opsets)["strides"] == [2, 1]
    assert attributes_with_defaults(node("Sparkle", "x", a=3), {}) == {"a": 3}
