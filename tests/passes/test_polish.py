"""A few label-free epochs with the masks held fixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError, Options
from fxprune.passes.polish import _half, _mirrored


@pytest.fixture
def model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6),
    ).eval()  # fmt: skip


@pytest.fixture
def batches():
    return list((3 * torch.randn(256, 3, 8, 8)).split(16))


def test_polish_brings_the_outputs_nearer_and_keeps_the_pattern(model, batches):
    plain = fxprune.compile(model, batches, "1:4", progress=False)
    polished = fxprune.compile(model, batches, "1:4", progress=False, options=Options(polish=30))
    assert polished.report.layers[-1].relative_error < plain.report.layers[-1].relative_error
    for layer in polished.report.layers:
        if layer.pattern:
            weight = polished.get_submodule(layer.name).weight
            assert fxprune.Pattern.parse("1:4").check(weight).ok
            assert not torch.equal(weight, plain.get_submodule(layer.name).weight)
    assert all(p.requires_grad and p.grad is None for p in polished.parameters())


def test_the_report_holds_the_errors_after_polishing(model, batches):
    polished = fxprune.compile(model, batches, "1:4", progress=False, options=Options(polish=30, permute=False))
    x = torch.cat(batches)
    x = x[fxprune.Calibration([]).held_out(len(x))]
    with torch.no_grad():
        dense, pruned = model(x), polished(x)
    expected = (dense - pruned).square().sum() / (dense - dense.mean(0)).square().sum()
    assert polished.report.layers[-1].relative_error == pytest.approx(float(expected), rel=1e-4)


def test_excluded_layers_stay_as_they_are(model, batches):
    plain = fxprune.compile(model, batches, "1:4", exclude=("7",), progress=False)
    polished = fxprune.compile(model, batches, "1:4", exclude=("7",), progress=False, options=Options(polish=5))
    assert torch.equal(polished.get_submodule("7").weight, plain.get_submodule("7").weight)
    assert torch.equal(polished.get_submodule("7").bias, model[7].bias)
    assert not torch.equal(polished.get_submodule("3").weight, plain.get_submodule("3").weight)


def test_any_output_will_do(batches):
    """A model that puts out maps, not logits."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3))
    plain, polished = (
        fxprune.compile(model, batches, "1:4", progress=False, options=Options(polish=epochs)) for epochs in (0, 10)
    )
    assert polished.report["2"].relative_error < plain.report["2"].relative_error
    assert polished.report.kl is None


def test_a_model_of_two_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, image: Tensor, other: Tensor) -> Tensor:
            return self.b((self.a(image) + other).relu())

    torch.manual_seed(0)
    batches = [{"image": torch.randn(70, 4, 6, 6), "other": torch.randn(70, 8, 4, 4)} for _ in range(4)]
    plain, polished = (
        fxprune.compile(Two(), batches, "1:4", progress=False, options=Options(polish=epochs, seed=1))
        for epochs in (0, 8)
    )
    assert polished.report["b"].relative_error != plain.report["b"].relative_error


def test_flip_mirrors_half_of_the_images():
    images = torch.arange(64 * 6.0).reshape(64, 1, 2, 3)
    mirrored, other = _mirrored([images, 5], _half(64, torch.Generator().manual_seed(0)))
    same = [torch.equal(a, b) for a, b in zip(mirrored, images, strict=True)]
    turned = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, images, strict=True)]
    assert all(a != b for a, b in zip(same, turned, strict=True))
    assert 16 < sum(same) < 48
    assert other == 5


def test_flip_needs_images():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(FxPruneError, match="flip mirrors images"):
        fxprune.compile(model, [torch.randn(9, 8)], "2:4", progress=False, options=Options(polish=1, flip=True))


def test_a_negative_number_of_epochs_is_refused():
    with pytest.raises(FxPruneError, match="polish is -1"):
        Options(polish=-1)


def test_a_factored_layer_without_a_rectifier_is_polished(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Hardsigmoid(), nn.Conv2d(16, 16, 3), nn.Hardsigmoid(), nn.Flatten())
    factored, polished = (
        fxprune.compile(
            model.eval(),
            batches,
            {"2": "rank:ratio=0.25"},
            method="sparsegpt",
            options=Options(polish=n),
            progress=False,
        )
        for n in (0, 20)
    )
    assert factored.report["2"].status == "factored"
    assert polished.report.kl < factored.report.kl


def test_so_is_one_whose_factors_are_sparse(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Hardsigmoid(), nn.Conv2d(16, 16, 3), nn.Hardsigmoid(), nn.Flatten())
    sparse, polished = (
        fxprune.compile(model.eval(), batches, {"2": "rank:ratio=0.5+2:4"}, options=Options(polish=n), progress=False)
        for n in (0, 20)
    )
    assert {layer.name for layer in polished.report.layers if layer.pattern == "2:4"} >= {"2.1"}
    assert polished.report.kl < sparse.report.kl
