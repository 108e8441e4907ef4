"""Refit against torch.linalg.lstsq on each row's own columns."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem, refit
from fxprune.solvers.few_columns import LowRankSystems
from fxprune.solvers.refit import refit_by_cholesky
from fxprune.solvers.shifted_systems import unit_diagonal

module = importlib.import_module("fxprune.solvers.refit")  # fxprune.solvers.refit itself is the function.


def least_squares(inputs: Tensor, outputs: Tensor, mask: Tensor) -> Tensor:
    weight = torch.zeros(mask.shape, dtype=inputs.dtype)
    for row, kept in enumerate(mask):
        if kept.any():
            weight[row, kept] = torch.linalg.lstsq(inputs[kept].mT, outputs[row, :, None]).solution[:, 0]
    return weight


def by_conjugate_gradients(
    problem: LayerProblem, mask: Tensor, *, start: Tensor | None = None, tolerance: float = module.CG_TOLERANCE
) -> Tensor:
    """In float64, with inputs of unit variance."""
    scale = problem.hessian.diagonal().sqrt()
    hessian, start = unit_diagonal(problem.hessian), None if start is None else start * scale
    target = problem.target / scale
    found = module.refit_by_conjugate_gradients(lambda x: x @ hessian, target, mask, start=start, tolerance=tolerance)
    return found / scale


def masks(columns: int) -> dict[str, Tensor]:
    """Six rows each: N:M, supports of every size from none to all, and all alike."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(6, columns, generator=generator)
    sizes = [0, 1, columns // 2, columns - 1, columns, 0]
    largest = scores.sort(descending=True).values
    uneven = torch.stack([scores[row] > (largest[row, n] if n < columns else -1) for row, n in enumerate(sizes)])
    return {"2:4": Pattern.parse("2:4").mask(scores), "uneven": uneven, "all": scores > -1, "none": scores > 2}


@pytest.mark.parametrize("kind", ["2:4", "uneven", "all", "none"])
@pytest.mark.parametrize("columns", [4, 24, 40])
def test_equals_lstsq_on_the_support(make_case, columns, kind):
    case, mask = make_case(6, columns, correlation=0.3), masks(columns)[kind]
    expected = least_squares(case.inputs, case.outputs, mask)
    for solve in (refit, refit_by_cholesky):
        found = solve(case.problem, mask)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        assert not found[~mask].any()
    for start in (None, case.weight, expected):
        found = by_conjugate_gradients(case.problem, mask, start=start, tolerance=1e-5)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        assert not found[~mask].any()


@pytest.mark.parametrize("kind", ["2:4", "uneven"])
def test_a_row_does_not_depend_on_the_others(make_case, kind):
    """They stop one by one, and those that are left go on by themselves."""
    case, mask = make_case(6, 40, correlation=0.3), masks(40)[kind]
    found = by_conjugate_gradients(case.problem, mask, start=case.weight)
    for row in range(len(mask)):
        alone = torch.tensor([row])
        only = by_conjugate_gradients(case.problem.rows(alone), mask[alone], start=case.weight[alone])
        torch.testing.assert_close(only, found[alone], rtol=1e-9, atol=1e-12)


def test_chunks_give_the_same(make_case, monkeypatch):
    case, mask = make_case(6, 24), masks(24)["uneven"]
    whole = refit_by_cholesky(case.problem, mask)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    torch.testing.assert_close(refit_by_cholesky(case.problem, mask), whole, rtol=1e-12, atol=1e-12)


def test_large_supports_go_to_conjugate_gradients(make_case, monkeypatch):
    case = make_case(3, 24)
    mask = masks(24)["2:4"][:3]
    exact = refit(case.problem, mask)
    monkeypatch.setattr(module, "CG_COST", 0)
    found = refit(case.problem, mask, start=case.weight)
    assert not torch.equal(found, exact)
    optimum = case.problem.loss(case.problem.optimum())
    excess = (case.problem.loss(found) - optimum) / (case.problem.loss(exact) - optimum) - 1
    assert 0 <= excess < 1e-3
    assert found.dtype is torch.float64


def test_conjugate_gradients_stop_at_the_solution(make_case, monkeypatch):
    """From the solution itself no iteration is needed; from afar, one is not enough: the iterations do the work."""
    case, mask = make_case(6, 24, correlation=0.6), masks(24)["2:4"]
    expected = least_squares(case.inputs, case.outputs, mask)
    monkeypatch.setattr(module, "CG_ITERATIONS", 1)
    torch.testing.assert_close(by_conjugate_gradients(case.problem, mask, start=expected), expected)
    far = by_conjugate_gradients(case.problem, mask)
    assert (far - expected).abs().max() > 1e-2


def test_refit_is_never_worse_than_the_solver(make_case):
    case = make_case(8, 24, correlation=0.5)
    weight = Pattern.parse("2:4").project(case.weight)
    better = refit(case.problem, weight != 0, start=weight)
    assert case.problem.loss(better) < case.problem.loss(weight)


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_the_size_of_the_inputs_does_not_matter(make_case, monkeypatch, size):
    """Conjugate gradients run in float32, whose range H need not fit."""
    monkeypatch.setattr(module, "CG_COST", 0)
    case, mask = make_case(6, 24), masks(24)["2:4"]
    problem = case.problem
    scaled = LayerProblem(size * problem.hessian, size * problem.target, problem.weight)
    torch.testing.assert_close(refit(scaled, mask), refit(problem, mask), rtol=1e-3, atol=1e-4)


def test_the_low_rank_form_serves_the_refit(make_case, monkeypatch):
    monkeypatch.setattr(module, "CG_COST", 0)
    case, mask = make_case(6, 24, samples=3), masks(24)["2:4"]
    problem = replace(case.problem, rank=3).damped(0.1)
    expected = refit(replace(problem, rank=None, factors={}), mask)
    assert "float32" not in problem.factors
    torch.testing.assert_close(problem.loss(refit(problem, mask)), problem.loss(expected), rtol=1e-4, atol=0)
    assert isinstance(problem.low_rank, LowRankSystems)
    assert "float32" not in problem.factors  # The Hessian itself was not read.
