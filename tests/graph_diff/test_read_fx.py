from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fxprune.graph_diff.model_graph import GraphNode
from fxprune.graph_diff.read_fx import read_fx
from fxprune.tracing import trace


def nodes_of(model: nn.Module, inputs: object = None) -> dict[str, GraphNode]:
    return {node.name: node for node in read_fx(trace(model), inputs).nodes}


def test_macs_of_every_kind_of_layer() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(4, 8, (3, 5), stride=2, padding=1, groups=2)
            self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
            self.line = nn.Conv1d(6, 3, 3)
            self.dense = nn.Linear(3, 7)
            self.kernel = nn.Parameter(torch.randn(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            y = self.line(self.up(self.wide(x)).flatten(2))
            y = F.linear(self.dense(y.transpose(1, 2)), self.kernel)
            return y @ y.transpose(1, 2)

    nodes = nodes_of(Layers(), torch.randn(3, 4, 11, 13))
    wide_out = (6, 6)  # (11 + 2 - 3) // 2 + 1, (13 + 2 - 5) // 2 + 1
    positions = 4 * wide_out[0] * wide_out[1] - 2
    assert nodes["wide"].output_shape == (3, 8, *wide_out)
    assert nodes["wide"].macs == 8 * 2 * 15 * 36
    assert nodes["up"].macs == 8 * 3 * 4 * 36  # once for every input position
    assert nodes["line"].macs == 3 * 6 * 3 * positions
    assert nodes["dense"].macs == 7 * 3 * positions
    assert nodes["kernel"].macs == 5 * 7 * positions
    assert nodes["matmul"].macs == positions * positions * 5
    assert nodes["flatten"].macs is None


def test_macs_do_not_depend_on_the_batch_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5))
    counts = [[node.macs for node in nodes_of(model, torch.randn(n, 3, 6, 6)).values()] for n in (1, 4)]
    assert counts[0] == counts[1]
    assert counts[0][1] == 8 * 27 * 16


def test_parameters_belong_to_the_function_that_reads_them() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 2, 3, 3))
            self.b = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, self.b, padding=1, groups=2)

    nodes = {node.name: node for node in read_fx(symbolic_trace(Functional())).nodes}
    assert list(nodes) == ["x", "conv2d", "output"]
    weights = nodes["conv2d"].weights
    assert weights.weight is not None
    assert weights.weight.shape == (6, 2, 3, 3)
    assert weights.groups == 2
    assert list(weights.others) == ["bias"]
    assert nodes["conv2d"].arguments == {"padding": "1", "groups": "2"}


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert sum(p.numel() for p in read_fx(trace(model)).parameters.values()) == 16 + 8


def test_in_place_forms_have_the_name_of_the_plain_ones() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.add, (x, x))
    for written in (y, graph.call_function(operator.iadd, (y, x)), graph.call_method("__imul__", (y, x))):
        y = graph.call_method("relu_", (written,))
    graph.output(graph.call_function(F.relu, (y,), {"inplace": True}))
    read = read_fx(torch.fx.GraphModule(nn.Module(), graph)).nodes
    assert [(node.op, node.inplace) for node in read] == [
        ("input", False), ("add", False), ("add", True), ("mul", True), ("relu", True), ("relu", True),
        ("relu", True), ("relu", True), ("output", False),
    ]  # fmt: skip
    assert read[-2].arguments == {}


def test_what_is_left_out_of_macs_is_noted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    graph = read_fx(symbolic_trace(Attention()), torch.randn(2, 5, 8))
    assert graph.notes == ("MACs leave out what happens inside MultiheadAttention (1 calls).",)
