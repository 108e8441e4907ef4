"""A few label-free epochs with the masks held fixed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError, Options
from fxprune.calibration.reading import mirrored
from fxprune.passes.polish import _half


@pytest.fixture
def model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6),
    ).eval()  # fmt: skip


@pytest.fixture
def batches():
    torch.manual_seed(0)
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


def uneven() -> nn.Module:
    """Rows of one layer that differ a hundredfold, as folded BatchNorm leaves them; the next layer makes up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 6),
    ).eval()  # fmt: skip
    scale = torch.logspace(-2, 0, 16)
    with torch.no_grad():
        for layer, following in ((model[0], model[2]), (model[2], model[4])):
            layer.weight.mul_(scale[:, None, None, None])
            layer.bias.mul_(scale)
            following.weight.div_(scale[:, None, None])
    return model


def test_small_rows_take_small_steps(batches):
    errors = {
        epochs: fxprune.compile(uneven(), batches, "1:4", progress=False, options=Options(polish=epochs)).report.layers
        for epochs in (0, 2)
    }
    assert errors[2][0].relative_error == 0  # Nothing is pruned before it: it stays as it is.
    for plain, polished in zip(errors[0], errors[2], strict=True):
        assert polished.relative_error <= 1.05 * plain.relative_error, plain.name
    assert errors[2][-1].relative_error < 0.97 * errors[0][-1].relative_error


def test_epochs_that_gain_nothing_are_undone(batches, monkeypatch):
    monkeypatch.setattr("fxprune.passes.polish.FIRST_STEP", 100.0)
    plain = fxprune.compile(uneven(), batches, "1:4", progress=False)
    with pytest.warns(fxprune.CalibrationWarning, match="polish=2 gained nothing"):
        polished = fxprune.compile(uneven(), batches, "1:4", progress=False, options=Options(polish=2))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, polished.state_dict()[name]), name
    assert polished.report.layers == tuple(
        replace(row, seconds=polished.report[row.name].seconds) for row in plain.report.layers
    )


def test_steps_shrink_until_they_gain(batches, monkeypatch):
    """The first ones are far too large."""
    monkeypatch.setattr("fxprune.passes.polish.FIRST_STEP", 1.0)
    plain, polished = (
        fxprune.compile(uneven(), batches, "1:4", progress=False, options=Options(polish=epochs)) for epochs in (0, 6)
    )
    assert polished.report.layers[-1].relative_error < plain.report.layers[-1].relative_error


def test_transposed_convolutions(batches):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), nn.ReLU(),
        nn.Conv2d(12, 4, 3),
    ).eval()  # fmt: skip
    plain, polished = (
        fxprune.compile(model, batches, "1:4", progress=False, options=Options(polish=epochs)) for epochs in (0, 4)
    )
    assert polished.report["4"].relative_error < plain.report["4"].relative_error
    assert not torch.equal(polished.get_submodule("2").weight, plain.get_submodule("2").weight)


def test_a_model_in_half_precision_gains(batches):
    """Its steps are smaller than what float16 tells apart, and are summed in float32."""
    plain, polished = (
        fxprune.compile(
            uneven().half(), [x.half() for x in batches], "1:4", progress=False, options=Options(polish=epochs)
        )
        for epochs in (0, 4)
    )
    assert polished.report.layers[-1].relative_error < 0.97 * plain.report.layers[-1].relative_error


def test_channels_are_polished_by_default(model, batches):
    def found(**options: int) -> fxprune.PruneReport:
        compiled = fxprune.compile(
            model, batches, "channels:0.7", progress=False, options=Options(channel_multiple=1, **options)
        )
        return compiled.report

    errors = [report.layers[-1].relative_error for report in (found(), found(polish=4), found(polish=0))]
    assert errors[0] == errors[1] < errors[2]


def test_flip_mirrors_half_of_the_images():
    images = torch.arange(64 * 6.0).reshape(64, 1, 2, 3)
    found, other = mirrored([images, 5], _half(64, torch.Generator().manual_seed(0)))
    same = [torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    turned = [torch.equal(a, b.flip(-1)) for a, b in zip(found, images, strict=True)]
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
