from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxprune import LayerReport, Pattern
from fxprune.annotations import annotate
from fxprune.errors import FxPruneError, GraphError
from fxprune.passes import verify
from fxprune.tracing import trace


def reported(pattern: str = "2:4") -> GraphModule:
    """A conv and a linear layer, projected, both reported as pruned."""
    graph_module = trace(nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)))
    for node in graph_module.graph.find_nodes(op="call_module"):
        module = graph_module.get_submodule(node.target)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data = Pattern.parse(pattern).project(module.weight.data)
            shape = tuple(module.weight.shape)
            annotate(node, report=LayerReport(node.target, type(module).__name__, shape, pattern, "pruned"))
    return graph_module


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "0.5", "0.123456789"])
def test_a_sound_graph(pattern):
    verify(reported(pattern))


def test_it_changes_nothing_and_needs_no_report():
    graph_module = trace(nn.Sequential(nn.Conv2d(3, 4, 3)))
    code = graph_module.code
    verify(graph_module)
    assert graph_module.code == code


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("name", ["0", "3"])
def test_a_weight_off_the_pattern_is_named(name, pattern):
    graph_module = reported(pattern)
    weight = graph_module.get_submodule(name).weight.data
    weight[weight == 0] = torch.where(torch.arange(int((weight == 0).sum())) == 0, 1.0, 0.0)
    with pytest.raises(GraphError, match=rf"layer '{name}' is reported as {pattern}, but 1 of \d+ groups break"):
        verify(graph_module)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_named(bad):
    graph_module = reported()
    graph_module.get_submodule("3").bias.data[0] = bad
    with pytest.raises(GraphError, match=r"parameter .3\.bias. holds NaN or infinite values"):
        verify(graph_module)


def test_a_layer_that_lost_its_weight_is_named():
    graph_module = reported()
    graph_module.add_submodule("0", nn.Identity())
    with pytest.raises(GraphError, match="layer '0' is reported as pruned but has no weight"):
        verify(graph_module)


def test_a_graph_that_is_not_well_formed():
    graph_module = reported()
    nodes = list(graph_module.graph.nodes)
    nodes[1].append(nodes[0])  # The input after the layer that reads it.
    with pytest.raises((RuntimeError, FxPruneError)):
        verify(graph_module)
