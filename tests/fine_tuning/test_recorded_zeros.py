from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.annotations import annotate_graph
from fxprune.errors import CheckpointError, GraphError, ValidationError
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.fine_tuning.recorded_zeros import FilledZerosWarning, ZeroMask
from tests.fine_tuning.small_net import Net, Train, zero_masks

LOST = r"448 of 448 zeros have been filled in since the model was pruned: fxprune\.restore_zeros\(compiled\) puts them back"


@pytest.fixture
def broken(compiled: fxprune.CompiledModule) -> fxprune.CompiledModule:
    """A copy without a single zero."""
    copied = copy.deepcopy(compiled)
    for p in copied.parameters():
        p.data[p == 0] = 0.01
    return copied


@pytest.mark.parametrize("shape", [(3, 5), (8, 4, 3, 3), (1, 1), (0, 4), (2, 4)])
def test_a_mask_says_where_a_weight_was_zero(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * (torch.rand(shape) < 0.5)
    mask = ZeroMask.of("layer", weight, "2:4")
    assert torch.equal(mask.zeros(), weight == 0)
    assert mask.bits.numel() == -(-weight.numel() // 8)
    with pytest.raises(ValueError, match="zeros of layer 'layer' are not one bit for each weight"):
        ZeroMask("layer", "2:4", (*shape, 9), mask.bits.double())


def test_nothing_is_said_of_a_model_that_has_its_zeros(
    compiled: fxprune.CompiledModule, images: Tensor, tmp_path: Path
) -> None:
    filled = fxprune.filled_zeros(compiled)
    assert (bool(filled), filled.count, filled.recorded) == (False, 0, 448)
    assert "filled in" not in str(compiled.report)
    assert compiled.report is compiled.report
    compiled.get_submodule("conv2").bias.data += 1
    compiled.half()
    assert not fxprune.filled_zeros(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreement(compiled, compiled, [images.half()])
    assert not fxprune.filled_zeros(Net())


def test_every_reader_says_that_zeros_are_gone(
    broken: fxprune.CompiledModule, compiled: fxprune.CompiledModule, images: Tensor, tmp_path: Path
) -> None:
    filled = fxprune.filled_zeros(broken)
    assert dict(filled.layers) == {"conv1": 144, "conv2": 288, "fc": 16}
    report = broken.report
    assert report.sparsity == 0
    assert report["conv2"].pattern == ""
    assert report["conv2"].reason == "288 zeros filled in since it was pruned to 2:4"
    assert report.to_dict()["notes"] == (str(filled),)
    assert str(filled) in report.summary
    assert "288 zeros filled in since" in report.render(width=160)
    for action in (
        lambda: fxprune.save(broken, tmp_path / "model.pt"),
        lambda: fxprune.export_onnx(broken, tmp_path / "model.onnx", images),
    ):
        with pytest.raises((CheckpointError, ValidationError), match=LOST):
            action()
    assert list(tmp_path.iterdir()) == []
    fxprune.export_onnx(compiled, tmp_path / "model.onnx", images)
    with pytest.raises(ValidationError, match=LOST):
        fxprune.validate_onnx(broken, tmp_path / "model.onnx", [images], progress=False)
    text = str(fxprune.diff(compiled, broken)).replace("\n", " ")
    assert "zeros filled in since" in text
    assert "288 of its zeros have been filled in" in text
    assert "restore_zeros" in text
    with pytest.warns(FilledZerosWarning, match=LOST):
        evaluate(broken, [(images, torch.zeros(32, dtype=torch.long))])
    with pytest.warns(FilledZerosWarning, match=LOST):
        agreement(compiled, broken, [images])


def test_one_zero_is_enough_to_be_told(compiled: fxprune.CompiledModule) -> None:
    weight = compiled.get_submodule("fc").weight
    weight.data[weight == 0] = torch.tensor([float("nan"), *[0.0] * 15])
    assert dict(fxprune.filled_zeros(compiled).layers) == {"fc": 1}
    assert compiled.report.sparsity == pytest.approx(447 / 896)


def test_restoring_gives_the_zeros_back_and_says_how_many(
    broken: fxprune.CompiledModule, compiled: fxprune.CompiledModule, images: Tensor, tmp_path: Path
) -> None:
    broken.get_submodule("fc").weight.data.copy_(compiled.get_submodule("fc").weight)
    assert fxprune.restore_zeros(broken) == {"conv1": 144, "conv2": 288, "fc": 0}
    assert all(torch.equal(p, q) for p, q in zip(broken.parameters(), compiled.parameters(), strict=True))
    assert broken.report == compiled.report
    assert fxprune.restore_zeros(broken) == {"conv1": 0, "conv2": 0, "fc": 0}
    fxprune.save(broken, tmp_path / "model.pt")


def test_the_places_survive_saving_and_copying(
    compiled: fxprune.CompiledModule, train: Train, images: Tensor, tmp_path: Path
) -> None:
    fxprune.save(compiled, tmp_path / "model.pt")
    for other in (fxprune.load(tmp_path / "model.pt"), copy.deepcopy(copy.deepcopy(compiled))):
        train(other, torch.optim.SGD(other.parameters(), lr=0.1))
        assert fxprune.filled_zeros(other)
        assert sum(fxprune.restore_zeros(other).values()) > 400
        masks, wanted = zero_masks(other), zero_masks(compiled)
        assert masks.keys() == wanted.keys()
        assert all(torch.equal(masks[name], wanted[name]) for name in masks)


def test_zeros_in_other_places_are_zeros(compiled: fxprune.CompiledModule) -> None:
    weight = compiled.get_submodule("conv2").weight
    weight.data = weight.data.roll(1, 0) + 0.0  # other rows, still 2:4
    assert not fxprune.filled_zeros(compiled)
    fxprune.keep_zeros(compiled).remove()
    weight.data = weight.data.roll(1, 1)  # as many, and no longer 2:4
    assert list(fxprune.filled_zeros(compiled).layers) == ["conv2"]


def test_a_layer_that_was_replaced(broken: fxprune.CompiledModule, images: Tensor, tmp_path: Path) -> None:
    broken.fc = nn.Linear(8, 3)
    message = r"layer 'fc' was 4x8 and is 3x8 now\. Nothing was changed; .*exclude=\('fc',\)\)"
    with pytest.raises(GraphError, match=message):
        fxprune.restore_zeros(broken)
    assert fxprune.filled_zeros(broken).count == 432
    assert fxprune.restore_zeros(broken, exclude=("fc",)) == {"conv1": 144, "conv2": 288}
    layer = broken.report["fc"]
    assert (layer.status, layer.pattern, layer.shape) == ("kept", "", (3, 8))
    assert layer.reason == "replaced since it was pruned as 4x8"
    fxprune.save(broken, tmp_path / "model.pt")
    fxprune.export_onnx(broken, tmp_path / "model.onnx", images)
    del broken.fc
    with pytest.raises(GraphError, match="layer 'fc' was 4x8 and is gone"):
        fxprune.restore_zeros(broken)


def test_what_cannot_be_restored(broken: fxprune.CompiledModule) -> None:
    with pytest.raises(GraphError, match="no zeros were recorded for Net"):
        fxprune.restore_zeros(Net())
    with pytest.raises(GraphError, match="'conv9' matches no pruned layer; there are: conv1, conv2, fc"):
        fxprune.restore_zeros(broken, exclude="conv9")
    annotate_graph(broken, zeros=())  # a file of an older version
    filled = fxprune.filled_zeros(broken)
    assert dict(filled.layers) == {"conv1": 144, "conv2": 288, "fc": 16}
    assert "where they were is not recorded, so compile the model again" in str(filled)
    assert str(filled) in broken.report.summary


def test_layers_pruned_before_count_and_chance_zeros_do_not(images: Tensor) -> None:
    model = Net()
    model.conv1.weight.data[:, ::2] = 0
    model.fc.weight.data[0, 0] = 0
    exclude = ("conv1", "fc")
    compiled = fxprune.compile(
        model, images.split(16), method="magnitude", exclude=exclude, device="cpu", progress=False
    )
    assert fxprune.filled_zeros(compiled).recorded == 144 + 288
    compiled.get_submodule("fc").weight.data += 1
    assert not fxprune.filled_zeros(compiled)


def test_a_wrapper_is_looked_through(broken: fxprune.CompiledModule) -> None:
    whole = nn.Sequential(broken, nn.Linear(4, 2))
    assert dict(fxprune.filled_zeros(whole).layers) == {"0.conv1": 144, "0.conv2": 288, "0.fc": 16}
    assert fxprune.restore_zeros(whole) == {"0.conv1": 144, "0.conv2": 288, "0.fc": 16}


def test_answers_can_be_pickled(broken: fxprune.CompiledModule) -> None:
    filled = fxprune.filled_zeros(broken)
    assert pickle.loads(pickle.dumps(filled)) == filled
