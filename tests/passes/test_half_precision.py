"""Models in float16 and bfloat16: solved as well as in float32, given back in their own type."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxprune
from fxprune.geometry import LayerGeometry
from tests.pipelines import solve

HALVES = [torch.float16, torch.bfloat16]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["admm", "sparsegpt", "magnitude"])
def test_as_good_as_in_float32(method, dtype):
    model = net().to(dtype)
    images = (torch.randn(128, 3, 10, 10) * 4 * torch.rand(128, 1, 1, 1)).to(dtype)  # The network tells them apart.
    before = copy.deepcopy(model.state_dict())
    close = 0.1 if dtype == torch.float16 else 0.3  # Rounding outputs to 8 bits is an error of its own.
    compiled = fxprune.compile(model, images.split(64), method=method, progress=False)
    wide = fxprune.compile(copy.deepcopy(model).float(), images.float().split(64), method=method, progress=False)
    assert {p.dtype for p in compiled.parameters()} == {dtype}
    assert compiled(images).dtype == dtype
    for layer in compiled.report.layers:
        other = wide.report[layer.name]
        assert (layer.status, layer.sparsity) == (other.status, other.sparsity)
        if other.relative_error is not None:
            assert layer.relative_error == pytest.approx(other.relative_error, rel=close, abs=1e-3)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_kept_weights_are_the_float64_solution_rounded_once(dtype, mean):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 4, 3, padding=1).to(dtype)
    x = (torch.randn(32, 8, 8, 8) + mean).to(dtype)
    graph_module = solve(
        nn.Sequential(layer), [x], "sparsegpt", refit=True, bias_correction=True, target="weights", damping=1e-6
    )
    geometry = LayerGeometry.of(layer)
    (patches,) = geometry.patches(x.double())
    (new,) = geometry.to_matrix(graph_module.get_submodule("0").weight.detach().double())
    (old,) = geometry.to_matrix(layer.weight.detach().double())
    patches = patches - patches.mean(0)
    for weights, dense in zip(new, old, strict=True):
        kept = weights != 0
        expected = torch.linalg.lstsq(patches[:, kept], patches @ dense).solution
        torch.testing.assert_close(weights[kept], expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
