"""Unequal sparsity under one budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune import FxPruneError, Options
from fxprune.errors import CalibrationError
from fxprune.passes import Allocate, InsertObservers
from fxprune.pattern import Pattern
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace
from tests.pipelines import calibration, method_of


class Net(nn.Module):
    """A wide layer that is nearly low rank, so cheap to prune, beside a narrow one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.useless = nn.Conv2d(16, 16, 3, padding=1)
        self.needed = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)
        self.useless.weight.data *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.useless(x) + x
        x = self.needed(x).relu()
        return 20 * self.head(x.mean((2, 3)))


@pytest.fixture
def batches():
    return list(torch.randn(64, 3, 8, 8).split(16))


@pytest.mark.parametrize("pattern", ["0.6", "mixed:0.5"])
def test_a_layer_that_does_not_matter_is_pruned_more(batches, pattern):
    compiled = fxprune.compile(Net().eval(), batches, pattern, progress=False, options=Options(global_budget=True))
    useless, needed = compiled.report["useless"], compiled.report["needed"]
    assert useless.sparsity > needed.sparsity
    prunable = [compiled.report[name] for name in ("useless", "needed", "head")]
    zeros = sum(layer.sparsity * layer.weights for layer in prunable)
    assert zeros / sum(layer.weights for layer in prunable) >= Pattern.parse(pattern).sparsity - 1e-3
    for layer in prunable:
        if layer.pattern:
            assert Pattern.parse(layer.pattern).check(compiled.get_submodule(layer.name).weight).ok
        else:
            assert layer.reason.startswith("dense within the budget")


def test_the_model_is_unchanged_by_probing(batches):
    model = Net().eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fxprune.compile(model, batches, "mixed:0.3", progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_budget_needs_a_pattern_with_levels(batches):
    with pytest.raises(FxPruneError, match="says what each layer gets"):
        fxprune.compile(Net(), batches, "2:4", progress=False, options=Options(global_budget=True))


def test_a_budget_is_measured_on_any_output(batches):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    compiled = fxprune.compile(model, batches, "mixed:0.3", progress=False)
    weights = torch.cat([compiled.get_submodule(name).weight.flatten() for name in ("2", "4")])
    assert float((weights == 0).float().mean()) >= 0.3 - 1e-3


def test_no_observer_keeps_what_the_probes_showed(batches):
    """Nor that of the first layer, which the pattern declines: it is re-fitted to what the pruned prefix shows later."""
    graph_module = trace(Net().eval())
    InsertObservers(Recipe.parse("0.6"))(graph_module)
    Allocate(method_of("admm", "0.6", global_budget=True))(graph_module, calibration(batches))
    observers = [module for module in graph_module.modules() if isinstance(module, HessianObserver)]
    assert len(observers) == 4
    for observer in observers:
        assert observer.enabled
        with pytest.raises(CalibrationError, match="before any calibration batch"):
            observer.statistics()


def test_a_model_with_two_inputs(batches):
    class Two(Net):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return super().forward(left - right)

    named = [{"left": x, "right": x.flip(0)} for x in batches]
    compiled = fxprune.compile(Two().eval(), named, "0.6", progress=False, options=Options(global_budget=True))
    assert compiled.report["useless"].sparsity > compiled.report["needed"].sparsity


def test_a_budget_needs_an_output_to_measure(batches):
    class Labels(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(FxPruneError, match="no floating point tensor"):
        fxprune.compile(Labels(), batches, "mixed:0.5", progress=False)


@pytest.mark.parametrize(("method", "status"), [("admm", "reconstructed"), ("magnitude", "kept")])
def test_a_layer_that_is_not_factored_and_cannot_be_masked_is_not_called_pruned(batches, method, status):
    """Two factors of the stem could hold 2:4; the stem itself, with its 3 channels, cannot."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    compiled = fxprune.compile(model, batches, "rank:ratio=0.5+2:4", method=method, progress=False)
    stem = compiled.report["0"]
    assert (stem.status, stem.pattern, stem.sparsity) == (status, "", 0)
    assert "3 input channels are not a multiple of 4" in stem.reason
    assert compiled.report["2"].pattern == "2:4"
