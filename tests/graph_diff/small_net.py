"""A small residual network with everything that a diff has to tell of, and ways to change it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.tracing import trace


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm around a skip connection, a functional convolution and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.mix = nn.Parameter(torch.zeros(4, 8, 1, 1))
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + y)
        y = F.conv2d(y, self.mix)
        return self.fc(y.mean((2, 3)))


def fill(model: nn.Module) -> None:
    """Numbers that do not depend on torch's random generator."""
    for k, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.is_floating_point():
            i = torch.arange(tensor.numel())
            values = ((31 * i * i + 17 * i + 7 * k) % 101 - 50.5).reshape(tensor.shape) / 50.5  # in (-1, 1), never 0
            positive = name.endswith("running_var") or (".bn" in f".{name}" and name.endswith("weight"))
            tensor.copy_(1.5 + values if positive else 0.4 * values)


def edited(model: nn.Module, edit: Callable[[GraphModule], None]) -> GraphModule:
    """A traced copy with something done to it."""
    graph_module = trace(model)
    edit(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def svd_pair(net: SmallNet, rank: int) -> GraphModule:
    """conv2 replaced by its best approximation of some rank: 3 x 3 to `rank` channels, then 1 x 1."""
    left, values, right = torch.linalg.svd(net.conv2.weight.detach().flatten(1), full_matrices=False)
    first = nn.Conv2d(8, rank, 3, padding=1, bias=False)
    second = nn.Conv2d(rank, 8, 1)
    first.weight.data = (values[:rank, None] * right[:rank]).reshape(rank, 8, 3, 3)
    second.weight.data = left[:, :rank].reshape(8, rank, 1, 1).clone()
    second.bias.data = net.conv2.bias.detach().clone()

    def replace(graph_module: GraphModule) -> None:
        graph_module.conv2 = nn.Sequential(first, second)
        (node,) = (n for n in graph_module.graph.nodes if n.name == "conv2")
        with graph_module.graph.inserting_before(node):
            inner = graph_module.graph.call_module("conv2.0", node.args)
            node.replace_all_uses_with(graph_module.graph.call_module("conv2.1", (inner,)))
        graph_module.graph.erase_node(node)

    return edited(net, replace)
