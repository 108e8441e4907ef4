from __future__ import annotations

import pytest
import torch

from fxprune.channels import analyse_channels
from fxprune.graph import value_shapes
from fxprune.tracing import trace
from fxprune.widths.network import find_widths
from fxprune.widths.survey import by_size
from tests.channels_nets import Residual, images


def test_a_stream_costs_what_the_layers_that_read_it_cost() -> None:
    """With weights all alike a unit is worth the nth part of its width, k times for each of k layers that read it."""
    model = Residual().eval()
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    graph_module = trace(model)
    channels = analyse_channels(graph_module, value_shapes(graph_module, images(2)))
    widths, _ = find_widths(channels, lambda node: "")
    found = by_size(channels, widths, multiple=1)
    assert sorted(len(width.readers) for width in widths) == [1, 1, 3]
    for width, surveyed in zip(widths, found, strict=True):
        units = len(width.units)
        wanted = [len(width.readers) ** 2 * (units - left) / units for left in surveyed.curve.choices]
        assert surveyed.curve.errors == pytest.approx(wanted)
