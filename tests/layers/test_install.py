from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune


class View(nn.Module):
    """A 1 x 1 convolution in front of a `view`, which takes no value in channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pointwise = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(torch.relu(self.conv(x)))
        return self.fc(x.view(x.size(0), -1))


@pytest.mark.parametrize("recipe", ["2:4", "rank:ratio=0.5", "rank:ratio=0.5+2:4", "mixed:0.6"])
def test_a_1x1_convolution_keeps_the_memory_format_that_a_view_needs(recipe: str) -> None:
    images = torch.randn(16, 8, 6, 6)
    model = View()
    compiled = fxprune.compile(model, [images], recipe, options=fxprune.Options(polish=1), device="cpu", progress=False)
    assert compiled(images).shape == (16, 3)
    for module in compiled.modules():
        if isinstance(module, nn.Conv2d):
            assert module(torch.randn(2, module.in_channels, 6, 6)).is_contiguous()


def test_weights_that_are_only_tried_do_too() -> None:
    images = torch.randn(16, 8, 6, 6)
    options = fxprune.Options(global_budget=True)
    assert fxprune.compile(View(), [images], "0.5", options=options, device="cpu", progress=False)(images).shape == (
        16,
        3,
    )
    assert fxprune.scan(View(), [images], ["2:4", "0.5"], progress=False).layers


@pytest.mark.parametrize("recipe", ["2:4", "rank:ratio=0.5"])
def test_a_model_in_channels_last_stays_so(recipe: str) -> None:
    images = torch.randn(16, 8, 6, 6)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model.to(memory_format=torch.channels_last)
    compiled = fxprune.compile(model, [images], recipe, device="cpu", progress=False)
    for module in compiled.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert compiled(images).is_contiguous(memory_format=torch.channels_last)
