from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fxprune.errors import ValidationError
from fxprune.export import OnnxReport, inspect_onnx
from fxprune.export.inspection import PATTERNS, _implies, held_patterns
from fxprune.pattern import NMPattern, Pattern


def project(pattern: str, *shape: int) -> Tensor:
    return Pattern.parse(pattern).project(torch.randn(*shape))


def save_convolutions(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """A foreign file: a chain-less graph of convolutions that all read the same input."""
    nodes = [helper.make_node("Conv", ["x", name], [f"y_{name}"], name=f"conv_{name}") for name in weights]
    outputs = [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, None) for name in weights]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 8, 8])]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, str(path))
    return path


def test_own_file(exported: tuple[Path, OnnxReport]) -> None:
    path, report = exported
    found = inspect_onnx(path)
    assert [layer.initializer for layer in found.layers] == [
        "stem.weight", "grouped.weight", "square.weight", "pointwise.weight", "depthwise.weight",
        "tokens.weight_transposed", "fc.weight", "up.weight",
    ]  # fmt: skip
    assert found["square.weight"].patterns == ("2:4",)
    assert found["tokens.weight_transposed"].axis == 0
    assert found["tokens.weight_transposed"].patterns == ("2:4",)
    assert found["up.weight"].axis == 0
    assert found["stem.weight"].patterns == ()
    assert found["depthwise.weight"].groups == 32
    assert found.size == report.size
    assert found.metadata["fxprune.pattern"] == "2:4"
    text = str(found)
    assert "pruned to 2:4 with magnitude" in text
    assert "onnxruntime's CPU provider N:M zeros bring no speed-up" in text
    assert max(map(len, text.splitlines())) <= 110


def test_foreign_file(tmp_path: Path) -> None:
    along_outputs = project("2:4", 16, 16, 3, 3).transpose(0, 1)
    storage_order = project("2:4", 16, 144).reshape(16, 16, 3, 3)
    path = save_convolutions(
        tmp_path / "foreign.onnx",
        {
            "two_four": project("2:4", 16, 16, 3, 3).numpy(),
            "one_four": project("1:4", 16, 16, 3, 3).numpy(),
            "one_two": project("1:2", 16, 16, 3, 3).numpy(),
            "four_eight": project("4:8", 16, 16, 3, 3).numpy(),
            "outputs": np.ascontiguousarray(along_outputs.numpy()),
            "storage": storage_order.numpy(),
            "random": project("0.5", 16, 16, 3, 3).numpy(),
            "dense": torch.randn(16, 16, 3, 3).numpy(),
            "empty": np.zeros((16, 16, 3, 3), np.float32),
        },
    )
    found = inspect_onnx(path)
    held = {layer.initializer: (layer.patterns, layer.other_patterns) for layer in found.layers}
    assert held == {
        "two_four": (("2:4",), ()),
        "one_four": (("1:4",), ()),
        "one_two": (("1:2",), ()),
        "four_eight": (("4:8",), ()),
        "outputs": ((), ("2:4 along output channels",)),
        "storage": ((), ("2:4 in storage order",)),
        "random": ((), ()),
        "dense": ((), ()),
        "empty": ((), ()),
    }
    assert found["outputs"].verdict == "not 2:4: no speed-up"
    assert found["one_two"].verdict == "2:4, small: gain unlikely"
    assert found["dense"].sparsity == 0
    assert "Written by" not in str(found)
    assert "onnx.checker finds fault with this file: Field 'shape'" in str(found)  # said, but no reason to stop
    found.to_json(tmp_path / "i.json")
    stored = json.loads((tmp_path / "i.json").read_text())
    assert stored["layers"][0]["patterns"] == ["2:4"]
    assert stored["sparsity"] == found.sparsity
    with pytest.raises(KeyError, match="no layer reads 'nothing'"):
        found["nothing"]


@pytest.mark.parametrize("trial", range(30))
def test_held_patterns_against_pattern_check(trial: int) -> None:
    torch.manual_seed(trial)
    shape = [(4, 16), (4, 12, 2), (6, 8, 3, 3), (4, 6), (2, 32)][trial % 5]
    weight = torch.randn(shape)
    pattern = ("1:2", "1:4", "2:4", "2:8", "4:8", "0.7")[trial % 6]
    if not pattern.startswith("0") and shape[1] % Pattern.parse(pattern).m == 0:  # type: ignore[attr-defined]
        weight = Pattern.parse(pattern).project(weight)
    else:
        weight = weight * (torch.rand_like(weight) < 0.3)
    held = {p for p in PATTERNS if shape[1] % p.m == 0 and p.check(weight).ok}
    strictest = held_patterns(weight)
    assert set(strictest) <= held
    for p in held:
        assert any(q == p or _implies(q, p) for q in strictest)
    for p in strictest:
        assert not any(_implies(q, p) for q in held if q != p)


@pytest.mark.parametrize(
    ("strict", "loose", "implied"),
    [("1:4", "2:4", True), ("2:4", "1:4", False), ("1:2", "2:4", True), ("2:4", "1:2", False), ("2:4", "4:8", True),
     ("4:8", "2:4", False), ("1:8", "1:4", True), ("2:8", "2:4", True), ("3:4", "2:4", False)],
)  # fmt: skip
def test_implications_hold_on_random_masks(strict: str, loose: str, implied: bool) -> None:
    a, b = Pattern.parse(strict), Pattern.parse(loose)
    assert isinstance(a, NMPattern)
    assert isinstance(b, NMPattern)
    assert _implies(a, b) is implied
    holds = all(b.check(a.project(torch.randn(16, 16))).ok for _ in range(20))
    assert holds is implied


def test_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is no ONNX file")
    with pytest.raises(ValidationError, match="not a complete ONNX file"):
        inspect_onnx(tmp_path / "text.onnx")
