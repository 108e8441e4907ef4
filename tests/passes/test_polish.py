"""Label-free distillation with the masks held fixed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune import FxPruneError, Options


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


def test_polish_lowers_the_divergence_and_keeps_the_pattern(model, batches):
    plain = fxprune.compile(model, batches, "1:4", progress=False)
    polished = fxprune.compile(model, batches, "1:4", progress=False, options=Options(polish=30))
    assert polished.report.kl < plain.report.kl
    for layer in polished.report.layers:
        if layer.pattern:
            weight = polished.get_submodule(layer.name).weight
            assert fxprune.Pattern.parse("1:4").check(weight).ok
            assert not torch.equal(weight, plain.get_submodule(layer.name).weight)
    assert all(p.requires_grad and p.grad is None for p in polished.parameters())


def test_the_report_holds_the_errors_after_polishing(model, batches):
    polished = fxprune.compile(model, batches, "1:4", progress=False, options=Options(polish=30, permute=False))
    x = torch.cat(batches)
    with torch.no_grad():
        dense, pruned = model(x), polished(x)
    expected = (dense - pruned).square().sum() / (dense - dense.mean(0)).square().sum()
    assert polished.report.layers[-1].relative_error == pytest.approx(float(expected), rel=1e-4)


def test_polish_needs_logits(batches):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(FxPruneError, match="polish needs a model"):
        fxprune.compile(model, batches, "2:4", progress=False, options=Options(polish=1))


def test_a_negative_number_of_epochs_is_refused():
    with pytest.raises(FxPruneError, match="polish is -1"):
        Options(polish=-1)
