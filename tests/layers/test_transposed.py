"""Transposed convolutions: solved, checked, saved, exported and fine-tuned with groups of M along their input channels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.errors import GraphError
from fxprune.geometry import LayerGeometry
from fxprune.passes import verify
from tests.pipelines import report_in, solve
from tests.statistics.reference import naive_patches

LAYERS = [
    nn.ConvTranspose2d(8, 6, 2, stride=2),
    nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2),
    nn.ConvTranspose2d(8, 6, 3, dilation=2, padding=1),
    nn.ConvTranspose1d(8, 6, 5, stride=2, padding=2),
    nn.ConvTranspose3d(8, 6, 2, stride=2),
]


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        dims = len(layer.kernel_size)
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 1]
        self.first, self.norm, self.up, self.up_norm = conv(4, 8, 1), norm(8), layer, norm(layer.out_channels)
        self.last = conv(layer.out_channels, 4, 1)
        for module in (self.norm, self.up_norm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.up_norm(self.up(torch.relu(self.norm(self.first(x)))))))


def batches(layer: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = (5, 6, 4)[: len(layer.kernel_size)]
    return [torch.randn(n, 4, *size, generator=generator, dtype=dtype) for n in (9, 16)]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_kept_weights_are_least_squares_on_naive_patches(layer):
    layer = copy.deepcopy(layer).double().eval()
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(6, 8, *(5, 6, 4)[: len(layer.kernel_size)], generator=generator, dtype=torch.float64) + 0.3]
    graph_module = solve(nn.Sequential(layer), images, "sparsegpt", refit=True, bias_correction=True, damping=1e-9)
    geometry, new = LayerGeometry.of(layer), graph_module.get_submodule("0")
    xs, ys = naive_patches(layer, images[0]), geometry.output_matrix(layer(images[0]).detach())
    weights = geometry.to_matrix(new.weight)
    for g in range(layer.groups):
        x, y = xs[g] - xs[g].mean(0), ys[g] - ys[g].mean(1, keepdim=True)
        for row in range(geometry.rows):
            kept = weights[g, row] != 0
            expected = torch.linalg.lstsq(x[:, kept], y[row]).solution
            torch.testing.assert_close(weights[g, row, kept], expected, rtol=1e-4, atol=1e-6)
    row = report_in(graph_module)["0"]
    output = new(images[0])
    dense = layer(images[0])
    centre = dense.movedim(1, 0).flatten(1).mean(1).reshape(-1, *[1] * len(layer.kernel_size))
    expected = float(((output - dense) ** 2).sum() / ((dense - centre) ** 2).sum())
    assert row.relative_error == pytest.approx(expected, rel=1e-6)
    assert (row.status, row.pattern, row.sparsity) == ("pruned", "2:4", 0.5)


@pytest.mark.parametrize("method", ["admm", "magnitude"])
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_from_compile_to_a_file_and_back(layer, method, tmp_path):
    torch.manual_seed(0)
    model, images = Block(copy.deepcopy(layer)).eval(), batches(layer)
    before = model(images[0])
    compiled = fxprune.compile(model, images, method=method, progress=False)
    weight = compiled.up.weight.detach()
    # Input channels come first, 4 consecutive ones share a group at each output channel and kernel position.
    assert int((weight != 0).unflatten(0, (-1, 4)).sum(1).max()) == 2
    assert compiled.report["up"].shape == tuple(layer.weight.shape)
    assert not [n for n in compiled.graph.nodes if "norm" in str(n.target)]
    nothing = fxprune.compile(model, images, method=method, exclude=("*",), progress=False)
    torch.testing.assert_close(nothing(images[0]), before)
    fxprune.save(compiled, tmp_path / "m.pt")
    assert torch.equal(fxprune.load(tmp_path / "m.pt")(images[0]), compiled(images[0]))
    if len(layer.kernel_size) < 3:
        exported = fxprune.export_onnx(compiled, tmp_path / "m.onnx", images[0])
        assert {check.name: check.ok for check in exported.layers}["up"] is True
    fxprune.keep_zeros(compiled)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    compiled(images[0]).square().sum().backward()
    optimizer.step()
    assert (compiled.up.weight == 0).float().mean() == 0.5
    with torch.no_grad():
        compiled.up.weight[:4] = 1.0
    with pytest.raises(GraphError, match="'up'"):
        verify(compiled)


def test_channels_before_and_behind_are_permuted_without_a_change_of_the_dense_model():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, 16, 2, stride=2)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)
    ).eval()
    images = [torch.randn(64, 4, 8, 8)]
    permuted = fxprune.compile(model, images, options=Options(permute=True), progress=False)
    plain = fxprune.compile(model, images, options=Options(permute=False), progress=False)
    assert [change for change in fxprune.passes.changes(permuted) if change.action == "permuted"]
    assert permuted.report["2"].relative_error < 1.2 * plain.report["2"].relative_error
    assert permuted.report["4"].relative_error < 0.5


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), "depthwise"),
        (nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4), "2 input channels per group are not a multiple of 4"),
    ],
    ids=repr,
)
def test_what_the_pattern_declines_is_refitted(layer, reason):
    report = fxprune.compile(Block(layer), batches(layer), progress=False).report
    assert report["up"].status == "reconstructed"
    assert reason in report["up"].reason


def test_an_output_size_in_the_call_is_kept_with_the_reason():
    class Sized(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.up(self.first(x), output_size=(11, 13)))

    layer = nn.ConvTranspose2d(8, 8, 2, stride=2)
    report = fxprune.compile(Sized(layer), [torch.randn(16, 4, 5, 6)], progress=False).report
    assert report["up"].status == "kept"
    assert "called with an output_size" in report["up"].reason


def test_factors_are_declined_with_the_reason():
    layer = LAYERS[0]
    model = Block(copy.deepcopy(layer))
    report = fxprune.compile(model, batches(layer), {"up": "rank:energy=0.5", "*": "2:4"}, progress=False).report
    assert report["up"].reason == "a transposed convolution is not split in two"


@pytest.mark.parametrize("pattern", ["0.6", "mixed:0.4"])
def test_other_patterns(pattern):
    layer = nn.ConvTranspose2d(8, 8, 2, stride=2)
    options = Options(global_budget=True) if pattern == "0.6" else None
    compiled = fxprune.compile(Block(layer), batches(layer), pattern, options=options, progress=False)
    assert compiled.report["up"].relative_error is not None
    assert compiled.report.sparsity > 0.3
