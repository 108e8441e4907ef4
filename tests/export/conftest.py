"""A small pruned network with every kind of layer that an exporter treats differently, and its ONNX file."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from fxprune.annotations import annotate_graph
from fxprune.export import OnnxReport, export_onnx
from fxprune.pattern import Pattern
from fxprune.report import LayerReport, PruneReport


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.square = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.pointwise = nn.Conv2d(16, 32, 1, bias=False)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.tokens = nn.Linear(32, 24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.bn(self.stem(x)))
        x = self.square(x + F.relu(self.grouped(x)))
        x = self.depthwise(F.relu(self.pointwise(x)))
        tokens = self.tokens(x.flatten(2).transpose(1, 2))
        return {"logits": self.fc(F.relu(tokens).mean(1)), "map": self.up(x)}


PRUNED = ("grouped", "square", "pointwise", "tokens", "fc")


def prune(model: nn.Module, names: tuple[str, ...], pattern: str = "2:4") -> GraphModule:
    """A traced copy with some layers projected, and the report that compile would leave."""
    graph_module = symbolic_trace(model.eval())
    layers = []
    for name, module in graph_module.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        shape, op = tuple(module.weight.shape), type(module).__name__
        if name in names:
            module.weight.data = Pattern.parse(pattern).project(module.weight.data)
            sparsity = float((module.weight == 0).double().mean())
            layers.append(LayerReport(name, op, shape, pattern, "pruned", sparsity=sparsity))
        else:
            layers.append(LayerReport(name, op, shape, reason="excluded"))
    annotate_graph(graph_module, report=PruneReport(tuple(layers), "magnitude", pattern))
    return graph_module


def make_net() -> GraphModule:
    torch.manual_seed(0)
    net = Net()
    for tensor in (net.bn.running_mean, net.bn.running_var, net.bn.weight.data, net.bn.bias.data):
        tensor.uniform_(0.5, 1.5)
    return prune(net, PRUNED)


@pytest.fixture(scope="session", autouse=True)
def _one_operator_registry() -> Iterator[None]:
    """torch builds the same table of 500 operators for every export, which takes longer than a small export itself."""
    from torch.onnx._internal.exporter import _registration

    build = _registration.ONNXRegistry.from_torchlib
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(functools.cache(build)))
        yield


@pytest.fixture(scope="session")
def net() -> GraphModule:
    """Do not modify."""
    return make_net()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def exported(net: GraphModule, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OnnxReport]:
    """The net's file, once for the session, and the report of its export."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return path, export_onnx(net, path, images)


Edit = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def corrupt(exported: tuple[Path, OnnxReport], tmp_path: Path) -> Callable[[str, Edit], Path]:
    """`corrupt(initializer, edit)` writes a copy of the file with one tensor changed."""

    def change(name: str, edit: Edit) -> Path:
        path = Path(shutil.copy(exported[0], tmp_path / "corrupt.onnx"))
        model = onnx.load(str(path))
        tensor = next(t for t in model.graph.initializer if t.name == name)
        before = numpy_helper.to_array(tensor)
        after = np.ascontiguousarray(edit(before.copy()))
        assert after.shape != before.shape or not np.array_equal(before, after)
        tensor.CopyFrom(numpy_helper.from_array(after, name))
        onnx.save(model, str(path))
        return path

    return change
