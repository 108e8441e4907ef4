"""Which operands a layer can make up for, and which rectifier follows; checked by what the graph computes, not by names."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torchvision.ops import StochasticDepth, stochastic_depth

from fxprune.annotations import annotate
from fxprune.consumers import consumers, skip_operands
from fxprune.operations import is_identity
from fxprune.tracing import trace

INF = math.inf


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.layer, self.late = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.drop, self.identity, self.relu = nn.Dropout(0.5), nn.Identity(), nn.ReLU()
        self.depth = StochasticDepth(0.5, "row")
        self.functional = torch.ao.nn.quantized.FloatFunctional()
        self.scale = 1.0


def network(forward) -> nn.Module:
    """A module whose forward is `forward(self, x, e)`, e being a value computed before the layer runs."""

    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x, self.early(x))

    return Net()


def layer_in(forward) -> Node:
    return next(node for node in trace(network(forward)).graph.nodes if node.target == "layer")


def operands(forward) -> list[str]:
    return [node.name for node in skip_operands(layer_in(forward))]


def rectifier(forward) -> tuple[float, float] | None:
    return consumers(layer_in(forward)).rectifier


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
    "through F.alpha_dropout as it is by default": lambda m, x, e: F.alpha_dropout(m.layer(e)) + e,
    "through torch.dropout": lambda m, x, e: torch.dropout(m.layer(e), p=0.5, train=m.training) + e,
    "through clone": lambda m, x, e: torch.clone(m.layer(e).clone()) + e,
    "through plus": lambda m, x, e: +m.layer(e) + e,
    "torch.add with alpha=1": lambda m, x, e: torch.add(m.layer(e), e, alpha=1),
    "a method in place": lambda m, x, e: m.layer(e).add_(e),
    "FloatFunctional": lambda m, x, e: m.functional.add(m.layer(e), e),
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


RECTIFIED = {
    "a ReLU": (lambda m, x, e: m.relu(m.layer(e)), (0, INF)),
    "F.relu": (lambda m, x, e: F.relu(m.layer(e)), (0, INF)),
    "a method": (lambda m, x, e: m.layer(e).relu(), (0, INF)),
    "after an add": (lambda m, x, e: m.relu(m.layer(e) + e), (0, INF)),
    "after a number and dropout": (lambda m, x, e: m.relu(m.drop(m.layer(e) + 1.0)), (0, INF)),
    "F.relu6": (lambda m, x, e: F.relu6(m.layer(e)), (0, 6)),
    "F.hardtanh": (lambda m, x, e: F.hardtanh(m.layer(e)), (-1, 1)),
    "F.hardtanh by position": (lambda m, x, e: F.hardtanh(m.layer(e), -2, 3), (-2, 3)),
    "F.hardtanh by keyword": (lambda m, x, e: F.hardtanh(m.layer(e), max_val=4), (-1, 4)),
    "F.threshold": (lambda m, x, e: F.threshold(m.layer(e), 0.1, 0.0), (0.1, INF)),
    "clamp": (lambda m, x, e: m.layer(e).clamp(-1, 2), (-1, 2)),
    "clamp from below": (lambda m, x, e: torch.clamp(m.layer(e), min=0), (0, INF)),
    "clip by keyword": (lambda m, x, e: torch.clip(m.layer(e), max=2, min=-0.5), (-0.5, 2)),
    "clamp_min": (lambda m, x, e: m.layer(e).clamp_min(0), (0, INF)),
    "FloatFunctional": (lambda m, x, e: m.functional.add_relu(m.layer(e), e), (0, INF)),
    "F.hardswish": (lambda m, x, e: F.hardswish(m.layer(e)), (-3, INF)),
    "F.hardsigmoid": (lambda m, x, e: F.hardsigmoid(m.layer(e)), (-3, 3)),
}


@pytest.mark.parametrize(("forward", "bounds"), RECTIFIED.values(), ids=RECTIFIED)
def test_rectifiers(forward, bounds):
    assert rectifier(forward) == bounds


@pytest.mark.parametrize(("forward", "bounds"), RECTIFIED.values(), ids=RECTIFIED)
def test_outside_the_bounds_the_value_does_not_matter(forward, bounds):
    """The claim: moving what lies beyond a bound further out changes nothing, moving what lies between does."""
    model = network(forward).eval()
    x = 4 * torch.randn(4, 4, 6, 6)
    beside = model.early(x) if operands(forward) else 0.0
    sums: list[Tensor] = []

    def further_out(module: nn.Module, args: object, output: Tensor) -> Tensor:
        constant = 1.0 if forward is RECTIFIED["after a number and dropout"][0] else 0.0
        total = output + beside + constant
        sums.append(total)
        return output - (total < bounds[0]).float() + (total > bounds[1]).float()

    expected = model(x)
    with model.layer.register_forward_hook(further_out):
        torch.testing.assert_close(model(x), expected)
    assert (sums[0] < bounds[0]).any()


@pytest.mark.parametrize(
    ("module", "bounds"),
    [
        (nn.ReLU(), (0, INF)), (nn.ReLU6(), (0, 6)), (nn.Hardtanh(-2, 1), (-2, 1)), (nn.Hardswish(), (-3, INF)),
        (nn.Hardsigmoid(), (-3, 3)), (nn.GELU(), None), (nn.LeakyReLU(), None), (nn.Sigmoid(), None), (nn.SiLU(), None),
        (nn.BatchNorm2d(4), None), (nn.MaxPool2d(2), None), (nn.Identity(), None),
    ],
)  # fmt: skip
def test_rectifier_modules(module, bounds):
    graph_module = trace(nn.Sequential(nn.Conv2d(4, 4, 1), module))
    assert consumers(next(n for n in graph_module.graph.nodes if n.target == "0")).rectifier == bounds


NOT_RECTIFIED = {
    "the output": lambda m, x, e: m.layer(e),
    "a second reader": lambda m, x, e: (lambda y: m.relu(y) + y)(m.layer(e)),
    "scaled before": lambda m, x, e: m.relu(2 * m.layer(e)),
    "an operand that comes later": lambda m, x, e: (lambda y: m.relu(y + m.late(e)))(m.layer(e)),
    "F.gelu": lambda m, x, e: F.gelu(m.layer(e)),
}


@pytest.mark.parametrize("forward", NOT_RECTIFIED.values(), ids=NOT_RECTIFIED)
def test_no_rectifier(forward):
    assert rectifier(forward) is None


def test_a_module_that_a_hook_changes_is_not_looked_through():
    node = layer_in(lambda m, x, e: m.relu(m.identity(m.layer(e)) + e))
    identity, relu = (next(n for n in node.graph.nodes if n.target == name) for name in ("identity", "relu"))
    assert (operands_of(node), consumers(node).rectifier) == (["early"], (0, INF))
    annotate(relu, changed="a hook")
    assert (operands_of(node), consumers(node).rectifier) == (["early"], None)
    annotate(identity, changed="a hook")
    assert operands_of(node) == []


def operands_of(node: Node) -> list[str]:
    return [operand.name for operand in skip_operands(node)]
