from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from fxprune.calibration.shapes import KnownShapes
from fxprune.channels import analyse_channels
from fxprune.geometry import LayerGeometry
from fxprune.graph import module_of
from fxprune.tracing import trace
from fxprune.widths import speedup
from fxprune.widths.network import find_widths, layer_sizes
from fxprune.widths.plan import Curve
from tests.channels_nets import NETWORKS, images, network


@pytest.mark.parametrize("name", NETWORKS)
def test_times_by_channels_add_up_to_the_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts weights the table is exact: what is measured are the sizes that layers come to have."""
    asked = []

    def weights(geometry: LayerGeometry, shape: Sequence[int], channels: Sequence[tuple[int, int]]) -> list[float]:
        asked.append((geometry, tuple(shape)))
        return [float(read // geometry.groups * given) for read, given in channels]

    monkeypatch.setattr(speedup, "layer_times", weights)
    graph_module = trace(network(name), example=images(2))
    example, _ = KnownShapes().run(graph_module, [images(2)])
    channels = analyse_channels(graph_module, example.shapes)
    widths, _ = find_widths(channels, lambda node: "")
    sizes = layer_sizes(channels, widths, example)
    curves = [Curve(width.choices(1), (0.0,) * len(width.choices(1))) for width in widths]
    found = speedup.with_times(sizes, curves, example)
    assert len(asked) == len(set(asked))
    assert all(shape[0] == 1 for _, shape in asked)
    for share in (1.0, 0.5):
        counts = [max(1, round(share * len(width.units))) for width in widths]
        for node, size in zip(sizes, found, strict=True):
            geometry = LayerGeometry.of(module_of(node))
            read, given = size.channels(counts)
            read = geometry.in_channels // geometry.groups if not size.inputs else read
            given = geometry.out_channels if not size.outputs else given
            assert size.cost(counts) == pytest.approx(read * given)


def test_layers_that_are_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        speedup, "layer_times", lambda g, shape, channels: [asked.append(shape) or 1.0] + [1.0] * (len(channels) - 1)
    )
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6)]).eval()
    graph_module = trace(model)
    example, _ = KnownShapes().run(graph_module, [images(2)])
    channels = analyse_channels(graph_module, example.shapes)
    widths, _ = find_widths(channels, lambda node: "")
    curves = [Curve(width.choices(1), (0.0,) * len(width.choices(1))) for width in widths]
    assert len(speedup.with_times(layer_sizes(channels, widths, example), curves, example)) == 6
    assert len(asked) == 3  # The first, the last, and the four between.
