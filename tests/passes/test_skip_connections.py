"""Which operands a layer can make up for; checked by what the graph computes, not only by names."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth, stochastic_depth

from fxprune.passes.skip_connections import is_identity, skip_operands
from fxprune.tracing import trace


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.layer, self.late = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.drop, self.identity, self.relu = nn.Dropout(0.5), nn.Identity(), nn.ReLU()
        self.depth = StochasticDepth(0.5, "row")
        self.scale = 1.0


def network(forward) -> nn.Module:
    """A module whose forward is `forward(self, x, e)`, e being a value computed before the layer runs."""

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x, self.early(x))

    return Net()


def operands(forward) -> list[str]:
    graph_module = trace(network(forward))
    layer = next(node for node in graph_module.graph.nodes if node.target == "layer")
    return [node.name for node in skip_operands(layer)]


REACHED = {
    "x + y": lambda m, x, e: e + m.layer(e),
    "y + x": lambda m, x, e: m.layer(e) + e,
    "torch.add": lambda m, x, e: torch.add(m.layer(e), e),
    "torch.add by keyword": lambda m, x, e: torch.add(input=m.layer(e), other=e),
    "a method": lambda m, x, e: m.layer(e).add(e),
    "the other operand's method": lambda m, x, e: e.add(other=m.layer(e)),
    "in place": lambda m, x, e: operator.iadd(m.layer(e), e),
    "through dropout": lambda m, x, e: m.drop(m.layer(e)) + e,
    "through F.dropout": lambda m, x, e: F.dropout(m.layer(e), 0.5, m.training) + e,
    "through F.dropout by keyword": lambda m, x, e: F.dropout(m.layer(e), training=m.training) + e,
    "through identity": lambda m, x, e: m.identity(m.layer(e)).contiguous() + e,
    "through stochastic depth": lambda m, x, e: stochastic_depth(m.layer(e), 0.5, "row", m.training) + e,
    "through its module": lambda m, x, e: m.depth(m.layer(e)) + e,
    "past a number": lambda m, x, e: (m.layer(e) + 1.0) + e,
}


@pytest.mark.parametrize("forward", REACHED.values(), ids=REACHED)
def test_the_operand_is_reached(forward):
    assert operands(forward) == ["early"]


def test_nested_adds_give_all_operands():
    assert operands(lambda m, x, e: (m.layer(e) + e) + x) == ["early", "x"]


NOT_REACHED = {
    "no add": lambda m, x, e: m.layer(e),
    "a multiplication": lambda m, x, e: m.layer(e) * e,
    "a subtraction": lambda m, x, e: m.layer(e) - e,
    "a reverse subtraction": lambda m, x, e: e - m.layer(e),
    "through an activation": lambda m, x, e: m.relu(m.layer(e)) + e,
    "through F.relu": lambda m, x, e: F.relu(m.layer(e)) + e,
    "scaled": lambda m, x, e: torch.add(e, m.layer(e), alpha=2),
    "the other one scaled": lambda m, x, e: torch.add(m.layer(e), e, alpha=2),
    "through active dropout": lambda m, x, e: F.dropout(m.layer(e), 0.5, True) + e,
    "through dropout that is active by default": lambda m, x, e: F.dropout(m.layer(e)) + e,
    "added to itself": lambda m, x, e: (lambda y: y + y)(m.layer(e)),
    "an operand that comes later": lambda m, x, e: (lambda y: y + m.late(e))(m.layer(e)),
}


@pytest.mark.parametrize("forward", NOT_REACHED.values(), ids=NOT_REACHED)
def test_the_operand_is_not_reached(forward):
    assert operands(forward) == []


def test_a_value_that_someone_else_reads_too():
    def forward(m: Base, x: Tensor, e: Tensor) -> Tensor:
        y = m.layer(e)
        return (y + e) * y

    assert operands(forward) == []


def test_the_walk_stops_at_what_comes_later():
    def forward(m: Base, x: Tensor, e: Tensor) -> Tensor:
        y = m.layer(e) + e
        return (y + m.late(e)) + x

    assert operands(forward) == ["early"]


@pytest.mark.parametrize("forward", {**REACHED, "two": lambda m, x, e: (m.layer(e) + e) + x}.values())
def test_the_output_moves_one_to_one_with_layer_and_operands(forward):
    """The claim behind the target: output(y + d) = output(y) + d, and likewise for each operand."""
    model = network(forward).double().eval()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    shift = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = model(x) + shift
    handle = model.layer.register_forward_hook(lambda module, args, output: output + shift)
    torch.testing.assert_close(model(x), expected)
    handle.remove()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Identity(), True), (nn.Dropout(0.5), True), (nn.Dropout2d(0.5), True), (nn.AlphaDropout(0.5), True),
        (nn.ReLU(), False), (nn.Flatten(), False), (nn.BatchNorm2d(4), False),
    ],
)  # fmt: skip
def test_identity_modules(module, expected):
    graph_module = trace(nn.Sequential(module))
    (node,) = graph_module.graph.find_nodes(op="call_module", target="0")
    assert is_identity(node) is expected
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(graph_module(x), x) is expected or not expected
    if isinstance(module, nn.Dropout):
        graph_module.get_submodule("0").train()
        assert not is_identity(node)
