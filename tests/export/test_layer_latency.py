from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.export.layer_latency import measure_layer
from fxprune.geometry import LayerGeometry


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(64, 96, 3, stride=2, padding=(1, 2)), (1, 64, 20, 17)),
        (nn.Conv2d(64, 64, (1, 3), padding="same", bias=False), (1, 64, 12, 12)),
        (nn.Conv2d(64, 64, 3, groups=64, dilation=2), (1, 64, 24, 24)),
        (nn.Conv2d(64, 32, 3, groups=4), (1, 64, 9, 9)),
        (nn.Conv1d(64, 32, 5, padding=2), (1, 64, 50)),
        (nn.Conv3d(16, 32, 3, padding=1), (1, 16, 5, 6, 7)),
        (nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1), (1, 64, 9, 9)),
        (nn.Linear(300, 200), (1, 7, 300)),
    ],
    ids=str,
)
def test_every_kind_of_layer_is_timed_at_every_number_of_channels(module: nn.Module, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        module(torch.zeros(shape))
    geometry = LayerGeometry.of(module)
    read, given = geometry.in_channels, geometry.out_channels
    if geometry.groups > 1:
        channels = [(read, given), (read, given // 2)]
    else:
        channels = [(read, given), (read // 2, given), (read, given // 4), (3, 5)]
    times = measure_layer(geometry, shape, channels, runs=8)
    assert len(times) == len(channels)
    assert all(time > 0 for time in times)


def test_fewer_channels_take_less_time() -> None:
    """By far, so that no busy machine makes it fail."""
    geometry = LayerGeometry.of(nn.Conv2d(256, 256, 3, padding=1))
    whole, less_read, less_given = measure_layer(geometry, (1, 256, 14, 14), [(256, 256), (16, 256), (256, 16)], runs=9)
    assert less_read < 0.5 * whole
    assert less_given < 0.5 * whole
