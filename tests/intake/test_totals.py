"""Every weight of the model is in a row, and little pruned is not passed over in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import GraphError
from fxprune.intake.totals import little, uncovered
from fxprune.report import LayerReport
from fxprune.tracing import trace


def similarity(x: Tensor, keys: Tensor) -> Tensor:
    return torch.cdist(x, keys)


class Net(nn.Module):
    """Weights in a convolution, an embedding, a recurrent layer, a table of positions and a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.words = nn.Embedding(8, 8)
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
    assert {"recurrent.weight_ih_l0.weight", "recurrent.weight_hh_l0.weight"} <= set(weights)
    assert set(found) == set(weights)
    assert {name: row.shape for name, row in found.items()} == {name: tuple(p.shape) for name, p in weights.items()}
    assert found["positions"].sparsity == 1.0
    assert "embedding" in found["words.weight"].reason
    assert "cdist" in found["keys"].reason
    assert found["recurrent.weight_ih_l0.weight"].reason == "inside 'recurrent', which is called as a whole"


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

    def test_half_is_enough(self):
        assert little(self.graph_module(), [self.row(5, "pruned"), self.row(5, "kept", "tied")], "2:4") == ""

    def test_less_is_told_with_the_main_reason(self):
        rows = [self.row(4, "pruned"), self.row(5, "kept", "tied"), self.row(2, "reconstructed", "3 channels")]
        told = little(self.graph_module(), rows, "2:4")
        assert told == ("only 36% of the weights were compressed to 2:4; the main reason, for 45% of all: tied")


X = torch.randn(64, 6, 8, 8)


def test_a_compilation_that_can_compress_nothing_is_an_error():
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3))
    with pytest.raises(
        GraphError, match=r"nothing can be compressed to 2:4.*6 input channels.*another pattern, such as '0.5'"
    ):
        fxprune.compile(model, [X], "2:4", progress=False)
    assert fxprune.compile(model, [X], "0.5", progress=False).report.sparsity == 0.5  # The remedy.


def test_where_no_pattern_would_help_none_is_proposed():
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU())
    with pytest.raises(GraphError, match=r"depthwise.*No other pattern would help"):
        fxprune.compile(model, [X], "2:4", progress=False)


@pytest.mark.parametrize("kinds", [{"exclude": ("*",)}, {"pattern": "dense"}])
def test_unless_that_is_what_was_asked_for(kinds):
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)).eval()
    compiled = fxprune.compile(model, [X], progress=False, **kinds)
    torch.testing.assert_close(compiled(X), model(X))


def test_a_compilation_that_compresses_little_is_a_warning_and_a_line():
    model = nn.Sequential(nn.Conv2d(6, 60, 3), nn.ReLU(), nn.Conv2d(60, 4, 1))
    with pytest.warns(
        fxprune.CalibrationWarning, match=r"only 7% of the weights were compressed to 2:4.*6 input channels"
    ):
        compiled = fxprune.compile(model, [X], "2:4", progress=False)
    assert "only 7% of the weights" in compiled.report.summary


def test_totals_are_of_the_whole_model():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(8, 8, 3), nn.Parameter(torch.randn(6, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(self.conv(x).mean((2, 3)), self.table)

    report = fxprune.compile(Net(), [torch.randn(64, 8, 6, 6)], "2:4", progress=False).report
    assert {row.name: row.weights for row in report.layers} == {"conv": 576, "table": 48}
    assert report.sparsity == pytest.approx(288 / 624)


class WithUnreadLayers(nn.Module):
    """A head for training only, a layer that nothing calls, and one that is held under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3)
        self.again = self.conv
        self.head, self.training_head = nn.Linear(8, 4), nn.Linear(8, 3)
        self.left_over = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.table = nn.Parameter(torch.randn(5, 6))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.again(x).mean((2, 3))
        return (self.head(x), self.training_head(x)) if self.training else self.head(x)


def test_weights_that_no_output_depends_on_have_rows_and_come_back_from_a_file(tmp_path):
    compiled = fxprune.compile(WithUnreadLayers(), [X], "2:4", method="magnitude", progress=False)
    fxprune.save(compiled, tmp_path / "net.pt")
    for report in (compiled.report, fxprune.load(tmp_path / "net.pt").report):
        unread = {row.name: row.shape for row in report.layers if "no output depends on it" in row.reason}
        assert unread == {"training_head": (3, 8), "left_over.0": (4, 4, 3, 3), "table": (5, 6)}
        assert sum(row.weights for row in report.layers) == 432 + 32 + 24 + 144 + 30
        assert {row.name for row in report.unread} == set(unread)
        assert report.sparsity == pytest.approx(16 / (432 + 32))  # The convolution has 6 input channels.
        assert "No output depends on 198 further weights (29.9% of the model given), in 3 layers" in report.summary
        assert "1 of 2 layers" in report.summary


def test_weights_that_no_output_depends_on_are_nothing_to_warn_of():
    model = WithUnreadLayers()
    model.conv = model.again = nn.Conv2d(8, 8, 3)
    model.left_over = nn.Conv2d(64, 64, 3)
    compiled = fxprune.compile(model, [torch.randn(64, 8, 8, 8)], "2:4", method="magnitude", progress=False)
    assert compiled.report.warnings == ()
    assert compiled.report.sparsity == 0.5


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)), nn.Flatten(2), nn.Linear(36, 4)),
        nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        nn.Sequential(nn.ConvTranspose2d(6, 16, 2, groups=2), nn.PReLU(16), nn.Conv2d(16, 8, 3, groups=2)),
    ],
    ids=["weight norm", "spectral norm", "transformer", "transposed and grouped"],
)
@pytest.mark.parametrize("exclude", [(), ("*",)], ids=["", "excluded"])
def test_no_weight_that_is_used_is_called_unread(model, exclude):
    compiled = fxprune.compile(model, [X[:, :6]], "0.5", method="magnitude", exclude=exclude, progress=False)
    assert not [row for row in compiled.report.layers if "no output depends" in row.reason]


def test_ranks_within_a_budget_of_macs_may_leave_most_weights_whole() -> None:
    """The convolutions have the MACs, the classifier the weights: the budget is kept, so there is nothing to warn of."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(8),
        nn.Flatten(), nn.Linear(1024, 64),
    ).eval()  # fmt: skip
    batches = torch.randn(64, 3, 16, 16).split(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxprune.CalibrationWarning)
        compiled = fxprune.low_rank(model, batches, "macs:0.6", exclude=("6",), progress=False)
    before, after = compiled.report.macs
    assert after <= 0.6 * before
    assert compiled.report["2"].is_compressed
