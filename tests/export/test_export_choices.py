"""What may be chosen or be unusual in an export: number types, memory formats, open sizes, names, unread layers."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

import fxprune
from fxprune.channels.apply import channel_order
from fxprune.errors import ExportError, ValidationError
from fxprune.export import OnnxReport, export_onnx, validate_onnx
from fxprune.export.file_metadata import ChannelOrder, channel_orders, file_metadata, layer_patterns
from fxprune.export.parity import TOLERANCES

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pooled() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


# --- memory formats ---------------------------------------------------------------------------------------------------


class LikeConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class OwnFormat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = pooled()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.contiguous(memory_format=torch.channels_last))


class TakesNhwc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = pooled()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (pooled(), X.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        (pooled().to(memory_format=torch.channels_last), X),
        (OwnFormat(), X),
        (TakesNhwc(), X.permute(0, 2, 3, 1)),
        (LikeConvNext(), X),
    ],
    ids=["example", "weights", "own contiguous", "own permute", "inner permute"],
)  # fmt: skip
def test_no_index_is_computed_for_a_memory_format(model: nn.Module, example: Tensor, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "m.onnx", example)
    assert not operations(tmp_path / "m.onnx").keys() & {"Gather", "Range", "Shape"}


def test_channels_last_gives_the_same_file(tmp_path: Path) -> None:
    export_onnx(pooled(), tmp_path / "a.onnx", X)
    export_onnx(pooled(), tmp_path / "b.onnx", X.contiguous(memory_format=torch.channels_last))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


class Strided(nn.Module):
    """A view that does move numbers: every second one of each row."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).as_strided((4, 8), (16, 2))


def test_a_view_that_moves_numbers_is_kept(tmp_path: Path) -> None:
    assert export_onnx(Strided(), tmp_path / "m.onnx", torch.randn(4, 16), dynamic_batch=False).parity.max_rel == 0


# --- number types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "fp32"), (torch.float64, "fp16")],
)
def test_models_of_other_number_types(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    model = pooled().to(dtype)
    report = export_onnx(model, tmp_path / "m.onnx", X, precision=precision)
    coarser = max(
        str(dtype).removeprefix("torch."), {"fp32": "float32", "fp16": "float16"}[precision], key=list(TOLERANCES).index
    )
    assert report.precision == precision
    assert report.parity.tolerance == TOLERANCES[coarser]
    assert report.inputs == ("input: float32 (batch, 3, 16, 16)",)
    assert model[0].weight.dtype == dtype
    assert validate_onnx(model, tmp_path / "m.onnx", [X, X.to(dtype)], progress=False).parity.samples == 8


class CastsItself(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.fc, self.dtype = nn.Conv2d(3, 8, 3).to(dtype), nn.Linear(8, 5), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x.to(self.dtype)).float().mean((2, 3)))


def test_a_model_that_is_half_in_parts(tmp_path: Path) -> None:
    report = export_onnx(CastsItself(torch.float16), tmp_path / "m.onnx", X)
    assert report["fc"].note == "stored as float32"
    assert report.parity.tolerance == TOLERANCES["float16"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_type_without_kernels(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"has no kernel for Conv in the number type.*without casts to that type"):
        export_onnx(CastsItself(dtype), tmp_path / "m.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"unknown precision 'bf16'; choose one of fp32, fp16 \(.*no kernels"):
        export_onnx(pooled(), tmp_path / "m.onnx", X, precision="bf16")


# --- what nobody reads ------------------------------------------------------------------------------------------------


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dead, self.twin = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.sized, self.lstm = nn.Conv2d(8, 8, 3), nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor, unused: Tensor) -> Any:
        y = self.conv(x)
        self.dead(y)
        pair = (y, self.twin(y))
        sequence, (_, _) = self.lstm(y[..., :2, :2].flatten(2).transpose(1, 2))  # The exporter unrolls each step.
        return pair[0] * self.sized(y).shape[1], sequence


def test_layers_that_nothing_reads_are_not_in_the_file(tmp_path: Path) -> None:
    model = Unread().eval()
    report = export_onnx(model, tmp_path / "m.onnx", (X, X))
    names = {tensor.name for tensor in onnx.load(str(tmp_path / "m.onnx")).graph.initializer}
    assert "conv.weight" in names
    assert not names & {f"{layer}.{kind}" for layer in ("dead", "twin", "sized") for kind in ("weight", "bias")}
    notes = {layer.name: layer.note for layer in report.layers}
    assert notes == {"conv": ""} | dict.fromkeys(
        ("dead", "twin", "sized"), "not in the file: nothing reads what it gives"
    )
    assert report.inputs == ("x: float32 (batch, 3, 16, 16)", "unused: float32 (batch, 3, 16, 16)")
    assert validate_onnx(model, tmp_path / "m.onnx", [(X, X)], progress=False)["dead"].initializer == ""


class Biased(nn.Module):
    """A bias that a small network makes of a table, as swin v2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(8, 8, 3), nn.Buffer(torch.randn(14, 8))
        self.small = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 14))
        self.by_size = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)[:, None].expand(-1, 4)
        return self.conv(x) + self.small(self.table) + self.by_size(ramp)[:-2, 0]


def test_layers_on_constants_are_computed_by_the_exporter(tmp_path: Path) -> None:
    images = torch.randn(4, 8, 16, 16)
    model = fxprune.compile(Biased(), [images], "0.5", method="magnitude", progress=False)
    report = model.report
    assert {row.name: row.status for row in report.layers} == {
        "conv": "pruned",
        "small.0": "kept",
        "small.2": "kept",
        "by_size": "pruned",
    }
    assert "the same for every batch" in report["small.0"].reason
    notes = {layer.name: layer.note for layer in export_onnx(model, tmp_path / "m.onnx", images).layers}
    for name in ("small.0", "by_size"):
        assert notes[name].startswith("not in the file: what it gives does not depend on the images")


def test_a_layer_that_is_read_must_be_in_the_file(tmp_path: Path) -> None:
    model = pooled()
    model[2].weight.data.zero_()  # its numbers have no influence, but the layer has
    export_onnx(model, tmp_path / "m.onnx", X)
    file = onnx.load(str(tmp_path / "m.onnx"))
    tensor = next(t for t in file.graph.initializer if t.name == "2.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((8, 8, 3, 3), 1e-20, np.float32), "2.weight"))
    onnx.save(file, str(tmp_path / "m.onnx"))
    with pytest.raises(ValidationError, match="layer '2'"):
        validate_onnx(model, tmp_path / "m.onnx", [X], progress=False)


# --- open sizes -------------------------------------------------------------------------------------------------------


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.relu(self.down(x)))


class Resizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), size=x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize(
    ("model", "precision"),
    [(pooled(), "fp16"), (Unet(), "fp32"), (Resizes(), "fp32")],
    ids=["pooled", "unet", "resize"],
)
def test_open_height_and_width(model: nn.Module, precision: str, tmp_path: Path) -> None:
    model.eval()
    report = export_onnx(model, tmp_path / "m.onnx", X, dynamic_size=True, precision=precision)
    assert report.inputs[0].endswith("float32 (batch, 3, height, width)")
    assert any("it was also run on" in note for note in report.notes)
    other = torch.randn(2, 3, 40, 24)
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(
        None, {report.inputs[0].split(":")[0]: other.numpy()}
    )
    with torch.no_grad():
        wanted = model(other)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-2, atol=1e-2 if precision == "fp16" else 1e-5)


def test_open_size_with_a_fixed_batch(tmp_path: Path) -> None:
    report = export_onnx(pooled(), tmp_path / "m.onnx", X, dynamic_size=True, dynamic_batch=False)
    assert report.inputs == ("input: float32 (4, 3, height, width)",)


class PoolsToFour(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


class Flattens(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Flattens(), r"takes no other height and width.*\(at 48x80: .*\); leave dynamic_size out"),
        (PoolsToFour(), "leave dynamic_size out"),
    ],
)
def test_models_that_fix_their_size(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises((ExportError, ValidationError), match=f"(?s){message}"):
        export_onnx(model, tmp_path / "m.onnx", X, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []
    export_onnx(model, tmp_path / "m.onnx", X)


# --- names ------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"sum": self.conv(left).mean() + self.conv(right), "right": self.conv(right)}


def test_chosen_names(tmp_path: Path) -> None:
    report = export_onnx(
        Two(),
        tmp_path / "m.onnx",
        (X, X[..., :12]),
        input_names=["a", "b"],
        output_names=("relu", "c"),
        dynamic_size=True,
    )
    assert report.inputs == ("a: float32 (batch, 3, height, width)", "b: float32 (batch, 3, height, width_1)")
    assert [text.split(":")[0] for text in report.outputs] == ["relu", "c"]


def test_a_name_that_the_exporter_uses_inside(tmp_path: Path) -> None:
    report = export_onnx(pooled(), tmp_path / "m.onnx", X, input_names=["relu"], output_names=["val_3"])
    assert report.inputs[0].startswith("relu:")


class NamedLikeItsPorts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.x, self.output = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.output + self.x


def test_parameters_called_like_inputs_and_outputs(tmp_path: Path) -> None:
    report = export_onnx(NamedLikeItsPorts(), tmp_path / "m.onnx", X)
    assert (report.inputs[0].split(":")[0], report.outputs[0].split(":")[0]) == ("input_x", "output_output")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"input_names": ["a"]}, r"a name for each of the 2 inputs of Two \(left, right\)"),
        ({"output_names": "ab"}, "a name for each of the 2 outputs"),
        ({"output_names": ["a", ""]}, "a name for each of the 2 outputs"),
        ({"input_names": ["a", "a"]}, "the name 'a' is given to two"),
        ({"input_names": ["a", "b"], "output_names": ["b", "c"]}, "the name 'b' is given to two"),
        ({"input_names": ["conv.weight", "b"]}, "'conv.weight' is the name of a parameter"),
    ],
)
def test_names_that_do_not_fit(names: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(Two(), tmp_path / "m.onnx", (X, X), **names)


# --- what the file says of itself, and what was not checked -----------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> GraphModule:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    torch.manual_seed(0)
    return fxprune.compile(model.eval(), [torch.randn(32, 3, 16, 16)], "2:4", progress=False)


def test_the_file_says_how_channels_were_permuted(compiled: GraphModule, tmp_path: Path) -> None:
    export_onnx(compiled, tmp_path / "m.onnx", X)
    metadata = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    orders = channel_orders(metadata)
    wanted = {str(node.target): channel_order(node) for node in compiled.graph.nodes if node.op == "call_module"}
    assert orders == {
        name: ChannelOrder(*(None if order is None else tuple(order.tolist()) for order in pair))
        for name, pair in wanted.items()
        if pair != (None, None)
    }
    assert orders["3"].inputs == orders["0"].outputs != tuple(range(16))
    assert len(json.loads(metadata["fxprune.channels"])["orders"]) == 2  # shared by the layers on both sides
    assert layer_patterns(metadata) == {"0": "", "3": "2:4", "7": "2:4"}
    assert "fxprune.channels" not in file_metadata(pooled(), None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "[" * 100_000,
        '{"orders": 3, "layers": {}}',
        '{"orders": [[0, 0]], "layers": {"a": [0, 0]}}',
        '{"orders": [], "layers": {"a": [5, -1]}}',
        '{"orders": [[0, 1]], "layers": {"a": 3, "b": [0], "c": ["x", true]}}',
    ],
)
def test_metadata_that_makes_no_sense_is_ignored(text: str) -> None:
    assert channel_orders({"fxprune.channels": text}) == {}
    assert set(layer_patterns({"fxprune.layers": text}).values()) <= {""}


@pytest.mark.parametrize("lost", ["traced again", "meta cleared"])
def test_a_pruned_model_without_a_report_is_warned_of(compiled: GraphModule, lost: str, tmp_path: Path) -> None:
    model = symbolic_trace(nn.Sequential(compiled))
    if lost == "meta cleared":
        model = fxprune.load(_saved(compiled, tmp_path))
        model.meta.clear()
    with pytest.warns(UserWarning, match="No sparsity pattern was checked: many weights of .* are zero") as caught:
        report: OnnxReport = export_onnx(model, tmp_path / "m.onnx", X, loader=[X])
    assert len([w for w in caught if "No sparsity pattern" in str(w.message)]) == 1
    assert "No sparsity pattern was checked" in str(report)


def _saved(compiled: Any, folder: Path) -> Path:
    fxprune.save(compiled, folder / "m.pt")
    return folder / "m.pt"


def test_no_warning_where_all_is_well(compiled: GraphModule, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_onnx(compiled, tmp_path / "m.onnx", X)
        export_onnx(pooled(), tmp_path / "d.onnx", X)


def test_the_old_order_of_arguments_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"takes the model first, .*validate_onnx\(model, path, loader\)"):
        validate_onnx(tmp_path / "m.onnx", pooled(), [X])  # type: ignore[arg-type]


def test_inputs_of_a_wrong_size_are_told_beside_those_that_were_calibrated_on(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    compiled = fxprune.compile(net, [torch.randn(16, 3, 8, 8)], progress=False)
    with pytest.raises(
        ExportError, match=r"does not run on inputs of shape \(2, 4, 8, 8\): .*calibrated on input \(4, 3"
    ):
        fxprune.export_onnx(compiled, tmp_path / "net.onnx", torch.randn(2, 4, 8, 8))


class Squeezed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x).squeeze(1), torch.squeeze(self.conv(x).mean(-1, keepdim=True), -1)


@pytest.mark.parametrize("channels", [1, 5])
def test_squeeze_takes_out_an_axis_of_size_1_only(channels, tmp_path):
    report = export_onnx(Squeezed(channels).eval(), tmp_path / "net.onnx", X)
    assert report.parity.max_rel < 1e-6
    (shape, *_) = [output.shape for output in onnx_shapes(tmp_path / "net.onnx")]
    assert len(shape) == (3 if channels == 1 else 4)


def onnx_shapes(path: Path) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})
