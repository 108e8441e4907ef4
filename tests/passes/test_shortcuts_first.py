from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import Options
from fxprune.consumers import skip_operands
from fxprune.passes import FoldBatchNorm, ShortcutsFirst
from fxprune.tracing import trace
from tests.channels_nets import images, network


class Late(nn.Module):
    """Its shortcut is written down last."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.head = shortcut, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.b(x)
        return self.head(F.relu(y + self.shortcut(x)))


def skips_after(model: nn.Module) -> tuple[bool, tuple[str, ...]]:
    """Whether the pass changed anything, and what is beside the second convolution's output then."""
    x = images(4)
    graph_module = trace(model.eval())
    with torch.no_grad():
        before = graph_module(x)
        modified = ShortcutsFirst()(graph_module).modified
        assert torch.equal(graph_module(x), before)
        assert not ShortcutsFirst()(graph_module).modified
    layer = next(node for node in graph_module.graph.nodes if node.target == "b")
    return modified, tuple(node.name for node in skip_operands(layer))


def test_a_shortcut_without_layers_comes_first() -> None:
    assert skips_after(Late(nn.AvgPool2d(1))) == (True, ("shortcut",))
    graph_module = trace(fxprune.models.create("resnet20").eval())
    FoldBatchNorm()(graph_module)
    ShortcutsFirst()(graph_module)
    layer = next(node for node in graph_module.graph.nodes if node.target == "layer2.0.conv2")
    assert [node.name for node in skip_operands(layer)] == ["pad"]


def test_one_with_a_layer_or_parameters_or_random_numbers_stays_behind() -> None:
    for shortcut in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Sequential(nn.AvgPool2d(1), nn.Conv2d(8, 8, 1))):
        assert skips_after(Late(shortcut)) == (False, ())
    model = Late(nn.Dropout()).eval()
    graph_module = trace(model)
    graph_module.get_submodule("shortcut").train()
    assert not ShortcutsFirst()(graph_module).modified


def test_one_that_depends_on_the_layer_stays_behind() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(x)
            return self.head(y + torch.sigmoid(x.mean((2, 3), keepdim=True) + 1) * y)

    graph_module = trace(Gate().eval())
    assert not ShortcutsFirst()(graph_module).modified


def test_the_layer_then_makes_up_for_the_shortcut() -> None:
    model, batches = network("OptionA"), images(128).split(32)
    x = images(64, 9)
    errors = []
    for target in ("dense", "skip"):
        options = Options(target=target, permute=False)
        found = fxprune.compile(
            model, batches, {"stem": "dense", "a": "1:4", "*": "dense"}, options=options, progress=False
        )
        with torch.no_grad():
            errors.append(float((found(x) - model(x)).square().mean()))
    assert errors[1] <= errors[0] * 1.01
