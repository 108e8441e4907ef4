from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.graph import module_of
from fxprune.passes import InsertObservers, RemoveObservers
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace


class Net(nn.Module):
    """Two readers of the image (one observer), one called by keyword, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=(self.a(x) + self.b(input=x)).mean((2, 3)))


def test_the_graph_is_what_it_was_before():
    graph_module, x = trace(Net()), torch.randn(2, 4, 6, 6)
    code, names, expected = graph_module.code, set(graph_module.state_dict()), graph_module(x)
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    assert graph_module.code != code
    result = RemoveObservers()(graph_module)
    assert result.modified
    assert result.graph_module is graph_module
    assert graph_module.code == code
    assert set(graph_module.state_dict()) == names
    assert not any(isinstance(module, HessianObserver) for module in graph_module.modules())
    torch.testing.assert_close(graph_module(x), expected, rtol=0, atol=0)
    assert RemoveObservers()(graph_module).modified is False


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), Net()])
def test_nothing_to_remove(model):
    graph_module = trace(model)
    assert RemoveObservers()(graph_module).modified is False
    assert not any(isinstance(module_of(node), HessianObserver) for node in graph_module.graph.nodes)
