from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxprune.channels import Channels, analyse_channels
from fxprune.channels.remove import remove_channels
from fxprune.geometry import LayerGeometry
from fxprune.graph import module_of, value_shapes
from fxprune.layers.problem import layer_of
from fxprune.tracing import trace
from fxprune.widths.network import Width, columns_of, find_widths
from tests.channels_nets import NETWORKS, images, network

EXPECTED = {  # By the layer that writes them first, how many units can go among themselves.
    "Residual": {"stem": 12, "a": 16, "c": 10},
    "OptionA": {"stem": 8, "a": 16, "b": 8},
    "Mobile": {"stem": 8, "expand": 24, "squeeze": 6, "last": 12},
    "DenseBlock": {"stem": 8, "conv1": 6, "conv2": 6},
    "Grouped": {"a": 4, "c": 8},
    "Flat": {"a": 8, "b": 6, "hidden": 20},
    "Halves": {"a": 6, "b": 6, "join": 8},
    "Sliced": {"a": 7, "b": 6, "c": 6},
    "UNet": {"down": 8, "deep": 16, "up": 8, "join": 8},
}


def analysed(model: nn.Module, x: Tensor) -> tuple[GraphModule, Channels, list[Width]]:
    graph_module = trace(model, example=x)
    channels = analyse_channels(graph_module, value_shapes(graph_module, x))
    return graph_module, channels, find_widths(channels, lambda node: "")[0]


@torch.no_grad()
def silence(channels: Channels, width: Width, gone: list[int]) -> None:
    """Let no layer read these units."""
    for node in width.readers:
        module = layer_of(node)
        geometry = LayerGeometry.of(module)
        matrix = geometry.to_matrix(module.weight).clone()
        matrix[..., columns_of(channels, width, node)[gone].flatten()] = 0
        module.weight.copy_(geometry.to_weight(matrix).clone())


def classes_of(channels: Channels, width: Width, gone: list[int]) -> list[int]:
    return [c for number in gone for c in channels.units[width.units[number]].tolist()]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_can_go(name: str) -> None:
    _, _, widths = analysed(network(name), images(2))
    found: dict[str, int] = {}
    for width in widths:
        found[width.name] = max(found.get(width.name, 0), len(width.units))
    assert found == EXPECTED[name]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_to_remove_what_no_layer_reads_changes_nothing_but_the_size(name: str, seed: int) -> None:
    model, x = network(name, seed), images(4, seed)
    graph_module, channels, widths = analysed(model, x)
    generator = torch.Generator().manual_seed(seed)
    gone: list[int] = []
    for width in widths:
        count = len(width.units)
        numbers = torch.randperm(count, generator=generator)[: int(torch.randint(1, count, (1,), generator=generator))]
        silence(channels, width, numbers.tolist())
        gone += classes_of(channels, width, numbers.tolist())
    with torch.no_grad():
        before = graph_module(x)
        kept = remove_channels(graph_module, channels, np.array(gone), value_shapes(graph_module, x))
        graph_module.graph.lint()
        graph_module.recompile()
        after = graph_module(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    shapes = value_shapes(graph_module, x)
    for node in graph_module.graph.nodes:
        if node.name in kept:
            assert shapes[node][kept[node.name].dim] == len(kept[node.name].places), node.name
        _is_as_it_says(node)
    weights = sum(p.numel() for p in graph_module.parameters())
    assert weights < sum(p.numel() for p in model.parameters())


def _is_as_it_says(node: Node) -> None:
    """A module's own figures are those of its weight."""
    module = module_of(node)
    if isinstance(module, nn.Linear):
        assert tuple(module.weight.shape) == (module.out_features, module.in_features)
    if isinstance(module, nn.Conv2d):
        assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        assert module.out_channels % module.groups == 0
    if isinstance(module, nn.BatchNorm2d):
        assert module.weight.shape == module.running_mean.shape == (module.num_features,)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_width_alone(name: str) -> None:
    x = images(2)
    for number in range(len(analysed(network(name), x)[2])):
        graph_module, channels, widths = analysed(network(name), x)
        silence(channels, widths[number], [1, 0])
        with torch.no_grad():
            before = graph_module(x)
            gone = np.array(classes_of(channels, widths[number], [1, 0]))
            remove_channels(graph_module, channels, gone, value_shapes(graph_module, x))
            graph_module.recompile()
            torch.testing.assert_close(graph_module(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_of_a_dense_value_is_what_the_smaller_graph_computes(name: str) -> None:
    """Nothing is gone that any other value needs, so the values that are left are those of the dense model."""
    x = images(2)
    graph_module, channels, widths = analysed(network(name), x)
    last = max(widths, key=lambda width: len(width.units))
    dense = {node.name: value for node, value in _values(graph_module, x).items()}
    silence(channels, last, [0, 1])
    kept = remove_channels(
        graph_module, channels, np.array(classes_of(channels, last, [0, 1])), value_shapes(graph_module, x)
    )
    graph_module.recompile()
    first = last.writers[0].name
    torch.testing.assert_close(_named(graph_module, x, first), kept[first].of(dense[first]), rtol=1e-5, atol=1e-5)


def _values(graph_module: GraphModule, x: Tensor) -> dict[Node, Tensor]:
    from fxprune.graph import Runner

    values: dict[Node, Tensor] = {}

    class Keep(Runner):
        def run_node(self, n: Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    with torch.no_grad():
        Keep(graph_module).run(x)
    return values


def _named(graph_module: GraphModule, x: Tensor, name: str) -> Tensor:
    return next(value for node, value in _values(graph_module, x).items() if node.name == name)


class Counting(nn.Module):
    def __init__(self, divide: bool) -> None:
        super().__init__()
        self.divide = divide
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y / y.size(1) if self.divide else y.view(y.size(0), y.size(1), y.shape[2], -1))


@pytest.mark.parametrize("divide", [True, False])
def test_channels_that_the_model_counts_stay(divide: bool) -> None:
    graph_module, channels, widths = analysed(Counting(divide).eval(), images(2))
    b = next(node for node in graph_module.graph.nodes if node.target == "b")
    if divide:
        assert not widths
        assert "is given the number of channels" in channels.why_needed(b.all_input_nodes[0])
    else:
        assert [width.name for width in widths] == ["a"]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.GroupNorm(2, 8), "takes something over the channels of a group"),
        (nn.Softmax(1), "may mix or move channels"),
        (nn.ChannelShuffle(2), "may mix or move channels"),
    ],
)
def test_what_takes_all_channels_together_keeps_them(between: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 4, 1)).eval()
    graph_module, channels, widths = analysed(model, images(2))
    last = next(node for node in graph_module.graph.nodes if node.target == "2")
    assert not widths
    assert reason in channels.why_needed(last.all_input_nodes[0])


def test_a_mean_over_channels_keeps_them() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y * y.mean(1, keepdim=True).sigmoid())

    _, channels, widths = analysed(Attend().eval(), images(2))
    assert not widths
    assert any("takes something over all channels" in reason for reason in channels.needed.values())
