from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.annotations import annotate_graph, report_of
from fxprune.errors import ValidationError
from fxprune.export import OnnxReport, export_onnx, validate_onnx

Exported = tuple[Path, OnnxReport]
Corrupt = Callable[[str, Callable[[np.ndarray], np.ndarray]], Path]


def refuse(path: Path, model: nn.Module, images: Tensor, *words: str) -> str:
    with pytest.raises(ValidationError) as caught:
        validate_onnx(model, path, [images], progress=False)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


def test_whole_loader(exported: Exported, net: GraphModule, images: Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    report = validate_onnx(net, exported[0], [(images[:4], labels[:4]), (images[4:], labels[4:])], progress=False)

    with torch.no_grad():
        logits, other = net(images)["logits"], net(images)["map"]
    session = onnxruntime.InferenceSession(str(exported[0]), providers=["CPUExecutionProvider"])
    found_logits, found_other = session.run(None, {"x": images.numpy()})
    differences = [np.abs(found_logits - logits.numpy()), np.abs(found_other - other.numpy())]
    assert report.parity.samples == 6
    assert report.parity.batch_sizes == (2, 4)
    assert report.parity.max_abs <= 1e-6
    assert report.parity.max_abs == pytest.approx(max(d.max() for d in differences), rel=1, abs=1e-7)
    accuracy = 100 * float((logits.argmax(1) == labels).double().mean())
    assert report.parity.accuracy_model == pytest.approx(accuracy)
    assert report.parity.accuracy_onnx == pytest.approx(accuracy)
    assert report.parity.agreement == 1
    assert report["square"].ok
    assert report["stem"].ok is None


def test_worst_sample_is_counted_over_batches(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    path = corrupt("fc.bias", lambda b: b * (1 + 1e-5))
    loader = [images[:2] * 0.1, images[2:4] * 0.1, images[4:] * torch.tensor([0.1, 30.0])[:, None, None, None]]
    report = validate_onnx(net, path, loader, progress=False)
    with torch.no_grad():
        wanted = net(torch.cat(loader))["logits"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    relative = []
    for batch in loader:
        with torch.no_grad():
            wanted = [net(batch)[key].numpy() for key in ("logits", "map")]
        found = session.run(None, {"x": batch.numpy()})
        by_sample = [np.abs(f - w).reshape(2, -1).max(1) / np.abs(w).max() for f, w in zip(found, wanted, strict=True)]
        relative.append(np.maximum(*by_sample))
    assert report.parity.worst_sample == int(np.concatenate(relative).argmax())
    assert report.parity.max_rel == pytest.approx(float(np.concatenate(relative).max()), rel=1e-3)


# --- deliberate corruption -------------------------------------------------------------------------------------------


def test_filled_in_weight(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    weight = net.get_submodule("square").weight.detach().numpy()
    channel, y, x = 5, 1, 2
    group = next(g for g in range(4) if (weight[channel, 4 * g : 4 * g + 4, y, x] == 0).sum() == 2)
    zero = 4 * group + int(np.flatnonzero(weight[channel, 4 * group : 4 * group + 4, y, x] == 0)[0])

    def fill(array: np.ndarray) -> np.ndarray:
        array[channel, zero, y, x] = 1e-7  # far too small to show in the outputs
        return array

    refuse(
        corrupt("square.weight", fill), net, images,
        "layer 'square'", "pattern 2:4 is broken in 1 of 576 groups of 4 along axis 1",
        f"output channel 5, kernel position (1, 2), input channels {4 * group} to {4 * group + 3} hold 3 non-zeros",
        f"1 of 2304 weights are not the model's; the first, at (5, {zero}, 1, 2), is 1e-07 in the file and 0 in the",
        "export the model again",
    )  # fmt: skip


def test_filled_in_weight_of_transposed_linear(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    def fill(array: np.ndarray) -> np.ndarray:
        array[:4, 3] = 1.0
        return array

    message = refuse(corrupt("tokens.weight_transposed", fill), net, images, "layer 'tokens'", "along axis 0")
    assert "output channel 3, input channels 0 to 3 hold 4 non-zeros" in message


def test_moved_zero_keeps_the_pattern_but_not_the_weight(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    def swap(array: np.ndarray) -> np.ndarray:
        array[2, 0:4] = array[2, 0:4][::-1].copy()
        return array

    message = refuse(corrupt("square.weight", swap), net, images, "layer 'square'", "weights are not the model's")
    assert "is broken" not in message


def test_swapped_axes(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    refuse(
        corrupt("square.weight", lambda w: w.transpose(1, 0, 2, 3)), net, images,
        "layer 'square'", "holds along the output channels instead: the axes are swapped", "first two axes are swapped",
    )  # fmt: skip


def test_swapped_kernel_axes(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    refuse(
        corrupt("depthwise.weight", lambda w: w.transpose(0, 1, 3, 2)), net, images,
        "layer 'depthwise'", "kernel axes are swapped",
    )  # fmt: skip


def test_wrong_transpose_flag(exported: Exported, net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    model = onnx.load(str(exported[0]))
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    next(a for a in gemm.attribute if a.name == "transB").i = 0
    onnx.save(model, str(tmp_path / "flag.onnx"))
    refuse(tmp_path / "flag.onnx", net, images, "layer 'fc'", "its first two axes are swapped")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_truncated_file(share: float, exported: Exported, net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    data = exported[0].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(share * len(data))])
    refuse(path, net, images, str(path), "not a complete ONNX file", "truncated")


def test_rejected_by_the_checker(exported: Exported, net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    model = onnx.load(str(exported[0]))
    model.graph.node[1].input[0] = "nowhere"
    onnx.save(model, str(tmp_path / "bad.onnx"))
    refuse(tmp_path / "bad.onnx", net, images, "onnx.checker rejects", "nowhere")


def test_missing_file(net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    refuse(tmp_path / "none.onnx", net, images, "there is no file", "none.onnx")


def test_same_architecture_other_weights(exported: Exported, net: GraphModule, images: Tensor) -> None:
    torch.manual_seed(5)
    other = copy.deepcopy(net)
    other.load_state_dict({k: torch.randn_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()})
    other.meta.clear()
    other.eval()
    message = refuse(exported[0], other, images, "8 of 8 layers are not the model's", "the file of another model")
    assert "and 3 more" in message


def test_other_architecture(exported: Exported, images: Tensor) -> None:
    other = nn.Sequential(nn.Conv2d(3, 7, 5), nn.Flatten(), nn.Linear(7 * 144, 3))
    refuse(
        exported[0], other, images,
        "layer '0': no node of the file reads a weight of shape 7x3x5x5 like its own", "the file of another model",
    )  # fmt: skip


def test_other_graph_with_the_same_weights(
    exported: Exported, net: GraphModule, images: Tensor, tmp_path: Path
) -> None:
    model = onnx.load(str(exported[0]))
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
    onnx.save(model, str(tmp_path / "graph.onnx"))
    refuse(tmp_path / "graph.onnx", net, images, "differs from the model's by", "its graph is not")


def test_changed_bias_is_named(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    path = corrupt("grouped.bias", lambda b: b + 1)
    refuse(path, net, images, "differs from the model's by", "these tensors of the file are not: grouped.bias. Export")


def test_nan_in_the_file(corrupt: Corrupt, net: GraphModule, images: Tensor) -> None:
    path = corrupt("fc.bias", lambda b: np.where(np.arange(10) == 3, np.nan, b).astype(b.dtype))
    refuse(path, net, images, "the file in onnxruntime gives NaN or infinity in output 'logits' at sample 0")


def test_model_that_lost_its_pattern(net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    other = copy.deepcopy(net)
    other.get_submodule("square").weight.data[0] = 0.25
    with pytest.raises(ValidationError, match=r"\(square\): .* zeros have been filled in .*compile the model again"):
        export_onnx(other, tmp_path / "lost.onnx", images)
    assert list(tmp_path.iterdir()) == []


def test_report_that_does_not_fit_the_model(exported: Exported, net: GraphModule, images: Tensor) -> None:
    other = copy.deepcopy(net)
    report = report_of(net)
    renamed = [
        layer if layer.name != "fc" else type(layer)(**{**layer.__dict__, "name": "gone"}) for layer in report.layers
    ]
    annotate_graph(other, report=type(report)(tuple(renamed), "magnitude", "2:4"))
    refuse(exported[0], other.eval(), images, "gone was pruned, but the model has no such layer")


# --- files that look different but are right ------------------------------------------------------------------------


def test_renamed_initializers_are_found_by_value(
    exported: Exported, net: GraphModule, images: Tensor, tmp_path: Path
) -> None:
    model = onnx.load(str(exported[0]))
    names = {tensor.name: f"onnx::Conv_{i}" for i, tensor in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    report = validate_onnx(net, tmp_path / "renamed.onnx", [images], progress=False)
    assert report["tokens"].axis == 0
    assert report["stem"].initializer == names["stem.weight"]  # not equal, BatchNorm is folded in: the one most alike
    assert report["stem"].note == "BatchNorm folded in by the exporter"


def test_renamed_and_corrupted(exported: Exported, net: GraphModule, images: Tensor, tmp_path: Path) -> None:
    model = onnx.load(str(exported[0]))
    for tensor in model.graph.initializer:
        if tensor.name == "square.weight":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0, :4, 0, 0] = 0.02
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, "other"))
    for node in model.graph.node:
        node.input[:] = ["other" if name == "square.weight" else name for name in node.input]
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    refuse(tmp_path / "renamed.onnx", net, images, "layer 'square'", "initializer 'other'", "pattern 2:4 is broken")


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_empty_loader(exported: Exported, net: GraphModule) -> None:
    with pytest.raises(ValidationError, match="no batches"):
        validate_onnx(net, exported[0], [], progress=False)


def test_generator_of_dicts(exported: Exported, net: GraphModule, images: Tensor) -> None:
    loader = ({"image": images[i : i + 3], "label": torch.zeros(3, dtype=torch.long)} for i in (0, 3))
    report = validate_onnx(net, exported[0], loader, progress=False)
    assert report.parity.samples == 6
    assert report.parity.accuracy_model == report.parity.accuracy_onnx


def test_batch_that_does_not_fit(exported: Exported, net: GraphModule, images: Tensor) -> None:
    with pytest.raises(
        ValidationError, match=re.escape("x: float32 (batch, 3, 16, 16) does not fit batch 1 of shape (2, 3, 8, 8)")
    ):
        validate_onnx(net, exported[0], [images, images[:2, :, :8, :8]], progress=False)


def test_progress_bar_goes_to_stderr_only(
    exported: Exported, net: GraphModule, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    validate_onnx(net, exported[0], [images])
    assert capsys.readouterr().out == ""


def test_training_flags_are_restored(exported: Exported, net: GraphModule, images: Tensor) -> None:
    other = copy.deepcopy(net)
    other.train()
    other.get_submodule("bn").eval()
    flags = [module.training for module in other.modules()]
    validate_onnx(other, exported[0], [images], progress=False)
    assert [module.training for module in other.modules()] == flags


def test_same_shape_layers_do_not_hide_each_other(tmp_path: Path) -> None:
    """Two layers of one shape: when one of them is lost, the other is not taken for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    export_onnx(model, tmp_path / "two.onnx", torch.randn(2, 4, 8, 8))
    file = onnx.load(str(tmp_path / "two.onnx"))
    for node in file.graph.node:
        node.input[:] = ["0.weight" if name == "2.weight" else name for name in node.input]
    kept = [tensor for tensor in file.graph.initializer if tensor.name != "2.weight"]
    del file.graph.initializer[:]
    file.graph.initializer.extend(kept)
    onnx.save(file, str(tmp_path / "lost.onnx"))
    refuse(
        tmp_path / "lost.onnx",
        model,
        torch.randn(2, 4, 8, 8),
        "layer '2': no node of the file reads a weight of shape 4x4x3x3 like its own",
    )


def test_a_sigmoid_that_is_nowhere_near_one_may_be_off_by_what_onnxruntime_rounds(tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 1, 1), nn.Sigmoid()).eval()
    nn.init.constant_(net[1].bias, -12.0)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    parity = export_onnx(net, tmp_path / "net.onnx", x).parity
    assert 1e-9 < parity.max_abs < 1.5e-7
    nn.init.constant_(net[1].bias, -8.0)
    with pytest.raises(ValidationError, match="differs from the model's"):
        validate_onnx(net, tmp_path / "net.onnx", [x], progress=False)
