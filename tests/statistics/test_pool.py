"""Small batches are joined, large ones passed on, and none is lost or seen twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.geometry import LayerGeometry
from fxprune.statistics import Pool
from fxprune.statistics import pool as module

GEOMETRY = LayerGeometry(5, 5)


@pytest.fixture
def handed() -> list[tuple[Tensor, ...]]:
    return []


@pytest.fixture
def pool(handed, monkeypatch) -> Pool:
    monkeypatch.setattr(module, "POOL_NUMBERS", 60)
    return Pool(lambda geometry, *tensors: handed.append(tensors))


def test_small_batches_are_joined_in_order(pool, handed):
    batches = [(torch.randn(n, 5), torch.randn(n, 2, 3)) for n in (3, 1, 6, 2, 4)]
    for batch in batches:
        pool.put(GEOMETRY, *batch)
    assert [len(x) for x, _ in handed] == [10]  # Room for sixty numbers of the larger tensor.
    assert all(t.numel() <= 60 for t in pool._waiting)
    pool.flush()
    for i in range(2):
        assert torch.equal(torch.cat([t[i] for t in handed]), torch.cat([b[i] for b in batches]))


def test_a_large_batch_is_passed_on_as_it_is(pool, handed):
    x = torch.randn(12, 5)
    pool.put(GEOMETRY, x)
    assert handed[0][0] is x


@pytest.mark.parametrize("other", [torch.randn(2, 4), torch.randn(2, 5, dtype=torch.float64)])
def test_batches_that_cannot_be_joined_are_kept_apart(pool, handed, other):
    pool.put(GEOMETRY, torch.randn(2, 5))
    pool.put(GEOMETRY, other)
    pool.flush()
    assert [t.shape for (t,) in handed] == [(2, 5), other.shape]
    assert handed[1][0].dtype == other.dtype


def test_what_waits_is_a_copy(pool, handed):
    x = torch.ones(2, 5)
    pool.put(GEOMETRY, x)
    x.zero_()
    pool.flush()
    assert handed[0][0].sum() == 10


def test_an_empty_pool_has_nothing_to_hand_on(pool, handed):
    pool.flush()
    pool.put(GEOMETRY, torch.ones(1, 5))
    pool.flush()
    pool.flush()
    assert len(handed) == 1


def test_channels_stay_last(pool, handed):
    for _ in range(2):
        pool.put(GEOMETRY, torch.randn(2, 3, 4, 2).contiguous(memory_format=torch.channels_last)[::2])
    pool.flush()
    assert handed[0][0].is_contiguous(memory_format=torch.channels_last)
