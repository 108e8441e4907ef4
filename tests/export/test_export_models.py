"""Models with several inputs or outputs, and weights that an exporter renames, merges or duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace

import fxprune
from fxprune.annotations import annotate_graph
from fxprune.export import export_onnx, inspect_onnx, validate_onnx
from fxprune.export.parity import evaluating
from fxprune.pattern import Pattern
from fxprune.report import LayerReport, PruneReport


@pytest.mark.parametrize("pattern", ["2:4", "0.9"])
def test_what_compile_returns(pattern: str, tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    x = torch.randn(16, 3, 12, 12)
    model(x)  # so that the running statistics are not 0 and 1
    compiled = fxprune.compile(model.eval(), [x], pattern, method="magnitude", progress=False)
    report = export_onnx(compiled, tmp_path / "m.onnx", x[:4], loader=[x], sparse_initializers=True)
    pruned = [layer.name for layer in compiled.report.layers if layer.status == "pruned"]
    assert pruned
    assert [layer.name for layer in report.layers if layer.ok] == pruned
    assert report.pattern == compiled.report.pattern == pattern
    assert report.method == "magnitude"
    assert bool(report.sparse_initializers) is (pattern == "0.9")
    for layer in compiled.report.layers:
        assert report[layer.name].sparsity == pytest.approx(layer.sparsity)
    metadata = inspect_onnx(tmp_path / "m.onnx").metadata
    assert metadata["fxprune.pattern"] == pattern


class Point(NamedTuple):
    a: Tensor
    b: Tensor


class Heads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.conv, self.fc, self.form = nn.Conv2d(4, 8, 3), nn.Linear(8, 5), form

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.fc(y.mean((2, 3)))
        return {"tuple": (z, y), "named": Point(z, y), "nested": {"b": z, "a": (y, None, z + 1)}}[self.form]


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("tuple", ["output_0", "output_1"]),
        ("named", ["a", "b"]),
        ("nested", ["b", "a_0", "a_2"]),
    ],
)
def test_outputs_by_name_and_in_order(form: str, names: list[str], tmp_path: Path) -> None:
    model = Heads(form).eval()
    path = tmp_path / "m.onnx"
    report = export_onnx(model, path, torch.randn(2, 4, 8, 8))
    assert [text.split(":")[0] for text in report.outputs] == names
    x = torch.randn(5, 4, 8, 8)
    found = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    with torch.no_grad():
        wanted = {"tuple": list, "named": list, "nested": lambda o: [o["b"], o["a"][0], o["a"][2]]}[form](model(x))
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w.numpy(), rtol=1e-4, atol=1e-6)
    assert report.parity.agreement == 1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.fc(self.conv(image).mean((2, 3)) * scale)


@pytest.mark.parametrize(
    ("form", "precision"), [(tuple, "fp32"), (lambda xs: {"scale": xs[1], "image": xs[0]}, "fp16")]
)
def test_two_inputs(form: Any, precision: str, tmp_path: Path) -> None:
    model = symbolic_trace(TwoInputs().eval())
    inputs = form((torch.randn(2, 4, 8, 8), torch.rand(2, 1)))
    report = export_onnx(model, tmp_path / "m.onnx", inputs, precision=precision)
    assert [text.split(":")[0] for text in report.inputs] == ["image", "scale"]
    batches = [(torch.randn(3, 4, 8, 8), torch.rand(3, 1), torch.tensor([0, 1, 2]))]
    assert validate_onnx(model, tmp_path / "m.onnx", batches, progress=False).parity.accuracy_model is not None


class Awkward(nn.Module):
    """Everything that makes an exporter rename, merge or duplicate a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.twin_a, self.twin_b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.twin_b.load_state_dict(self.twin_a.state_dict())
        self.tied_a, self.tied_b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied_b.weight = self.tied_a.weight
        self.both = nn.Linear(4, 4)
        self.free = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.unused = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.relu(self.shared(x)))
        x = F.conv2d(self.twin_b(F.relu(self.twin_a(x))), self.free)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.tied_b(F.relu(self.tied_a(tokens))) + self.both(tokens)
        return self.both(F.relu(tokens.mean(1)))


def test_shared_tied_and_equal_weights(tmp_path: Path) -> None:
    model = symbolic_trace(Awkward().eval())
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 6, 6))
    assert {layer.name for layer in report.layers} == {"shared", "twin_a", "twin_b", "tied_a", "tied_b", "both"}
    both = {(layer.initializer, layer.op, layer.axis) for layer in report.layers if layer.name == "both"}
    assert both == {("both.weight", "Gemm", 1), ("both.weight_transposed", "MatMul", 0)}
    # The functional call is no layer of a module, but the file's inspection shows it.
    assert inspect_onnx(tmp_path / "m.onnx")["free"].op == "Conv"


def test_report_may_use_any_name_of_a_shared_layer(tmp_path: Path) -> None:
    model = Awkward().eval()
    model.alias = model.shared
    model.shared.weight.data = Pattern.parse("2:4").project(model.shared.weight.data)
    graph_module = symbolic_trace(model)
    graph_module.add_submodule("alias", graph_module.get_submodule("shared"))
    layer = LayerReport("alias", "Conv2d", (4, 4, 3, 3), "2:4", "pruned")
    annotate_graph(graph_module, report=PruneReport((layer,), "magnitude", "2:4"))
    report = export_onnx(graph_module, tmp_path / "m.onnx", torch.randn(2, 4, 6, 6))
    assert report["alias"].ok
    assert report["alias"].initializer in ("alias.weight", "shared.weight")


def test_reference_runs_without_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with evaluating(nn.Identity()) as run:
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert list(run((torch.ones(1),))) == ["output"]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_model_on_a_gpu(precision: str, tmp_path: Path) -> None:
    model = symbolic_trace(Awkward().eval()).cuda()
    x = torch.randn(64, 4, 6, 6)
    report = export_onnx(model, tmp_path / "m.onnx", x, precision=precision, loader=[x.cuda(), x])
    assert report.parity.samples == 128
    assert next(model.parameters()).is_cuda


def test_conv1d_conv3d_and_padding_modes(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3, padding="same", padding_mode="reflect"), nn.ReLU(), nn.Unflatten(2, (2, 2, 4)),
        nn.Conv3d(8, 4, 2, padding=1, dilation=1),
    )  # fmt: skip
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 16))
    assert [layer.shape for layer in report.layers] == [(8, 4, 3), (4, 8, 2, 2, 2)]
