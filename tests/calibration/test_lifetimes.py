"""Where values die, which may be overwritten, and that a stream which does so gives what a plain run gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.annotations import annotation
from fxprune.calibration.batch_store import BatchValues
from fxprune.calibration.lifetimes import last_uses, spare_input
from fxprune.calibration.stream import CalibrationStream
from fxprune.graph import module_of
from fxprune.operations import any_reads_strides
from fxprune.passes import InsertObservers
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace
from tests.pipelines import calibration


class Mixed(nn.Module):
    """ReLUs and adds that are the only readers of a layer or an add, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4))
        self.c, self.relu, self.d = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Linear(4 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.a(x))  # Overwrites the layer's output.
        total = first + self.b(first)  # Overwrites the layer's output.
        second = F.relu(total)  # Read by c as well, through an observer, before it dies here.
        third = self.c(total).relu()  # Overwrites the layer's output.
        chunk = F.relu(torch.cat([second, third], 1).chunk(2, 1)[0])  # A view of what may be read elsewhere.
        return self.d(chunk.view(-1, 4 * 36))


def test_only_what_was_just_made_for_one_reader_is_overwritten():
    graph = trace(Mixed()).graph
    nodes = list(graph.nodes)
    dying = last_uses(nodes)
    overwritten = {node.name: str(source) for node in nodes if (source := spare_input(node))}
    method = next(n.name for n in nodes if n.op == "call_method" and n.target == "relu")
    assert overwritten == {"relu": "a", "add": "b", method: "c"}
    for node in nodes:
        for dead in dying[node]:
            assert all(nodes.index(user) <= nodes.index(node) for user in dead.users)


def test_a_module_with_hooks_is_called():
    model = Mixed()
    model.relu.register_forward_hook(lambda module, args, output: None)
    assert not any(spare_input(node) for node in trace(model).graph.find_nodes(op="call_module"))


class Sums(nn.Module):
    """Adds of what the pruned layers change and of what they do not, of another shape, and of a value with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 3, 4))
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        fixed = self.b(x)  # No pruned layer feeds it, and the add alone reads it.
        y = fixed + self.a(torch.relu(self.stem(x)))
        doubled = torch.add(y, y)
        summed = self.scale + self.c(doubled)
        return torch.add(summed, doubled, alpha=2) + 1.0


def test_values_that_both_models_read_are_not_overwritten():
    torch.manual_seed(0)
    model, batches = Sums().double().eval(), torch.randn(6, 3, 6, 6, dtype=torch.float64).split(2)
    graph_module = trace(model)
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    layers = {str(n.target): n for n in graph_module.graph.nodes if annotation(n).geometry is not None}
    stream = CalibrationStream(graph_module, calibration(batches))
    stream.advance(layers["a"])
    stream._replaced = True
    graph_module.get_submodule("a").weight.data *= 0.5
    seen: list[Tensor] = []
    stream.advance(layers["c"], lambda _, values: seen.append(values.pruned(layers["c"].all_input_nodes[0]).clone()))
    damaged = trace(model)
    damaged.get_submodule("a").weight.data *= 0.5
    with torch.no_grad():
        expected = [2 * (damaged.a(torch.relu(damaged.stem(x))) + damaged.b(x)) for x in batches]
    torch.testing.assert_close(torch.cat(seen), torch.cat(expected))


@pytest.mark.parametrize("target", ["as_strided", "as_strided_", "stride", "is_contiguous"])
def test_values_that_depend_on_strides_are_known(target):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert any_reads_strides([x, graph.call_method(target, (x,))])
    assert not any_reads_strides([x, graph.call_method("view", (x, -1))])


class Strided(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x.as_strided((2, 4, 3, 3), (144, 36, 6, 1)))


@pytest.mark.parametrize("kind", [Mixed, Strided, Sums])
def test_the_stream_gives_what_a_plain_run_gives(kind):
    torch.manual_seed(0)
    model = kind().double().eval()
    batches = torch.randn(6, 3, 6, 6, dtype=torch.float64).split(2)
    graph_module = trace(model)
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    stream = CalibrationStream(graph_module, calibration(batches))
    layers = [n for n in graph_module.graph.nodes if annotation(n).geometry is not None]
    seen: dict[str, list[Tensor]] = {}
    wanted: dict[str, list[Tensor]] = {}
    for layer in layers:

        def visit(number: int, values: BatchValues, layer=layer) -> None:
            seen.setdefault(str(layer.target), []).append(values.dense(layer).clone())

        stream.advance(layer, visit)
        stream._replaced = True
    stream.advance(list(graph_module.graph.nodes)[-1])
    for layer in layers:
        name = str(layer.target)
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: wanted.setdefault(name, []).append(output.detach().clone())
        )
    with torch.no_grad():
        for x in batches:
            model(x)
    assert wanted.keys() == seen.keys()
    for name, outputs in wanted.items():
        torch.testing.assert_close(torch.cat(seen[name]), torch.cat(outputs), rtol=1e-12, atol=1e-12)
    observers = [m for n in graph_module.graph.nodes if isinstance(m := module_of(n), HessianObserver)]
    plain = trace(model)
    InsertObservers(Recipe.parse("2:4"))(plain)
    with torch.no_grad():
        for x in batches:
            plain(x)
    for observer, other in zip(observers, plain.fxprune_observers.children(), strict=True):
        torch.testing.assert_close(observer.statistics().gram, other.statistics().gram, rtol=1e-10, atol=1e-10)
