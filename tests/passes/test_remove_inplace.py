from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter
from torchvision.ops import drop_block2d, stochastic_depth

from fxprune.errors import GraphError
from fxprune.passes.base import changes
from fxprune.passes.remove_inplace import RemoveInplace

torch.fx.wrap("drop_block2d")
torch.fx.wrap("stochastic_depth")


class Lines(nn.Module):
    """A model that is one function of its modules and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.lines = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.lines(self, x)


def assert_same_as_eager(model: nn.Module, x: Tensor) -> GraphModule:
    """The rewritten graph gives what eager execution gives, leaves its input alone, and overwrites no value."""
    eager, reference = copy.deepcopy(model).eval(), x.clone()
    wanted = eager(reference)
    graph_module = torch.fx.symbolic_trace(copy.deepcopy(model).eval())
    assert RemoveInplace()(graph_module).modified
    _check(graph_module, wanted, x)
    recorded = changes(graph_module)
    assert any(change.action == "replaced" for change in recorded)
    assert not RemoveInplace()(graph_module).modified
    assert changes(graph_module) == recorded
    return graph_module


def _check(graph_module: GraphModule, wanted: Any, x: Tensor) -> None:
    before = x.clone()
    recorder = _Recorder(graph_module)
    torch.testing.assert_close(recorder.run(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    for value, copied in recorder.values:
        torch.testing.assert_close(value, copied, rtol=0, atol=0, msg="a value was overwritten after it was stored")


class _Recorder(Interpreter):
    """Keeps every tensor together with a copy made when it was computed."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.values: list[tuple[Tensor, Tensor]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.values.append((value, value.clone()))
        return value


def images() -> Tensor:
    return torch.randn(2, 4, 5, 5, dtype=torch.float64)


ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh,
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_modules_before_a_skip_add(activation: type[nn.Module]) -> None:
    # In eager mode the skip connection carries the activated value: it was overwritten before it was added.
    model = Lines(
        lambda m, x: m.conv(m.act(y := m.conv(x))) + y,
        conv=nn.Conv2d(4, 4, 3, padding=1),
        act=activation(inplace=True),
    ).double()
    graph_module = assert_same_as_eager(model, images())
    assert not any(getattr(module, "inplace", False) for module in graph_module.modules())
    assert "add read its result in place of conv" in changes(graph_module)[0].reason


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "F.hardswish": lambda x: F.hardswish(x, inplace=True),
    "F.relu": lambda x: F.relu(x, inplace=True),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2, True),
    "F.elu": lambda x: F.elu(input=x, alpha=0.5, inplace=True),
    "F.threshold": lambda x: F.threshold(x, 0.1, 20.0, True),
    "F.dropout": lambda x: F.dropout(x, training=False, inplace=True),
    "drop_block2d": lambda x: drop_block2d(x, 0.0, 3, True),
    "torch.relu_": torch.relu_,
    "torch.sigmoid_": torch.sigmoid_,
    "torch.clamp_": lambda x: torch.clamp_(x, min=0.1),
    "torch.square_": torch.square_,
    "F.relu_": F.relu_,
    "F.elu_": lambda x: F.elu_(x, 0.7),
    "F.hardtanh_": lambda x: F.hardtanh_(x, -0.5, 0.5),
    "F.threshold_": lambda x: F.threshold_(x, 0.1, 20.0),
    "relu_": lambda x: x.relu_(),
    "add_": lambda x: x.add_(1),
    "add_ with alpha": lambda x: x.add_(x.sin(), alpha=2),
    "mul_": lambda x: x.mul_(x.sigmoid()),
    "clamp_": lambda x: x.clamp_(min=0, max=0.5),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 7.0),
    "index_add_": lambda x: x.index_add_(1, torch.tensor([0, 2]), x[:, 1:3].clone()),
    "lerp_": lambda x: x.lerp_(x.cos(), 0.3),
    "chain": lambda x: x.mul_(2).add_(1).relu_(),
    "transpose_": lambda x: x.transpose_(1, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("uses", ["result", "input", "both", "input twice"])
def test_functions_and_methods(name: str, uses: str) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        y = x * 1.5
        before = y.exp()
        z = FUNCTIONS[name](y)
        match uses:
            case "result":
                return z + before
            case "input":
                return y + before
            case "both":
                return torch.cat([y, z, before])
            case _:
                w = y.tanh()
                F.relu(y, inplace=True)
                return w + y - before

    assert_same_as_eager(Lines(forward), images())


def test_an_input_that_is_overwritten() -> None:
    x = images()
    graph_module = assert_same_as_eager(Lines(lambda m, x: (F.relu_(x), x)), x)
    assert (x < 0).any()
    assert [node.op for node in graph_module.graph.nodes] == ["placeholder", "call_function", "output"]


def test_one_activation_called_at_several_places() -> None:
    model = Lines(
        lambda m, x: m.act(a := m.conv(x)) + m.act(b := m.conv(a)) + a * b,
        conv=nn.Conv2d(4, 4, 1),
        act=nn.Hardswish(inplace=True),
    )
    graph_module = assert_same_as_eager(model.double(), images())
    assert len(changes(graph_module)) == 2


def test_a_loop_of_writes_into_one_tensor() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        total = x * 0
        for i in range(4):
            total.add_(x.relu() * i)
            x = x + total
        return total * x

    assert_same_as_eager(Lines(forward), images())


def test_a_constant_of_the_forward_is_fresh_in_every_call() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        total = torch.zeros(2, 4, 5, 5, dtype=torch.float64)
        total += x  # Traced as a write into a tensor that the graph holds.
        total.mul_(2)
        return total + 1

    x = images()
    graph_module = assert_same_as_eager(Lines(forward), x)
    torch.testing.assert_close(graph_module(x), 2 * x + 1, rtol=0, atol=0)


OPERATORS = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
             operator.ipow, operator.imatmul]  # fmt: skip


@pytest.mark.parametrize("function", OPERATORS)
def test_operators(function: Callable[[Any, Any], Any]) -> None:
    # torch.fx traces `x += y` as a plain add, so the graph is written by hand. The interpreter calls the operators as
    # Python does; torch.fx's generated code binds the left operand's name anew, also where nothing is overwritten.
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_method("exp", (x,))
    z = graph.call_function(function, (y, 2.0 if function is not operator.imatmul else y))
    graph.output((graph.call_function(torch.sin, (y,)), z))
    model = GraphModule(nn.Module(), graph)
    value = images()
    wanted = Interpreter(copy.deepcopy(model)).run(value.clone())
    assert RemoveInplace()(model).modified
    _check(model, wanted, value)
    assert not RemoveInplace()(model).modified
    assert z.target is getattr(operator, function.__name__[1:])


@pytest.mark.parametrize("function", [operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift])
def test_integer_operators(function: Callable[[Any, Any], Any]) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_method("abs", (x,))
    graph.output((graph.call_function(function, (y, 3)), graph.call_method("neg", (y,))))
    model = GraphModule(nn.Module(), graph)
    value = torch.arange(6)
    wanted = Interpreter(copy.deepcopy(model)).run(value.clone())
    assert RemoveInplace()(model).modified
    _check(model, wanted, value)


def test_numbers_and_tuples_are_not_overwritten() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    height = graph.call_method("size", (x, 2))
    more = graph.call_function(operator.iadd, (height, 1))
    shape = graph.call_function(getattr, (x, "shape"))
    width = graph.call_function(operator.getitem, (shape, 3))
    wider = graph.call_function(operator.imul, (width, 2))
    parts = graph.call_method("chunk", (x, 2, 1))
    longer = graph.call_function(operator.iadd, (parts, (x,)))
    graph.output((height, more, shape, width, wider, parts, longer))
    model = GraphModule(nn.Module(), graph)
    value = images()
    wanted = Interpreter(copy.deepcopy(model)).run(value.clone())
    assert RemoveInplace()(model).modified
    torch.testing.assert_close(model(value), wanted, rtol=0, atol=0)
    assert wanted[0] + 1 == wanted[1]


def test_a_chunk_is_a_tensor_and_is_overwritten() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    parts = graph.call_method("chunk", (graph.call_method("exp", (x,)), 2, 1))
    first, second = (graph.call_function(operator.getitem, (parts, i)) for i in (0, 1))
    result = graph.call_function(operator.iadd, (first, second))
    graph.output((first, second, result))
    model = GraphModule(nn.Module(), graph)
    value = images()
    wanted = Interpreter(copy.deepcopy(model)).run(value.clone())
    assert RemoveInplace()(model).modified
    _check(model, wanted, value)


def test_plain_operators_are_left_alone() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    both = graph.call_function(operator.and_, (x, 1))
    graph.output((graph.call_function(operator.or_, (both, 4)), graph.call_method("__invert__", (both,))))
    model = GraphModule(nn.Module(), graph)
    assert not RemoveInplace()(model).modified
    assert changes(model) == ()


ALIASES: dict[str, Callable[[Any, Tensor], Any]] = {
    "dropout in eval mode": lambda m, x: m.drop(x),
    "F.dropout": lambda m, x: F.dropout(x, training=False),
    "identity": lambda m, x: m.same(x),
    "stochastic depth": lambda m, x: stochastic_depth(x, 0.5, "row", False),
    "detach": lambda m, x: x.detach(),
    "two of them": lambda m, x: m.same(m.drop(x)),
}


@pytest.mark.parametrize("overwrite_first", [True, False])
@pytest.mark.parametrize("alias", ALIASES)
def test_another_name_for_the_same_tensor(alias: str, overwrite_first: bool) -> None:
    def forward(model: Any, x: Tensor) -> Any:
        x = x.sin()
        y = ALIASES[alias](model, x)
        (x if overwrite_first else y).mul_(3)
        return x + 2, y * 2, x * y

    assert_same_as_eager(Lines(forward, drop=nn.Dropout(), same=nn.Identity()), images())


HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "flattened, then only the view is used": lambda x: x.sin().flatten(1).relu_() * 2,
    "the view is read before the write": lambda x: (y := x.sin(), z := y.flatten(1).exp(), y.relu_(), y.sum() * z)[-1],
    "only the shape is read later": lambda x: (y := x.sin(), z := y.view(2, -1).relu_(), z * y.size(1) * y.shape[0])[
        -1
    ],
    "another chunk": lambda x: (p := x.sin().chunk(2, 1), q := p[0], r := p[1], q.relu_() + r)[-1],
    "a chunk taken later": lambda x: (p := x.sin().chunk(2, 1), q := p[0].relu_(), q + p[1])[-1],
    "im2col copies": lambda x: (y := x.sin(), z := F.unfold(y, 3), y.relu_(), y.sum() * z)[-1],
    "another row": lambda x: (y := x.sin(), a := y[0], b := y[1], a.mul_(b), a + b)[-1],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_views_that_the_write_does_not_reach(name: str) -> None:
    assert_same_as_eager(Lines(lambda model, x: HARMLESS[name](x)), images())


REFUSED_VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a view is read": lambda m, x: (y := x.sin(), z := y.flatten(1), y.relu_(), z * 2)[-1],
    "the base is read": lambda m, x: (y := x.sin(), y.flatten(1).relu_(), y * 2)[-1],
    "the slice's base is read": lambda m, x: (y := x.sin(), y[:, :2].relu_(), y * 2)[-1],
    "the chunk's base is read": lambda m, x: (y := x.sin(), y.chunk(2, 1)[0].relu_(), y * 2)[-1],
    "the same chunk is read": lambda m, x: (p := x.sin().chunk(2, 1), p[0].relu_(), p[0] * 2)[-1],
    "counted from the other end": lambda m, x: (p := x.sin().chunk(2, 1), p[1].relu_(), p[-1] * 2)[-1],
    "maybe a copy": lambda m, x: (y := x.sin(), z := y.contiguous(), y.relu_(), z * 2)[-1],
    "an attribute": lambda m, x: (y := x.sin(), z := y.mT, z.exp(), y.relu_(), z * 2)[-1],
    "sliding windows": lambda m, x: (y := x.sin(), z := y.unfold(2, 3, 1), y.relu_(), z * 2)[-1],
    "nn.Flatten": lambda m, x: (y := x.sin(), z := m.flatten(y), y.relu_(), z * 2)[-1],
    "a view of the same tensor": lambda m, x: (y := x.sin(), z := y.detach().t(), y.relu_(), z * 2)[-1],
    "the view is returned": lambda m, x: (y := x.sin(), z := y.view(2, -1), y.relu_(), z)[-1],
}
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    **{name: (forward, "which may share its memory") for name, forward in REFUSED_VIEWS.items()},
    "out=": (lambda m, x: (y := x.sin(), torch.add(y, 1, out=y), y * 2)[-1], "node 'add' (add) writes into"),
    "a parameter": (lambda m, x: (m.weight.add_(x.sum()), m.weight * x)[-1], "writes into 'weight'"),
    "a view of it": (lambda m, x: (m.weight.view(1, 1).add_(x.sum()), m.weight * x)[-1], "writes into 'weight'"),
    "a counter": (lambda m, x: x * m.seen.add_(x.numel()), "writes into 'seen'"),
    "no counterpart": (lambda m, x: x.sin().copy_(x), "(copy_) works in place, with no out-of-place form"),
    "other dtype": (lambda m, x: x.sin().gt_(0.5), "(gt_) works in place, with no out-of-place form"),
    "uniform_": (lambda m, x: x.sin().uniform_(), "(uniform_) works in place"),
    "torch.zero_": (lambda m, x: torch.zero_(x.sin()), "(zero_) works in place"),
    "aten": (lambda m, x: torch.ops.aten.relu_.default(x.sin()), "writes into an existing tensor"),
}


class _Stateful(Lines):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(forward, flatten=nn.Flatten())
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_node_and_a_remedy(name: str) -> None:
    forward, message = REFUSED[name]
    tracer = torch.fx.Tracer()
    tracer.proxy_buffer_attributes = True
    model = _Stateful(forward)
    graph_module = GraphModule(model, tracer.trace(model))
    with pytest.raises(GraphError, match="node '") as raised:
        RemoveInplace()(graph_module)
    assert message in str(raised.value)
    assert "(exclude)" in str(raised.value)


@pytest.mark.parametrize("as_method", [True, False])
def test_refuses_item_assignment(as_method: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    arguments = (x, 0, 1.0)
    graph.call_method("__setitem__", arguments) if as_method else graph.call_function(operator.setitem, arguments)
    graph.output(x)
    with pytest.raises(GraphError, match=r"node '_*setitem_*' .* assigns to an item of an existing tensor.*exclude"):
        RemoveInplace()(GraphModule(nn.Module(), graph))


def test_a_leaf_with_inplace_modules_inside_is_recorded() -> None:
    class Leaf(nn.Sequential):
        pass

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Leaf) or super().is_leaf_module(m, module_qualified_name)

    model = nn.Sequential(Leaf(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.SiLU(inplace=True)), nn.ReLU())
    graph_module = GraphModule(model, Tracer().trace(model))
    assert not RemoveInplace()(graph_module).modified
    (change,) = changes(graph_module)
    assert (change.action, change.target) == ("kept", "0")
    assert "0, 2 inside it work in place" in change.reason
    assert graph_module.get_submodule("0.0").inplace


def test_a_graph_without_side_effects_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Hardswish(), nn.Dropout())
    graph_module = torch.fx.symbolic_trace(model)
    code = graph_module.code
    assert not RemoveInplace()(graph_module).modified
    assert graph_module.code == code
    assert changes(graph_module) == ()
