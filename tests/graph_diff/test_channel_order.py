from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxprune.annotations import annotate
from fxprune.export import export_onnx
from fxprune.graph_diff import diff
from fxprune.graph_diff.channel_order import _assign
from fxprune.pattern import Pattern
from fxprune.rank_reduction import low_rank


class Residual(nn.Module):
    """A stem, a block around a skip connection with a depthwise convolution, a concatenation and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.outer = nn.Conv2d(24, 16, 1)
        self.last = nn.Conv2d(16 + 24, 12, 3)
        self.fc = nn.Linear(12 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.depthwise(self.inner(x)))
        x = torch.relu(self.outer(y) + x)
        return self.fc(torch.relu(self.last(torch.cat([x, y], 1))).flatten(1))


NEW_ORDER = {size: torch.randperm(size, generator=torch.Generator().manual_seed(size)) for size in (12, 16, 24)}


@pytest.fixture
def model() -> Residual:
    torch.manual_seed(0)
    model = Residual().eval()
    for tensor in (model.norm.weight, model.norm.running_mean, model.norm.running_var):
        tensor.data.uniform_(0.5, 2)
    return model


def permuted(model: Residual) -> Residual:
    """The same function with the channels of all three spaces in another order."""
    other = copy.deepcopy(model)
    stream, inner, last = NEW_ORDER[16], NEW_ORDER[24], NEW_ORDER[12]
    flat = (last[:, None] * 16 + torch.arange(16)).flatten()
    both = torch.cat([stream, 16 + inner])
    columns = {"inner": stream, "outer": inner, "last": both, "fc": flat}
    rows = {"stem": stream, "norm": stream, "inner": inner, "depthwise": inner, "outer": stream, "last": last}
    for name, order in columns.items():
        getattr(other, name).weight.data = getattr(other, name).weight.data[:, order]
    for name, order in rows.items():
        module = getattr(other, name)
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dim():
                setattr(module, key, nn.Parameter(tensor[order]) if isinstance(tensor, nn.Parameter) else tensor[order])
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    return other


def test_permuted_channels_are_found_where_nobody_wrote_them_down(model: Residual) -> None:
    result = diff(model, permuted(model))
    assert {node.changes for node in result.changed} == {("channels permuted",)}, str(result)
    assert {node.name for node in result.changed} == {
        "stem", "norm", "inner", "depthwise", "outer", "last", "fc"
    }  # fmt: skip
    assert all(not node.weight_change for node in result.changed)
    assert any("found by matching the weights" in note for note in result.notes)


@pytest.mark.parametrize("file", [False, True])
def test_pruned_weights_are_compared_in_their_order(model: Residual, file: bool, tmp_path: Path) -> None:
    other = permuted(model)
    expected = {}
    for name in ("inner", "last"):
        weight = getattr(other, name).weight
        kept = Pattern.parse("2:4").mask(weight.abs().permute(0, 2, 3, 1).flatten(1))
        mask = kept.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        expected[name] = float((weight * ~mask).norm().detach() / weight.norm().detach())
        weight.data *= mask
    models: list[nn.Module | Path] = [model, other]
    if file:
        x = torch.randn(2, 3, 6, 6)
        models = [tmp_path / "before.onnx", tmp_path / "after.onnx"]
        for path, some in zip(models, (model, other), strict=True):
            export_onnx(some, path, x)
    result = diff(*models)
    for name, change in expected.items():
        assert result[name].weight_change == pytest.approx(change, rel=1e-3)
        assert "channels permuted" in result[name].changes
    assert not any("bias changed" in phrase for node in result.changed for phrase in node.changes)


def test_models_that_have_nothing_in_common_are_not_called_permuted(model: Residual) -> None:
    torch.manual_seed(1)
    result = diff(model, Residual().eval())
    assert not any("channels permuted" in node.changes for node in result.nodes)
    change = result["inner"].weight_change
    assert change is not None
    assert change > 1


def test_two_orders_on_record_are_compared_with_each_other(model: Residual) -> None:
    first, second = (torch.fx.symbolic_trace(copy.deepcopy(model)) for _ in range(2))
    orders = [torch.randperm(16) for _ in range(2)]
    for graph, order in zip((first, second), orders, strict=True):
        for node in graph.graph.nodes:
            if node.name == "outer":
                graph.outer.weight.data = graph.outer.weight.data[order]
                graph.outer.bias.data = graph.outer.bias.data[order]
                annotate(node, order=(None, order))
    assert diff(first, second)["outer"].weight_change == 0
    assert diff(first, second)["outer"].changes == ("channels permuted",)


def test_every_row_gets_a_column_of_its_own() -> None:
    order = _assign(torch.tensor([[3.0, 2.0, 0.0], [2.5, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert order.tolist() == [0, 1, 2]
    assert sorted(_assign(torch.zeros(5, 5)).tolist()) == list(range(5))


class SideBranch(nn.Module):
    """A depthwise convolution whose value nobody reads, beside the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 2, bias=False)
        self.side = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.norm(self.side(x))
        return x.amax((2, 3))


def test_channels_of_which_nothing_is_known_are_left_in_their_order() -> None:
    model = SideBranch().eval()
    factored = low_rank(model, [torch.randn(4, 8, 7, 7)], "energy:0.6", device="cpu", progress=False)
    difference = diff(model, factored)
    assert "conv" in str(difference)
    assert "order of" not in str(difference)
