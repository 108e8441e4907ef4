"""InsertObservers: which layers are to be solved, which are not and why, and who shares an observer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.nn.utils import parametrizations, prune

from fxprune.annotations import Annotation, annotation
from fxprune.constraints import chain_text
from fxprune.errors import PatternError
from fxprune.graph import input_of, module_of
from fxprune.passes import InsertObservers, changes
from fxprune.recipe import Recipe
from fxprune.statistics import HessianObserver
from fxprune.tracing import trace


def observed(model: nn.Module, pattern: object = "2:4", **options: object) -> GraphModule:
    graph_module = trace(model, exclude=options.get("exclude", ()))
    insert = InsertObservers(Recipe.parse(pattern), **options)
    insert(graph_module)
    recorded = changes(graph_module)
    assert insert(graph_module).modified is False
    assert changes(graph_module) == recorded
    return graph_module


def tasks(graph_module: GraphModule) -> dict[str, Annotation]:
    return {
        str(node.target) if node.op == "call_module" else node.name: annotation(node)
        for node in graph_module.graph.nodes
        if annotation(node).role
    }


def observers(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if isinstance(module_of(node), HessianObserver)]


class Custom(nn.Conv2d):
    """A subclass: it may compute something else."""


class Block(nn.Module):
    """One conv of any kind after a 1x1 conv, on 8 channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(8, 8, 1), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x))


PRUNED = [
    nn.Conv2d(8, 4, 3),
    nn.Conv2d(8, 4, 3, bias=False, stride=2, padding="valid"),
    nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(8, 8, 3, groups=2),
    nn.Conv2d(8, 4, 1),
    nn.ConvTranspose2d(8, 8, 3),
    nn.Conv2d(8, 8, 3).half(),
    nn.Conv2d(8, 8, 3).bfloat16(),
]


@pytest.mark.parametrize("layer", PRUNED, ids=repr)
def test_layers_that_take_the_pattern(layer):
    graph_module = observed(Block(layer))
    assert tasks(graph_module)["layer"].role == "compress"
    assert tasks(graph_module)["layer"].reason == ""
    assert len(observers(graph_module)) == 2


KEPT = [(nn.Conv2d(8, 8, 3, dtype=torch.complex64), "its weight is torch.complex64; float16, bfloat16")]


@pytest.mark.parametrize("reconstruct", [True, False])
@pytest.mark.parametrize(("layer", "reason"), KEPT, ids=[reason for _, reason in KEPT])
def test_layers_whose_weights_must_not_be_touched(layer, reason, reconstruct):
    graph_module = observed(Block(layer), reconstruct=reconstruct)
    task = tasks(graph_module)["layer"]
    assert (task.role, task.geometry) == ("keep", None)
    assert reason in task.reason
    assert len(observers(graph_module)) == 1
    kept = [change for change in changes(graph_module) if change.action == "kept"]
    assert [(change.target, change.reason) for change in kept] == [("layer", task.reason)]


DECLINED = [
    ("2:4", nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
    ("3:5", nn.Conv2d(8, 8, 3), "8 input channels are not a multiple of 5"),
    ("4:8", nn.Conv2d(8, 8, 3, groups=2), "4 input channels per group are not a multiple of 8"),
    ("0.9", nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
]


@pytest.mark.parametrize(("pattern", "layer", "reason"), DECLINED)
def test_layers_that_the_pattern_declines_are_refitted_or_kept(pattern, layer, reason):
    task = tasks(observed(Block(layer), pattern))["layer"]
    assert task.role == "reconstruct"
    assert reason in task.reason
    assert task.geometry is not None
    task = tasks(observed(Block(layer), pattern, reconstruct=False))["layer"]
    assert (task.role, task.geometry) == ("keep", None)
    assert reason in task.reason


@pytest.mark.parametrize("exclude", [("layer",), ("l*",), ("first", "layer")])
def test_excluded_layers(exclude):
    graph_module = observed(Block(nn.Conv2d(8, 8, 3)), exclude=exclude)
    assert tasks(graph_module)["layer"] == Annotation("keep", "excluded")
    assert len(observers(graph_module)) == 2 - len(exclude)


COMPUTED = [
    (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), "parametrized: its weight is computed"),
    (lambda: prune.identity(nn.Conv2d(8, 8, 3), "weight"), "its weight is computed by a hook"),
]


@pytest.mark.parametrize(("layer", "reason"), COMPUTED, ids=[reason for _, reason in COMPUTED])
def test_computed_weights_are_kept_in_a_graph_that_is_not_in_the_normal_form(layer, reason):
    graph_module = symbolic_trace(Block(layer()))
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    assert reason in tasks(graph_module)["layer"].reason
    assert tasks(observed(Block(layer())))["layer"].role == "compress"


def test_a_subclass_is_traced_through_and_pruned():
    assert tasks(observed(Block(Custom(8, 8, 3))))["layer"].role == "compress"


def test_calls_of_one_module_are_one_layer_with_one_observer():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 8, 1)
            self.alias = self.layer

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.layer(x))

    graph_module = observed(Shared())
    found = [annotation(node) for node in graph_module.graph.nodes if annotation(node).role]
    assert [task.role for task in found] == ["compress", "repeat"]
    first, second = observers(graph_module)
    assert module_of(first) is module_of(second)


def test_one_module_under_two_names_called_once_is_pruned():
    model = Block(nn.Conv2d(8, 8, 3))
    model.alias = model.layer
    assert tasks(observed(model))["layer"].role == "compress"


def test_a_tied_weight_with_two_biases_is_one_layer():
    model = Block(nn.Conv2d(8, 8, 1))
    model.layer.weight = model.first.weight
    found = tasks(observed(model))
    assert found["first"].role == "compress"
    assert (found["layer"].role, found["layer"].reason) == ("repeat", "its weight is that of 'first'")


def test_a_weight_that_is_also_read_directly_is_kept():
    class Regularised(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.layer.weight.norm()

    found = tasks(observed(Regularised(nn.Conv2d(8, 8, 1))))
    assert found["layer"].reason == "its weight is shared with another part of the model"
    assert found["first"].role == "compress"


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.matrix = nn.Parameter(torch.randn(8, 8, 3, 3)), nn.Parameter(torch.randn(8, 8))
        self.register_buffer("rotation", torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.filter).mean((2, 3))
        x = F.linear(x, self.matrix) @ self.matrix
        x = torch.matmul(x, self.rotation)  # A buffer: not trained, not a layer.
        return x.matmul(self.matrix) * (x @ x.mT).mean()


def test_functional_calls_and_products_in_a_graph_that_is_not_in_the_normal_form():
    graph_module = symbolic_trace(Functional())
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    found = tasks(graph_module)
    assert sorted(found) == ["conv2d", "linear", "matmul", "matmul_2"]
    for task in found.values():
        assert task.role == "keep"
        assert "a functional call in the model's own forward" in task.reason


def test_layers_inside_a_leaf_are_on_record():
    class Leafy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    graph_module = observed(Leafy(), exclude=("attention",))
    reasons = [change.reason for change in changes(graph_module)]
    assert any("attention.out_proj" in reason for reason in reasons)
    assert any("attention.in_proj_weight" in reason for reason in reasons)


class Branches(nn.Module):
    """Four readers of one value: two in one geometry, one in another, one by keyword; and the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.last = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x), self.c(x), self.d(input=x)], 1))


def test_readers_of_one_value_in_one_geometry_share_an_observer():
    graph_module = observed(Branches())
    source = {str(n.target): input_of(n) for n in graph_module.graph.nodes if annotation(n).role}
    assert source["a"] is source["b"] is source["d"]
    assert len({source["a"], source["c"], source["last"]}) == 3
    assert len(observers(graph_module)) == 3


def test_a_graph_with_observers_computes_what_it_did_and_gathers_the_statistics():
    model = Branches()
    graph_module, x = observed(model), torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(graph_module(x), model(x), rtol=0, atol=0)
    observer = module_of(input_of(next(n for n in graph_module.graph.nodes if n.target == "c")))
    flat = x.movedim(1, 0).flatten(1).double()
    torch.testing.assert_close(observer.statistics().gram[0], flat @ flat.mT, rtol=1e-5, atol=1e-4)
    assert observer.statistics().count == 3 * 36


def test_deepcopy_of_an_observed_graph():
    graph_module = copy.deepcopy(observed(Branches()))
    assert len(observers(graph_module)) == 3
    assert tasks(graph_module)["a"].role == "compress"


def test_a_layer_whose_hessian_would_not_fit_is_solved_in_blocks():
    graph_module = trace(nn.Sequential(nn.Flatten(), nn.Linear(20_000, 4)))
    InsertObservers(Recipe.parse("2:4"))(graph_module)
    task = next(annotation(node) for node in graph_module.graph.nodes if annotation(node).role)
    assert task.role == "compress"
    assert (task.geometry.blocks, task.geometry.columns) == (5, 4000)
    (observer,) = observers(graph_module)
    assert module_of(observer).geometry.blocks == 5


def chains(graph_module: GraphModule) -> dict[str, str]:
    return {name: chain_text(found.chain) for name, found in tasks(graph_module).items()}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def test_layers_have_recipes_of_their_own():
    recipe = {"layer2.*": "rank:0.5+2:4", "layer1.0": "1:4", "layer1": "0.9", "fc": "dense", "*": "2:4"}
    graph_module = observed(Stack(), recipe)
    assert chains(graph_module) == {
        "stem": "dense", "layer1.0": "1:4", "layer1.2": "0.9", "layer2.0": "dense", "layer2.1": "rank:0.5+2:4", "fc": "dense",
    }  # fmt: skip
    found = tasks(graph_module)
    assert found["fc"].reason == "dense in the recipe"
    assert "3 input channels are not a multiple of 4" in found["stem"].reason
    assert "8 groups" in found["layer2.0"].reason
    assert "depthwise" in found["layer2.0"].reason


def test_what_no_entry_names_stays_dense_and_says_so():
    found = tasks(observed(Stack(), {"layer1": "2:4"}))
    assert found["fc"].role == "reconstruct"
    assert found["fc"].reason == "named by no entry of the recipe"


def test_a_name_that_matches_nothing_is_an_error():
    with pytest.raises(
        PatternError, match=r"'layer9\.\*' matches no layer that the model calls; layers: 'stem', 'layer1\.0'"
    ):
        observed(Stack(), {"layer9.*": "1:4", "*": "2:4"})


@pytest.mark.parametrize("recipe", [{"*": "2:4", "fc": "dense"}, {"layer2": "2:4", "layer2.0": "dense", "*": "1:4"}])
def test_an_entry_that_never_counts_is_an_error(recipe):
    with pytest.raises(PatternError, match=r"never counts: '(\*|layer2)' matches all of its layers"):
        observed(Stack(), recipe)


def test_a_misspelt_name_brings_up_the_right_one():
    with pytest.raises(
        PatternError, match=r"'layer2\.O' matches no layer that the model calls; did you mean 'layer2\.1', 'layer2\.0'"
    ):
        observed(Stack(), {"layer2.O": "1:4", "*": "2:4"})
