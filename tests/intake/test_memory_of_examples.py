"""Tracing with example values holds what the traced code holds, and not every value of the network."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import tensors_in
from fxprune.intake import example_values
from fxprune.intake.record import intake
from fxprune.passes import RemoveInplace
from fxprune.tracing import trace


class Deep(nn.Module):
    """Many layers behind a branch on a shape; the first value, and a list, are read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Conv2d(4, 8, 1), nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(30))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        first = x = self.first(x)
        kept = []
        for number, layer in enumerate(self.layers):
            x = layer(x).relu()
            x[:, :2] += 1
            if number % 10 == 0:
                kept.append(x.mT)
        return x + first + sum(part.mT for part in kept)


def test_values_that_nobody_can_read_any_more_are_dropped(monkeypatch):
    held: list[int] = []
    run = example_values.ValueTracer._run

    def noted(self, node):
        run(self, node)
        held.append(sum(x.nbytes for value in self.values.values() for x in tensors_in([value])))

    monkeypatch.setattr(example_values.ValueTracer, "_run", noted)
    model, x = Deep().eval(), torch.randn(2, 4, 16, 16)
    one = 2 * 8 * 16 * 16 * 4
    graphs = []
    for limit in (2**40, 16 * one):
        monkeypatch.setattr(example_values, "HELD_BYTES", limit)
        held.clear()
        graph_module = trace(model, example=x)
        found = intake(graph_module)
        assert found is not None
        assert found.way == "example values"
        graphs.append(graph_module)
        torch.testing.assert_close(graph_module(x), model(x))
        most = max(held) // one
        assert most > 100 if limit > 2**30 else most < 40
    assert [n.target for n in graphs[0].graph.nodes] == [n.target for n in graphs[1].graph.nodes]


class AddsToViews(nn.Module):
    """As torchvision's mvit_v2 adds its table of positions: into a block of the tensor, which is read afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("four channels, please")
        y = x @ x.mT
        y[:, 1:, 1:] += x[:, 1:, 1:5]
        part = y[:, :2]
        part *= 2
        part[..., 0] -= 1
        return y + part.sum()


def test_what_is_added_to_a_view_is_in_the_tensor():
    model, x = AddsToViews(), torch.randn(3, 4, 5, 5)
    graph_module = trace(model, example=x)
    assert RemoveInplace()(graph_module) is not None
    torch.testing.assert_close(graph_module(x.clone()), model(x.clone()))
    assert not any("setitem" in str(n.target) or n.target is operator.iadd for n in graph_module.graph.nodes)
