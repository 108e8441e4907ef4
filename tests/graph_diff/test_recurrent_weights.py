"""Recurrent layers in a diff, of graphs and of files: their weights count, and are shown as pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.compiled import CompiledModule
from fxprune.export import inspect_onnx
from fxprune.graph_diff import GraphDiff

STEPS = 5
KINDS = {
    "LSTM": nn.LSTM(8, 12, batch_first=True),
    "LSTM both ways": nn.LSTM(8, 12, bidirectional=True),
    "GRU, two layers": nn.GRU(8, 12, num_layers=2, batch_first=True),
}


class Net(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.fc = rnn, nn.Linear(24 if rnn.bidirectional else 12, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))
        return self.fc(y if self.rnn.batch_first else y.transpose(0, 1))


def weights(rnn: nn.Module) -> list[Tensor]:
    return [p.detach() for name, p in rnn.named_parameters() if "weight_" in name and p.dim() == 2]


def relative_change(before: nn.Module, after: nn.Module) -> float:
    old, new = (torch.cat([w.flatten() for w in weights(module)]) for module in (before, after))
    return float((new - old).norm() / old.norm())


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[Net, CompiledModule]:
    net = Net(request.param).eval()
    images = torch.randn(64, STEPS, 8)
    return net, fxprune.compile(net, images.split(32), "2:4", progress=False)


def test_a_graph(both: tuple[Net, CompiledModule]) -> None:
    net, compiled = both
    found = fxprune.diff(net, compiled, example_inputs=torch.randn(3, STEPS, 8))
    node, count = found["rnn"], sum(w.numel() for w in weights(net.rnn))
    assert node.changes[0] == "pruned to 2:4"
    assert node.weight_change == pytest.approx(relative_change(net.rnn, compiled.rnn), rel=1e-6)
    assert node.before is not None
    assert node.after is not None
    assert (node.before.sparsity, node.after.sparsity, node.after.pattern) == (0, 0.5, "2:4")
    assert (node.after.weights, node.after.nonzeros) == (count, count // 2)
    assert node.after.macs == count * STEPS
    assert found.costs_after.nonzero_macs == found.costs_after.macs // 2
    assert f"{count:,} weights 50.0%" in " ".join(str(found).split())
    assert "bias" not in str(found)
    assert not found.notes


def test_two_files(both: tuple[Net, CompiledModule], tmp_path: Path) -> None:
    net, compiled = both
    for name, model in (("dense", net), ("sparse", compiled)):
        fxprune.export_onnx(model, tmp_path / f"{name}.onnx", torch.randn(3, STEPS, 8))
    found: GraphDiff = fxprune.diff(tmp_path / "dense.onnx", tmp_path / "sparse.onnx")
    nodes = [node for node in found.nodes if node.state.op in ("LSTM", "GRU")]
    assert [node.name for node in nodes] == [f"rnn.l{i}" for i in range(net.rnn.num_layers)]
    for node in nodes:
        assert node.changes[0] == "pruned to 2:4"
        assert node.after is not None
        assert (node.after.sparsity, node.after.pattern) == (0.5, "2:4")
    count = sum(w.numel() for w in weights(net.rnn))
    assert sum(node.state.weights for node in nodes) == count
    counted = [node.state for node in nodes if node.state.macs is not None]
    assert [state.macs for state in counted] == [state.weights * STEPS for state in counted]
    assert len(counted) == 1  # How many steps the second layer reads, shape inference does not say.
    assert [note for note in found.notes if "rnn.l1" in note] == [
        f"{name}: MACs leave out rnn.l1: its number of time steps is not known."
        for name in ("dense.onnx", "sparse.onnx (pruned to 2:4)")
        if len(nodes) > 1
    ]

    told = inspect_onnx(tmp_path / "sparse.onnx")
    names = {f"rnn.weight_{kind}_l{i}" for kind in ("ih", "hh") for i in range(net.rnn.num_layers)}
    assert {layer.initializer for layer in told.layers} - {"fc.weight", "fc.weight_transposed"} == names
    assert told.size.weights == count + net.fc.weight.numel()
    assert not told.others  # A bias of both directions is no matrix.


def test_rounding_is_no_change() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other[0].bias *= 1 + 1e-7
        other[1].bias *= 1.5
    found = fxprune.diff(net, other)
    assert found["0"].changes == ("bias differs by rounding",)
    assert found["1"].changes == ("bias changed by 50.0%",)
