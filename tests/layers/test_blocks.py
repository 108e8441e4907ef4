"""Layers of many columns: solved in blocks of their input channels, each of which is to give what it gave."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.annotations import annotation
from fxprune.geometry import LayerGeometry
from fxprune.passes import Allocate, InsertObservers, RemoveObservers, SolveLayers, verify
from fxprune.recipe import Recipe
from fxprune.tracing import trace
from tests.pipelines import calibration, method_of, report_in

LAYERS = [
    nn.Linear(48, 6),
    nn.Conv2d(16, 6, 3, padding=1),
    nn.Conv2d(32, 6, 3, padding=1, stride=2, groups=2, bias=False),
    nn.ConvTranspose2d(16, 6, 3, stride=2, padding=1),
    nn.Conv1d(16, 6, 3),
]
BLOCK = 40


def images(layer: nn.Module, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (400, 48) if isinstance(layer, nn.Linear) else (24, layer.in_channels, *(6, 7)[: len(layer.kernel_size)])
    return torch.randn(shape, generator=generator, dtype=torch.float64) + mean


def solved(
    model: nn.Module, batches: list[Tensor], solver: str, recipe: object = "2:4", **options: object
) -> GraphModule:
    """As `pipelines.solve`, with limits that small layers exceed."""
    graph_module, parsed = trace(model), Recipe.parse(recipe)
    method, data = method_of(solver, recipe, **{"permute": False, **options}), calibration(batches)
    observing = InsertObservers(
        parsed, reconstruct=True, observe=method.needs_statistics, max_columns=BLOCK, block_columns=BLOCK
    )
    for step in (observing, Allocate(method), SolveLayers(parsed, method), RemoveObservers()):
        step(graph_module, data)
    verify(graph_module)
    return graph_module


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_the_blocks_make_up_the_layer(layer):
    layer, x = copy.deepcopy(layer).double(), images(layer)
    whole = LayerGeometry.of(layer)
    geometry = whole.in_blocks(BLOCK, 4)
    assert geometry is not None
    assert geometry.columns <= BLOCK
    assert geometry.columns * geometry.blocks == whole.columns
    matrix = geometry.to_matrix(layer.weight)
    parts = torch.einsum("grd,gpd->grp", matrix, geometry.patches(x)).unflatten(0, (whole.groups, -1))
    total = parts.sum(1)
    if layer.bias is not None:
        total = total + layer.bias.reshape(whole.groups, -1, 1)
    torch.testing.assert_close(total, whole.output_matrix(layer(x)))
    torch.testing.assert_close(geometry.to_weight(matrix), layer.weight, rtol=0, atol=0)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("mean", [0.5, 300.0])
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_kept_weights_are_least_squares_in_every_block(layer, mean, bias_correction):
    layer, x = copy.deepcopy(layer).double(), images(layer, mean)
    options = {"refit": True, "bias_correction": bias_correction, "damping": 1e-9, "target": "dense"}
    graph_module = solved(nn.Sequential(layer), [x[:9], x[9:]], "sparsegpt", **options)
    new, geometry = graph_module.get_submodule("0"), LayerGeometry.of(layer).in_blocks(BLOCK, 4)
    xs, old, weights = geometry.patches(x), geometry.to_matrix(layer.weight), geometry.to_matrix(new.weight)
    for patches, dense, found in zip(xs, old, weights, strict=True):
        if bias_correction:
            patches = patches - patches.mean(0)
        for row, wanted in zip(found, dense, strict=True):
            kept = row != 0
            assert int(kept.sum()) == len(row) // 2
            expected = torch.linalg.lstsq(patches[:, kept], patches @ wanted).solution
            torch.testing.assert_close(row[kept], expected.detach(), rtol=2e-3, atol=1e-4)
    if bias_correction:
        torch.testing.assert_close(
            *(m(x).movedim(1, 0).flatten(1).mean(1).detach() for m in (new, layer)), rtol=1e-6, atol=1e-6
        )
    row = report_in(graph_module)["0"]
    assert (row.status, row.sparsity) == ("pruned", 0.5)
    assert row.reason == f"in {geometry.blocks} blocks of {geometry.columns} columns"
    assert row.relative_error < 1


@pytest.mark.parametrize(("solver", "recipe"), [("admm", "2:4"), ("admm", "0.6"), ("magnitude", "2:4")])
def test_any_method_and_pattern(solver, recipe):
    """Magnitude needs no statistics and no blocks."""
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    graph_module = solved(model, [torch.randn(64, 4, 8, 8)], solver, recipe)
    for name in ("2", "4"):
        row = report_in(graph_module)[name]
        assert row.pattern == recipe
        assert ("blocks" in row.reason) == (solver == "admm")
    weight = graph_module.get_submodule("4").weight
    dense = model[4].weight
    if solver == "magnitude":
        assert bool(((weight == dense) | (weight == 0)).all())


def test_one_weight_at_two_places_in_blocks():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    row = report_in(solved(Twice(), [torch.randn(32, 16, 6, 6)], "admm"))["layer"]
    assert row.reason == "one weight at 2 places; in 4 blocks of 36 columns"


def test_a_layer_that_cannot_be_cut_is_kept_and_says_so():
    graph_module = trace(nn.Sequential(nn.Linear(4 * 23, 4)))
    InsertObservers(Recipe.parse("2:4"), max_columns=80, block_columns=80)(graph_module)
    (found,) = [annotation(node) for node in graph_module.graph.nodes if annotation(node).role]
    assert found.role == "keep"
    assert found.reason == "its 92 columns cannot be cut into equal blocks to be solved"


def test_a_dense_layer_of_many_columns_is_not_refitted():
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    graph_module = solved(model, [torch.randn(64, 4, 8, 8)], "admm", {"0": "2:4", "2": "dense"})
    assert report_in(graph_module)["2"].status == "kept"


@pytest.mark.parametrize("pattern", ["2:4", "mixed:0.4"])
def test_in_a_whole_compilation(pattern, monkeypatch):
    """With channel permutation and budgets."""
    monkeypatch.setattr(
        InsertObservers.__init__,
        "__kwdefaults__",
        {**InsertObservers.__init__.__kwdefaults__, "max_columns": BLOCK, "block_columns": BLOCK},
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    compiled = fxprune.compile(model, [torch.randn(64, 4, 8, 8)], pattern, progress=False)
    assert "blocks" in compiled.report["2"].reason
    assert compiled.report["2"].relative_error < 0.8
