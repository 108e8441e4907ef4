"""Every weight of the model is in a row, and little pruned is not passed over in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.errors import GraphError
from fxprune.intake.totals import check_amount, uncovered
from fxprune.report import LayerReport
from fxprune.tracing import trace


def similarity(x: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(x, keys)


class Net(nn.Module):
    """Weights in a convolution, an embedding, a recurrent layer, a table of positions and a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.words = nn.Embedding(4, 8)
        self.recurrent = nn.GRU(8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 8, 1))
        self.keys = nn.Parameter(torch.randn(5, 8))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2) + self.positions
        z = self.recurrent(y.permute(2, 0, 1))[0][-1] * self.scale + self.words(y.argmax(1)).sum(1)
        return similarity(z, self.keys)


def rows_of(*names: str) -> list[LayerReport]:
    return [LayerReport(name=name, op="Conv2d", shape=(8, 8, 3, 3), status="pruned", sparsity=0.5) for name in names]


def test_each_weight_without_a_row_gets_one():
    graph_module = trace(Net(), example=torch.randn(3, 8, 6, 6))
    found = {row.name: row for row in uncovered(graph_module, rows_of("conv"))}
    weights = {n: p for n, p in graph_module.named_parameters() if p.dim() >= 2 and not n.startswith("conv")}
    assert set(found) == set(weights)
    assert {name: row.shape for name, row in found.items()} == {name: tuple(p.shape) for name, p in weights.items()}
    assert found["positions"].sparsity == 1.0
    assert "embedding" in found["words.weight"].reason
    assert "cdist" in found["keys"].reason
    assert found["recurrent.weight_ih_l0"].op == "GRU"


def test_rows_may_name_a_module_a_parameter_or_a_node():
    graph_module = trace(Net(), example=torch.randn(3, 8, 6, 6))
    (distance,) = (n for n in graph_module.graph.nodes if "cdist" in str(n.target))
    names = ("conv", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "words", "positions", distance.name)
    assert uncovered(graph_module, rows_of(*names)) == ()


class TestAmount:
    def graph_module(self):
        return trace(nn.Sequential(nn.Conv2d(8, 8, 3)))

    def row(self, weights: int, status: str, reason: str = "") -> LayerReport:
        return LayerReport(name="x", op="Linear", shape=(weights, 1), status=status, reason=reason)

    def test_half_is_enough(self, recwarn):
        assert check_amount(self.graph_module(), [self.row(5, "pruned"), self.row(5, "kept", "tied")], "2:4") == ""
        assert not recwarn.list

    def test_less_is_a_warning_with_the_main_reason(self):
        rows = [self.row(4, "pruned"), self.row(5, "kept", "tied"), self.row(2, "reconstructed", "3 channels")]
        with pytest.warns(UserWarning, match=r"only 36% of the weights were pruned to 2:4; the main reason.*45%.*tied"):
            check_amount(self.graph_module(), rows, "2:4")

    def test_none_is_an_error(self):
        with pytest.raises(GraphError, match=r"nothing could be pruned to 2:4.*6 input channels.*another pattern"):
            check_amount(self.graph_module(), [self.row(4, "reconstructed", "6 input channels")], "2:4")

    def test_unless_the_user_excluded_everything(self, recwarn):
        assert check_amount(self.graph_module(), [self.row(4, "kept", "excluded")], "2:4") == ""
        assert not recwarn.list
