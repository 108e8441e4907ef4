from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.errors import SolverError
from fxprune.solvers import LayerProblem
from fxprune.solvers.low_rank import (
    data_aware_factors,
    plain_factors,
    refit_second,
    solve_positive,
    tail_energy,
    whitened_target,
)

ROWS, COLUMNS = 6, 9


def problem_of(rows: int = ROWS, columns: int = COLUMNS, *, seed: int = 0) -> tuple[LayerProblem, Tensor, Tensor]:
    """A problem with correlated inputs X and a wanted output Y that no weight reproduces exactly, and X and Y."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(columns, 200, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    y = weight @ x + torch.randn(rows, 200, generator=generator, dtype=torch.float64)
    return LayerProblem(x @ x.T, y @ x.T, weight), x, y


def test_plain_factors_are_the_truncated_svd() -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, spectrum, right = torch.linalg.svd(weight, full_matrices=False)
    factors = plain_factors(weight, 3)
    assert factors.first.shape == (3, COLUMNS)
    assert factors.second.shape == (ROWS, 3)
    torch.testing.assert_close(factors.product, left[:, :3] @ spectrum[:3].diag() @ right[:3])
    torch.testing.assert_close(factors.spectrum, spectrum)


@pytest.mark.parametrize("rank", [1, 3, ROWS])
def test_data_aware_factors_leave_exactly_the_tail_of_the_whitened_spectrum(rank: int) -> None:
    problem, x, y = problem_of()
    factors = data_aware_factors(problem, rank)
    optimum = problem.optimum()
    least = (y - optimum @ x).square().sum()
    error = (y - factors.product @ x).square().sum()
    torch.testing.assert_close(error - least, factors.spectrum[rank:].square().sum(), rtol=1e-9, atol=1e-6)


def test_no_rank_two_weight_found_by_descent_is_better() -> None:
    problem, x, y = problem_of()
    best = (y - data_aware_factors(problem, 2).product @ x).square().sum()
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):  # Alternating least squares from random starts: a local search that knows nothing of SVD.
        first = torch.randn(2, COLUMNS, generator=generator, dtype=torch.float64)
        for _ in range(200):
            second = torch.linalg.lstsq((first @ x).T, y.T).solution.T
            first = torch.linalg.lstsq(second, y @ x.T @ torch.linalg.inv(x @ x.T)).solution
        assert (y - second @ first @ x).square().sum() >= best * (1 - 1e-12)


def test_data_aware_beats_plain_on_correlated_inputs() -> None:
    problem, _, _ = problem_of()
    for rank in range(1, ROWS):
        plain = problem.loss(plain_factors(problem.optimum(), rank).product)
        assert problem.loss(data_aware_factors(problem, rank).product) < plain


def test_white_inputs_make_both_the_same() -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    problem = LayerProblem(4 * torch.eye(COLUMNS, dtype=torch.float64), 4 * weight, weight)
    torch.testing.assert_close(data_aware_factors(problem, 2).product, plain_factors(weight, 2).product)
    torch.testing.assert_close(data_aware_factors(problem, 2).spectrum, 2 * plain_factors(weight, 2).spectrum)


def test_both_factors_have_the_same_size_for_each_channel_between() -> None:
    problem, _, _ = problem_of()
    for factors in (data_aware_factors(problem, 4), plain_factors(problem.optimum(), 4)):
        torch.testing.assert_close(factors.first.norm(dim=1), factors.second.norm(dim=0))


def test_more_rows_than_columns() -> None:
    problem, _, _ = problem_of(rows=12, columns=5)
    factors = data_aware_factors(problem, 5)
    torch.testing.assert_close(factors.product, problem.optimum())


def test_weights_of_zeros_and_of_lower_rank_than_asked_for() -> None:
    problem, _, _ = problem_of()
    zero = LayerProblem(problem.hessian, torch.zeros_like(problem.target), torch.zeros_like(problem.weight))
    assert torch.equal(data_aware_factors(zero, 2).product, zero.weight)
    assert torch.equal(plain_factors(zero.weight, 2).product, zero.weight)
    low = problem.weight[:, :1] @ problem.weight[:1]
    torch.testing.assert_close(plain_factors(low, 3).product, low)
    of_low = LayerProblem(problem.hessian, low @ problem.hessian, low)
    torch.testing.assert_close(data_aware_factors(of_low, 3).product, low)


@pytest.mark.parametrize("rank", [0, ROWS + 1])
def test_a_rank_out_of_range_is_an_error_that_names_the_range(rank: int) -> None:
    problem, _, _ = problem_of()
    with pytest.raises(SolverError, match=f"rank {rank} .* from 1 to {ROWS}"):
        data_aware_factors(problem, rank)
    with pytest.raises(SolverError, match=f"from 1 to {ROWS}"):
        plain_factors(problem.weight, rank)


def test_refit_second_is_least_squares_on_the_channels_between() -> None:
    problem, x, y = problem_of()
    first = plain_factors(problem.weight, 3).first
    wanted = torch.linalg.lstsq((first @ x).T, y.T).solution.T
    torch.testing.assert_close(refit_second(problem, first), wanted, rtol=1e-7, atol=1e-9)


def test_solve_positive_leaves_open_directions_at_zero() -> None:
    system = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    solved = solve_positive(system, torch.tensor([[4.0], [0.0]], dtype=torch.float64))
    torch.testing.assert_close(solved, torch.tensor([[2.0], [0.0]], dtype=torch.float64))
    assert not solve_positive(torch.zeros(2, 2), torch.zeros(2, 1)).any()
    with pytest.raises(SolverError, match="damping"):
        solve_positive(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2, 1))


def test_tail_energy() -> None:
    left = tail_energy(torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(left, torch.tensor([1.0, 2 / 6, 1 / 6, 0.0], dtype=torch.float64))
    assert not tail_energy(torch.zeros(2)).any()


def test_whitened_target_holds_what_the_optimum_explains() -> None:
    problem, x, _ = problem_of()
    explained = (problem.optimum() @ x).square().sum()
    torch.testing.assert_close(whitened_target(problem).square().sum(), explained)
