from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune.export.onnx
from fxprune.errors import ExportError, ValidationError
from fxprune.export import OnnxReport, export_onnx, validate_onnx

Exported = tuple[Path, OnnxReport]


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def tiny(**kwargs: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, **kwargs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def test_report(exported: Exported, net: GraphModule) -> None:
    path, report = exported
    assert report.path == str(path)
    assert report.parity.batch_sizes == (3, 6)
    assert report.parity.max_rel < 1e-5
    assert report.parity.agreement == 1
    assert report.pattern == "2:4"
    assert {layer.name: layer.ok for layer in report.layers} == {
        "stem": None, "grouped": True, "square": True, "pointwise": True, "depthwise": None, "up": None, "tokens": True,
        "fc": True,
    }  # fmt: skip
    assert [report[name].axis for name in ("square", "tokens", "fc", "up")] == [1, 0, 1, 0]
    assert report["tokens"].op == "MatMul"
    assert report["stem"].note == "BatchNorm folded in by the exporter"
    assert report.size.file == path.stat().st_size
    weights = [net.get_submodule(layer.name).weight for layer in report.layers]
    assert report.size.weights == sum(w.numel() for w in weights)
    assert report.size.zeros == sum(int((w == 0).sum()) for w in weights)
    assert report["fc"].sparsity == 0.5


def test_the_file_holds_the_weights_in_pattern_along_the_right_axis(exported: Exported, net: GraphModule) -> None:
    stored = arrays(exported[0])
    square = stored["square.weight"]
    for r, g, y, x in np.ndindex(16, 4, 3, 3):
        assert np.count_nonzero(square[r, 4 * g : 4 * g + 4, y, x]) <= 2
    tokens = stored["tokens.weight_transposed"]
    np.testing.assert_array_equal(tokens.T, net.get_submodule("tokens").weight.detach().numpy())


def test_metadata_and_names(exported: Exported, net: GraphModule) -> None:
    model = onnx.load(str(exported[0]))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["fxprune.pattern"] == "2:4"
    assert metadata["fxprune.method"] == "magnitude"
    assert metadata["fxprune.version"]
    layers = json.loads(metadata["fxprune.layers"])
    assert layers["square"] == {"pattern": "2:4", "status": "pruned", "sparsity": 0.5}
    assert layers["stem"]["status"] == "kept"
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["logits", "map"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_no_source_path_in_the_file(exported: Exported) -> None:
    data = exported[0].read_bytes()
    for text in (Path(__file__).name, "conftest.py", "site-packages", "stack_trace", str(Path.cwd())):
        assert text.encode() not in data


def test_quiet_and_without_side_effects(net: GraphModule, images: Tensor, tmp_path: Path, capfd: Any) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    net.get_submodule("bn").eval()
    try:
        export_onnx(net, tmp_path / "net.onnx", images, dynamic_batch=False)
        assert [name for name, module in net.named_modules() if not module.training] == ["bn"]
    finally:
        net.eval()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_fixed_batch(tmp_path: Path) -> None:
    model = tiny()
    path = tmp_path / "fixed.onnx"
    report = export_onnx(model, path, torch.randn(3, 4, 8, 8), dynamic_batch=False)
    assert report.inputs == ("input: float32 (3, 4, 8, 8)",)
    assert report.parity.batch_sizes == (3,)
    assert report.parity.samples == 6
    with pytest.raises(ValidationError, match="dynamic_batch=False for another batch size"):
        validate_onnx(model, path, [torch.randn(2, 4, 8, 8)], progress=False)


def test_one_example_is_enough_for_a_dynamic_batch(tmp_path: Path) -> None:
    report = export_onnx(tiny(), tmp_path / "one.onnx", torch.randn(1, 4, 8, 8))
    assert report.inputs == ("input: float32 (batch, 4, 8, 8)",)
    assert report.parity.batch_sizes == (1, 3)


def test_opset(tmp_path: Path) -> None:
    opset = 18
    assert export_onnx(tiny(), tmp_path / "m.onnx", torch.randn(2, 4, 8, 8), opset=opset).opset == opset
    assert onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == opset


def test_opset_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset 99 cannot be reached"):
        export_onnx(tiny(), tmp_path / "m.onnx", torch.randn(2, 4, 8, 8), opset=99)
    assert list(tmp_path.iterdir()) == []


def test_fp16_keeps_float32_at_the_border(net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    report = export_onnx(net, tmp_path / "half.onnx", images, precision="fp16")
    stored = arrays(tmp_path / "half.onnx")
    assert stored["square.weight"].dtype == np.float16
    np.testing.assert_array_equal(stored["square.weight"], net.get_submodule("square").weight.detach().half().numpy())
    assert report.precision == "fp16"
    assert report.inputs == ("x: float32 (batch, 3, 16, 16)",)
    assert all("float32" in text for text in report.outputs)
    assert 1e-6 < report.parity.max_rel < 2e-3
    assert report.parity.tolerance == 1e-2
    assert report["tokens"].initializer == "tokens.weight_transposed"
    assert all(report[name].ok for name in ("grouped", "square", "pointwise", "tokens", "fc"))
    assert next(net.parameters()).dtype == torch.float32


def test_fp16_names_a_weight_that_is_too_large(tmp_path: Path) -> None:
    model = tiny()
    model[4].weight.data[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"'4.weight' holds 100000, more than float16's largest number 65504"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 8, 8), precision="fp16")


def test_fp16_counts_weights_that_vanish(tmp_path: Path) -> None:
    model = tiny()
    model[4].weight.data[0, :3] = 1e-9
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 8, 8), precision="fp16")
    assert report["4"].note == "3 weights too small for float16 became zero"


def test_float64_model_becomes_float32(tmp_path: Path) -> None:
    model = tiny().double()
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4, 8, 8, dtype=torch.float64))
    assert report.precision == "fp32"
    assert model[0].weight.dtype == torch.float64


def test_external_data(monkeypatch: pytest.MonkeyPatch, net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    monkeypatch.setattr(fxprune.export.onnx, "EXTERNAL_DATA_BYTES", 10_000)
    path = tmp_path / "net.onnx"
    report = export_onnx(net, path, images)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    skeleton = onnx.load(str(path), load_external_data=False)
    assert any(tensor.data_location == TensorProto.EXTERNAL for tensor in skeleton.graph.initializer)
    assert report.size.file == path.stat().st_size + (tmp_path / "net.onnx.data").stat().st_size
    assert validate_onnx(net, path, [images], progress=False)["square"].ok
    with pytest.raises(ExportError, match="external data"):
        export_onnx(net, path, images, sparse_initializers=True)

    data = (tmp_path / "net.onnx.data").read_bytes()
    (tmp_path / "net.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValidationError, match=r"net\.onnx"):
        validate_onnx(net, path, [images], progress=False)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ValidationError, match="lack its external data"):
        validate_onnx(net, path, [images], progress=False)


# --- a failure leaves the old file ------------------------------------------------------------------------------------


def test_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the old file")

    def save(self: Any, destination: str, **kwargs: Any) -> None:
        Path(destination).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save)
    with pytest.raises(ExportError, match=r"cannot write .*m\.onnx: .*No space left on device"):
        export_onnx(tiny(), path, torch.randn(2, 4, 8, 8))
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_wrong_file_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the old file")
    save = torch.onnx.ONNXProgram.save

    def tampered(self: Any, destination: str, **kwargs: Any) -> None:
        value = self.model.graph.initializers["0.weight"]
        value.const_value = onnx_ir_tensor(value.const_value.numpy() + 1, "0.weight")
        save(self, destination, **kwargs)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", tampered)
    with pytest.raises(ValidationError, match=r"(?s)layer '0'.*288 of 288 weights.*is as it was before"):
        export_onnx(tiny(), path, torch.randn(2, 4, 8, 8))
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["m.onnx"]


def onnx_ir_tensor(array: np.ndarray, name: str) -> Any:
    import onnx_ir

    return onnx_ir.tensor(array, name=name)


def test_loader_is_validated_too(tmp_path: Path) -> None:
    model = tiny().eval()
    x = torch.randn(7, 4, 8, 8)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 5
    path = tmp_path / "m.onnx"
    report = export_onnx(model, path, x[:2], loader=[(x[:4], labels[:4]), (x[4:], labels[4:])])
    assert report.path == str(path)
    assert report.parity.samples == 7
    assert report.parity.accuracy_onnx == pytest.approx(500 / 7)


# --- what cannot be exported ------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 5)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        return self.fc(self.conv(image).mean((2, 3)) * scale)


class FixesTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4).sum(1)


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class GivesText(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"x": x, "name": "text"}


@pytest.mark.parametrize(
    ("model", "example", "options", "message"),
    [
        (tiny(), torch.randn(2, 4, 8, 8), {"precision": "int8"}, "unknown precision 'int8'; choose one of fp32, fp16"),
        (tiny(), [], {}, "a tensor for each input of Sequential"),
        (tiny(), "image", {}, "found a str"),
        (TwoInputs(), torch.randn(2, 4, 8, 8), {}, r"each input of TwoInputs \(image, scale\); found a"),
        (FixesTheBatch(), torch.randn(2, 4), {}, "pass dynamic_batch=False"),
        (DependsOnData(), torch.randn(2, 4), {}, "torch.onnx.export fails on DependsOnData"),
        (GivesText(), torch.randn(2, 4), {}, "output 'name' is a str"),
    ],
)  # fmt: skip
def test_errors(model: nn.Module, example: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "m.onnx", example, **options)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no folder"):
        export_onnx(tiny(), tmp_path / "none" / "m.onnx", torch.randn(2, 4, 8, 8))


def test_fixed_batch_of_a_model_that_fixes_it(tmp_path: Path) -> None:
    report = export_onnx(FixesTheBatch(), tmp_path / "m.onnx", torch.randn(2, 4), dynamic_batch=False)
    assert report.layers == ()
