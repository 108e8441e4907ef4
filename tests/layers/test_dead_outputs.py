"""Output channels that have lost all their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune import LayerReport
from fxprune.export import inspect_onnx
from fxprune.geometry import LayerGeometry
from fxprune.layers.dead_outputs import dead_outputs, many_dead_outputs, new_dead_outputs

LAYERS = {
    "linear": nn.Linear(8, 6),
    "convolution": nn.Conv2d(8, 6, 3),
    "grouped": nn.Conv2d(8, 6, (3, 1), groups=2),
    "depthwise": nn.Conv1d(6, 6, 3, groups=6),
    "transposed": nn.ConvTranspose2d(8, 6, 3),
    "transposed, grouped": nn.ConvTranspose1d(8, 6, 3, groups=2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_they_are_those_that_no_input_reaches(layer: nn.Module) -> None:
    geometry, groups = LayerGeometry.of(layer), getattr(layer, "groups", 1)
    dense = torch.randn_like(layer.weight)
    weight = dense.clone()
    for channel in (1, 4):  # One in each of two groups.
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            group, row = divmod(channel, 6 // groups)
            weight[group * 8 // groups : (group + 1) * 8 // groups, row] = 0
        else:
            weight[channel] = 0
    if "ConvTranspose" not in type(layer).__name__ and weight[0].numel() > 3:
        weight[2].view(-1)[1:] = 0  # One weight is left.
    assert dead_outputs(geometry, weight).nonzero().flatten().tolist() == [1, 4]
    assert new_dead_outputs(geometry, weight, dense) == 2
    assert new_dead_outputs(geometry, weight, weight) == 0


def test_a_wide_layer_in_blocks_counts_whole_channels() -> None:
    geometry = replace(LayerGeometry.of(nn.Conv2d(8, 6, 3)), blocks=2)
    weight = torch.randn(6, 8, 3, 3)
    weight[1] = 0
    weight[3, :4] = 0  # Half of them.
    assert dead_outputs(geometry, weight).nonzero().flatten().tolist() == [1]


def test_the_report_counts_them_and_warns_of_many(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 12)).eval()
    with torch.no_grad():
        net[2].weight[:3] *= 1e-3  # What the largest weights leave out first.
    images = torch.randn(64, 3, 6, 6)
    with pytest.warns(fxprune.CalibrationWarning, match="3 of 8 output channels of 2 have lost all their weights"):
        compiled = fxprune.compile(net, images.split(16), "0.7", method="magnitude", exclude=["4"], progress=False)
    assert [row.dead_outputs for row in compiled.report.layers] == [0, 3, 0]
    assert (
        "Output channels that have lost all their weights, and give their bias alone: 3 of 2."
        in compiled.report.summary
    )
    assert "3 output channels all zero" in " ".join(str(compiled.report).split())
    fxprune.export_onnx(compiled, tmp_path / "net.onnx", images[:2])
    told = inspect_onnx(tmp_path / "net.onnx")
    assert {layer.initializer: layer.dead_outputs for layer in told.layers} == {
        "0.weight": 0, "2.weight": 3, "4.weight": 0
    }  # fmt: skip
    assert "Output channels whose weights are all zero: 3 of 2.weight." in told.summary


@pytest.mark.parametrize(("dead", "warns"), [(0, False), (3, False), (4, True)])
def test_many_is_a_quarter(dead: int, warns: bool) -> None:
    assert bool(many_dead_outputs([LayerReport("a", "Conv2d", (16, 4, 3, 3), dead_outputs=dead)])) == warns
