"""ADMM with a refit: on the pattern exactly, and at least as good as the greedy search on the same statistics."""

from __future__ import annotations

import sys

import pytest
import torch

from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem, admm, exact_obs, refit

module = sys.modules[admm.__module__]


def solve(problem: LayerProblem, pattern: Pattern, rho: float = 0.1) -> torch.Tensor:
    sparse = admm(problem, pattern, rho=rho)
    return refit(problem, sparse != 0, start=sparse)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    ("text", "columns"), [("1:2", 4), ("2:4", 40), ("1:4", 12), ("4:8", 24), ("3:5", 35), ("0.5", 3), ("0.9", 30)]
)
def test_the_pattern_holds_exactly(make_case, text, columns, rows):
    problem, pattern = make_case(rows, columns, correlation=0.4).problem.damped(0.01), Pattern.parse(text)
    found = admm(problem, pattern)
    assert found.shape == problem.weight.shape
    assert torch.isfinite(found).all()
    assert int((found != 0).sum()) == pattern.kept(found.numel())
    assert pattern.check(found).ok


@pytest.mark.parametrize(("correlation", "rho"), [(0.0, 0.1), (0.5, 0.1), (0.8, 0.01)])
@pytest.mark.parametrize("own_output", [True, False])
@pytest.mark.parametrize(("text", "times"), [("2:4", 1.0), ("1:4", 1.0), ("0.7", 1.02)])
def test_not_worse_than_exact_obs(make_case, text, times, own_output, correlation, rho):
    """Summed over six problems: on a single small one the greedy search may be lucky. Strong correlation needs a small rho."""
    pattern, errors = Pattern.parse(text), []
    for seed in range(6):
        case = make_case(16, 32, correlation=correlation, own_output=own_output, seed=seed)
        problem = case.problem.damped(0.01)
        none_lost = problem.loss(problem.optimum())
        found = (solve(problem, pattern, rho=rho), exact_obs(problem, pattern))
        errors.append([float(problem.loss(weight) - none_lost) for weight in found])
    admm_error, greedy_error = map(sum, zip(*errors, strict=True))
    assert admm_error <= times * greedy_error


def test_finds_weights_that_are_on_the_pattern_already(make_case):
    pattern = Pattern.parse("2:4")
    case = make_case(8, 24, correlation=0.5)
    wanted = pattern.project(case.weight)
    problem = LayerProblem(case.problem.hessian, wanted @ case.problem.hessian, wanted).damped(0.01)
    torch.testing.assert_close(solve(problem, pattern), wanted)


def test_scale_of_the_inputs_does_not_matter(make_case):
    """Inputs in other units give the same outputs: the mask is the same and the weights are scaled back."""
    case, pattern = make_case(8, 24, correlation=0.5), Pattern.parse("2:4")
    units = torch.logspace(-2, 2, 24, dtype=torch.float64)
    problem = case.problem
    other = LayerProblem(problem.hessian * units[:, None] * units, problem.target * units, problem.weight / units)
    torch.testing.assert_close(solve(other, pattern) * units, solve(problem, pattern), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_dead_inputs_and_few_samples(make_case, pattern):
    case = make_case(6, 16, samples=5)
    case.inputs[3] = 0
    for damping in (0.0, 0.01):
        found = solve(case.problem.damped(damping), Pattern.parse(pattern))
        assert torch.isfinite(found).all()
        assert Pattern.parse(pattern).check(found).ok


@pytest.mark.parametrize("text", ["2:4", "1:4", "0.7"])
def test_the_large_schedule_costs_a_few_percent(make_case, monkeypatch, text):
    """Few values of rho, factored in float32: on the pattern, and nearly as good, summed over six problems."""
    pattern, errors = Pattern.parse(text), []
    for seed in range(6):
        problem = make_case(16, 48, correlation=0.5, seed=seed).problem.damped(0.01)
        none_lost = problem.loss(problem.optimum())
        small = solve(problem, pattern)
        with monkeypatch.context() as patch:
            patch.setattr(module, "LARGE_WORK", 0)
            large = solve(problem, pattern)
        assert pattern.check(large).ok
        errors.append([float(problem.loss(weight) - none_lost) for weight in (small, large)])
    small_error, large_error = map(sum, zip(*errors, strict=True))
    assert large_error <= 1.05 * small_error


def test_both_ways_to_solve_agree(make_case):
    case = make_case(5, 30, correlation=0.5)
    hessian, weight = case.problem.damped(0.01).hessian, case.weight.float()
    factored, decomposed = module._by_factorisation(hessian.float()), module._by_eigenvectors(hessian)
    for rho in (0.1, 0.1, 2.0, 0.1, 0.0):
        torch.testing.assert_close(factored(weight, rho), decomposed(weight, rho), rtol=1e-3, atol=1e-5)
