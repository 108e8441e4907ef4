from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import SolverError
from fxprune.geometry import LayerGeometry, flatten_weight
from fxprune.solvers import LayerProblem
from fxprune.solvers.low_rank import plain_factors
from fxprune.solvers.spatial_split import (
    arranged,
    data_aware_spatial_factors,
    plain_spatial_factors,
    refit_second_kernel,
    spatial_errors,
    whitened_arrangement,
)

CHANNELS, OUTPUTS, KERNEL = 3, 5, (3, 2)
COLUMNS = CHANNELS * KERNEL[0] * KERNEL[1]


def images() -> Tensor:
    """Smooth images, so that neighbouring columns of a patch are correlated."""
    noise = torch.randn(6, CHANNELS, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.avg_pool2d(noise, 3, 1) * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1)


def problem_of(noise: float = 0.1) -> LayerProblem:
    patches = LayerGeometry(CHANNELS, OUTPUTS, KERNEL, (1, 1), ((0, 0), (0, 0)), (1, 1)).patches(images())[0].T
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUTPUTS, COLUMNS, generator=generator, dtype=torch.float64)
    y = weight @ patches + noise * torch.randn(OUTPUTS, patches.shape[1], generator=generator, dtype=torch.float64)
    return LayerProblem(patches @ patches.T, y @ patches.T, weight).damped(1e-4)


def features(first: Tensor) -> Tensor:
    """Naive B (kx r, D): what the channels between the two kernels see of a patch, written out."""
    ky, kx = KERNEL
    rank = len(first)
    b = torch.zeros(kx, rank, ky, kx, CHANNELS, dtype=torch.float64)
    for x in range(kx):
        b[x, :, :, x] = first
    return b.reshape(kx * rank, COLUMNS)


def test_the_product_is_what_two_convolutions_compute() -> None:
    weight = torch.randn(OUTPUTS, CHANNELS, *KERNEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factors = plain_spatial_factors(flatten_weight(weight), KERNEL, 4)
    down = factors.first.movedim(-1, 1)[..., None]  # (r, C, ky, 1)
    across = factors.second.movedim(-1, 1)[:, :, None]  # (R, r, 1, kx)
    product = factors.product.reshape(OUTPUTS, *KERNEL, CHANNELS).movedim(-1, 1)
    x = images()
    torch.testing.assert_close(F.conv2d(F.conv2d(x, down), across), F.conv2d(x, product))


def test_plain_factors_are_the_svd_of_the_arranged_weight() -> None:
    weight = torch.randn(OUTPUTS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = arranged(weight, KERNEL)
    assert matrix.shape == (9, 10)
    assert matrix[1 * CHANNELS + 2, 1 * OUTPUTS + 4] == weight.reshape(OUTPUTS, *KERNEL, CHANNELS)[4, 1, 1, 2]
    for rank in (1, 4, 9):
        product = plain_spatial_factors(weight, KERNEL, rank).product
        torch.testing.assert_close(arranged(product, KERNEL), plain_factors(matrix, rank).product)


def test_second_kernel_is_least_squares() -> None:
    problem = problem_of()
    first = plain_spatial_factors(problem.weight, KERNEL, 4).first
    b = features(first)
    wanted = torch.linalg.solve(b @ problem.hessian @ b.T, b @ problem.target.T).T
    found = refit_second_kernel(problem, KERNEL, first)
    torch.testing.assert_close(found.reshape(OUTPUTS, -1), wanted, rtol=1e-6, atol=1e-8)


def test_rounds_lower_the_error_to_a_point_where_neither_kernel_can_be_improved() -> None:
    problem = problem_of()
    losses = [float(problem.loss(data_aware_spatial_factors(problem, KERNEL, 4, rounds=n).product)) for n in range(8)]
    assert all(after <= before + 1e-9 for before, after in pairwise(losses))
    assert losses[1] < losses[0]
    factors = data_aware_spatial_factors(problem, KERNEL, 4, rounds=300)
    first, second = factors.first.clone().requires_grad_(), factors.second.clone().requires_grad_()
    problem.loss(torch.einsum("oxr,ryc->oyxc", second, first).flatten(1)).backward()
    scale = problem.target.norm() * factors.first.norm()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.norm() < 1e-4 * scale
    assert second.grad.norm() < 1e-4 * scale


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_data_aware_beats_plain_with_its_second_kernel_refitted(rank: int) -> None:
    problem = problem_of()
    plain = plain_spatial_factors(problem.weight, KERNEL, rank)
    refitted = torch.einsum("oxr,ryc->oyxc", refit_second_kernel(problem, KERNEL, plain.first), plain.first).flatten(1)
    data_aware = data_aware_spatial_factors(problem, KERNEL, rank).product
    assert problem.loss(data_aware) < problem.loss(refitted) < problem.loss(plain.product)


def test_full_rank_reproduces_the_optimum() -> None:
    problem = problem_of()
    product = data_aware_spatial_factors(problem, KERNEL, 9).product
    torch.testing.assert_close(product, problem.optimum(), rtol=1e-5, atol=1e-6)


def test_expected_errors_are_those_of_no_rounds() -> None:
    problem = problem_of()
    optimum = problem.optimum()
    least, explained = problem.loss(optimum), (optimum * problem.target).sum()
    ranks = [1, 3, 5, 9]
    for rank, error in zip(ranks, spatial_errors(problem, KERNEL, ranks).tolist(), strict=True):
        loss = problem.loss(data_aware_spatial_factors(problem, KERNEL, rank, rounds=0).product)
        assert error == pytest.approx(float((loss - least) / explained), abs=1e-7)


def test_uncorrelated_columns_make_the_start_the_best() -> None:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    own = mixing @ mixing.T + torch.eye(9, dtype=torch.float64)
    hessian = torch.zeros(3, 2, CHANNELS, 3, 2, CHANNELS, dtype=torch.float64)
    for x in range(2):
        hessian[:, x, :, :, x] = own.reshape(3, CHANNELS, 3, CHANNELS)
    hessian = hessian.reshape(COLUMNS, COLUMNS)
    weight = torch.randn(OUTPUTS, COLUMNS, generator=generator, dtype=torch.float64)
    problem = LayerProblem(hessian, weight @ hessian, weight)
    factors = data_aware_spatial_factors(problem, KERNEL, 3)
    error = problem.loss(factors.product) - problem.loss(weight)
    torch.testing.assert_close(error, factors.spectrum[3:].square().sum())
    torch.testing.assert_close(torch.linalg.svdvals(whitened_arrangement(problem, KERNEL)), factors.spectrum)


def test_zeros_and_ranks_out_of_range() -> None:
    problem = problem_of()
    zero = LayerProblem(problem.hessian, torch.zeros_like(problem.target), torch.zeros_like(problem.weight))
    assert not data_aware_spatial_factors(zero, KERNEL, 2).product.any()
    assert not spatial_errors(zero, KERNEL, [1, 2]).any()
    with pytest.raises(SolverError, match="from 1 to 9"):
        plain_spatial_factors(problem.weight, KERNEL, 10)
