"""Shapes that are found once are those that every later graph of the run has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

import fxprune
from fxprune.calibration.calibration import Calibration
from fxprune.calibration.macs import macs_per_sample
from fxprune.errors import CalibrationError
from fxprune.graph import value_shapes
from fxprune.passes import FoldBatchNorm, InsertObservers, RemoveObservers
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.relu = (
            nn.Conv2d(4, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.pool, self.b, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.a(x))))
        x = torch.relu_(self.b(x)) + x
        return self.head(x.view(x.size(0), -1))


@pytest.fixture
def runs(monkeypatch) -> list[GraphModule]:
    """Every graph that an interpreter runs, in order."""
    seen: list[GraphModule] = []
    run = Interpreter.run

    def counted(self: Interpreter, *args: object, **kwargs: object) -> object:
        seen.append(self.module)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Interpreter, "run", counted)
    return seen


def images() -> Tensor:
    return torch.randn(24, 4, 8, 8)


def check(calibration: Calibration, graph_module: GraphModule) -> None:
    example = calibration.example(graph_module)
    assert example.images == 4
    for module in graph_module.modules():
        if isinstance(module, HessianObserver):
            module.enabled = False
    assert example.shapes == value_shapes(graph_module, *[x.clone() for x in example.inputs])


def test_one_run_serves_what_folds_observes_and_copies(runs):
    calibration, graph_module = Calibration(images().split(12)), trace(Net())
    calibration.example(graph_module)
    FoldBatchNorm()(graph_module)
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    copied = copy.deepcopy(graph_module)
    RemoveObservers()(graph_module)
    calibration.example(graph_module)
    calibration.example(copied)
    assert len(runs) == 1
    check(calibration, graph_module)
    check(calibration, copied)


def pool_less(graph_module: GraphModule) -> None:
    graph_module.pool.kernel_size, graph_module.pool.stride = 4, 4
    graph_module.head = nn.Linear(8 * 4, 5)


def reshape_otherwise(graph_module: GraphModule) -> None:
    (node,) = graph_module.graph.find_nodes(op="call_method", target="reshape")
    node.args = (node.args[0], 2 * 4, -1)
    graph_module.head = nn.Linear(64, 5)


def another_module_under_the_name(graph_module: GraphModule) -> None:
    graph_module.pool = nn.AdaptiveAvgPool2d(4)
    graph_module.b = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1))


def another_function(graph_module: GraphModule) -> None:
    (node,) = [n for n in graph_module.graph.nodes if n.name.startswith("add")]
    first, second = node.all_input_nodes
    node.target, node.args = torch.cat, ([first, second], 1)
    graph_module.head = nn.Linear(8 * 32, 5)


@pytest.mark.parametrize("change", [pool_less, reshape_otherwise, another_module_under_the_name, another_function])
def test_what_changes_shapes_is_seen(change, runs):
    calibration, graph_module = Calibration(images().split(12)), trace(Net())
    calibration.example(graph_module)
    change(graph_module)
    graph_module.recompile()
    calibration.example(graph_module)
    assert len(runs) == 2
    check(calibration, graph_module)


def test_a_mask_in_a_buffer_that_chooses_more():
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True, False]))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.mask]

    calibration, graph_module = Calibration([images()]), trace(Chooses())
    calibration.example(graph_module)
    graph_module.mask[1] = True
    check(calibration, graph_module)


def test_a_loader_that_can_be_read_once_only():
    calibration, graph_module = Calibration(iter(images().split(12))), trace(Net())
    before = macs_per_sample(calibration.example(graph_module))
    assert len(list(calibration)) == 2
    pool_less(graph_module)
    after = macs_per_sample(calibration.example(graph_module))
    by_name = {str(node.target): macs for node, macs in before.items()}
    assert by_name == {"a": 64 * 8 * 4 * 9, "b": 16 * 8 * 8 * 9, "head": 128 * 5}
    assert {str(node.target): macs for node, macs in after.items()} == {"a": 64 * 288, "b": 4 * 576, "head": 32 * 5}


def test_a_model_of_one_batch_size_gives_a_whole_batch():
    class OfTwelve(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(12, 4, 8, 8))

    calibration, graph_module = Calibration(images().split(12)), trace(OfTwelve())
    example = calibration.example(graph_module)
    assert (example.images, example.takes_few) == (12, False)
    assert calibration.images(graph_module, 1)[0].shape == (12, 4, 8, 8)
    assert sum(macs_per_sample(example).values()) == 64 * 288 + 16 * 576 + 640


def test_a_model_that_fails_on_the_images_names_the_node():
    with pytest.raises(CalibrationError, match="failed on calibration batch 0 at node 'a'"):
        Calibration([torch.randn(4, 3, 8, 8)]).example(trace(Net()))


def test_a_default_compilation_finds_shapes_once(runs):
    model = fxprune.models.create("simple_cnn", width=4)
    batches = torch.randn(128, 1, 28, 28).split(64)
    fxprune.compile(model, batches, "2:4", progress=False)
    assert len(runs) == 5  # Is the trace right, hooks, the images, shapes and output before permuting, output after.


def test_ranks_take_their_macs_from_the_graph_as_it_is():
    model = Net().eval()
    compiled = fxprune.compile(model, images().split(12), "rank:0.5", progress=False)
    before, after = compiled.report.macs
    assert before == 64 * 288 + 16 * 576 + 640
    graph = trace(compiled)
    assert after == sum(macs_per_sample(Calibration(images().split(12)).example(graph)).values())
    assert after < before
