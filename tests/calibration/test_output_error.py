"""The error of a layer's output against the plain formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.calibration.output_error import OutputError


def reference(dense: Tensor, pruned: Tensor, dim: int) -> float:
    dense, pruned = (value.double().movedim(dim, 0).flatten(1) for value in (dense, pruned))
    return float((dense - pruned).square().sum() / (dense - dense.mean(1, keepdim=True)).square().sum())


def measured(dense: Tensor, pruned: Tensor, dim: int, sizes: int | list[int] = 7) -> float:
    error = OutputError(dim)
    for wanted, found in zip(dense.split(sizes), pruned.split(sizes), strict=True):
        error.update(wanted, found)
    return error.relative


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, 1e4])
@pytest.mark.parametrize(("shape", "dim"), [((30, 5, 6, 7), -3), ((30, 5), -1), ((30, 9, 5), -1), ((30, 5, 11), -2)])
def test_the_mean_does_not_matter(shape, dim, mean):
    torch.manual_seed(0)
    means = mean * (1 + torch.rand(5))
    dense = torch.randn(shape) + means.reshape(-1, *[1] * (-1 - dim))
    pruned = dense + 0.1 * torch.randn(shape)
    assert measured(dense, pruned, dim) == pytest.approx(reference(dense, pruned, dim), rel=1e-3)


def test_a_first_batch_unlike_the_others():
    torch.manual_seed(0)
    dense = torch.randn(30, 5) + 1000
    dense[:3] = 0
    pruned = dense + 0.1 * torch.randn(30, 5)
    assert measured(dense, pruned, -1, 3) == pytest.approx(reference(dense, pruned, -1), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_the_size_does_not_matter(scale, mean):
    torch.manual_seed(0)
    dense = (torch.randn(30, 5, 6, 7) + mean) * scale
    pruned = dense + 0.1 * scale * torch.randn(30, 5, 6, 7)
    assert measured(dense, pruned, -3) == pytest.approx(reference(dense, pruned, -3), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    dense = (300 * torch.randn(30, 5, 20, 20)).to(dtype)  # The squares are beyond half precision's range.
    pruned = (dense + 30 * torch.randn(30, 5, 20, 20)).to(dtype)
    assert measured(dense, pruned, -3) == pytest.approx(reference(dense, pruned, -3), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 600.0])
def test_a_constant_output_is_reproduced_or_not(value):
    dense = torch.full((30, 5), value)
    assert measured(dense, dense.clone(), -1) == 0
    assert measured(dense, dense + 0.1, -1) == 1


def test_batches_of_no_images_change_nothing():
    torch.manual_seed(0)
    dense, pruned = torch.randn(30, 5), torch.randn(30, 5)
    assert measured(dense, pruned, -1, [0, 10, 0, 20]) == pytest.approx(reference(dense, pruned, -1))
    assert measured(dense[:0], pruned[:0], -1) == 0
