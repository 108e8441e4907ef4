"""A sum that gathers in the batches' dtype and settles in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.geometry import LayerGeometry
from fxprune.statistics import running_sum
from fxprune.statistics.products import GramAccumulator
from fxprune.statistics.running_sum import RunningSum


def add(sums: RunningSum, value: float, positions: int = 1, dtype: torch.dtype = torch.float32) -> None:
    sums.buffer((2,), torch.zeros(1, dtype=dtype)).add_(value)
    sums.added(positions)


def test_nothing_yet():
    assert RunningSum().total() is None
    assert RunningSum().parts() == []


def test_small_batches_are_not_lost_beside_a_large_sum(monkeypatch):
    monkeypatch.setattr(running_sum, "SETTLE_AFTER", 2)
    sums = RunningSum()
    add(sums, 2.0**24, positions=2)
    for _ in range(5):
        add(sums, 1.0)  # In float32, 2^24 + 1 is 2^24.
    assert sums.total().tolist() == [2.0**24 + 5] * 2
    assert sums.total().dtype == torch.float64


def test_it_gathers_in_the_batches_dtype_until_it_settles(monkeypatch):
    monkeypatch.setattr(running_sum, "SETTLE_AFTER", 10)
    sums = RunningSum()
    add(sums, 1.0, positions=9)
    assert [part.dtype for part in sums.parts()] == [torch.float32]
    add(sums, 1.0, positions=1)
    assert [part.dtype for part in sums.parts()] == [torch.float64]
    add(sums, 1.0)
    assert [part.dtype for part in sums.parts()] == [torch.float32, torch.float64]
    assert float(sum(sums.parts())[0]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_was_handed_out_does_not_change(dtype):
    sums = RunningSum()
    add(sums, 1.0, dtype=dtype)
    first = sums.total()
    add(sums, 1.0, dtype=dtype)
    assert first.tolist() == [1, 1]
    assert sums.total().tolist() == [2, 2]


def test_batches_of_another_dtype():
    sums = RunningSum()
    add(sums, 1.0)
    add(sums, 1e-12, dtype=torch.float64)
    assert sums.total().tolist() == [1 + 1e-12] * 2


@pytest.mark.parametrize("layer", [nn.Conv2d(24, 4, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2), nn.Linear(6, 2)])
def test_settled_and_recent_batches_make_up_the_gram(monkeypatch, layer):
    """Also for channels that do not fill the last strip of rows, and more columns than one stripe of the mirror."""
    monkeypatch.setattr("fxprune.statistics.autocorrelation.ROWS_ELEMENTS", 45 * 24 * 7)
    monkeypatch.setattr("fxprune.statistics.autocorrelation.MIRROR_ROWS", 50)
    geometry = LayerGeometry.of(layer)
    shape = (5, geometry.in_channels, 9, 8) if geometry.kernel_size else (5, 30, 6)
    batches = list(torch.randn(6, *shape, dtype=torch.float64))
    accumulator = GramAccumulator(geometry)
    monkeypatch.setattr(running_sum, "SETTLE_AFTER", 2 * batches[0].numel() // geometry.in_channels)
    for x in batches[:5]:
        accumulator.add(x)
    patches = geometry.patches(torch.cat(batches[:5]))
    torch.testing.assert_close(accumulator.total(), patches.mT @ patches, rtol=1e-12, atol=1e-10)
    accumulator.add(batches[5])
    patches = geometry.patches(torch.cat(batches))
    torch.testing.assert_close(accumulator.total(), patches.mT @ patches, rtol=1e-12, atol=1e-10)
