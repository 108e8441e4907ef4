"""ADMM with a refit: on the pattern exactly, and at least as good as the greedy search on the same statistics."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem, admm, exact_obs, refit, shifted_systems
from fxprune.solvers.few_columns import LowRankSystems

module = sys.modules[admm.__module__]
admm_by_products = module.admm_by_products


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "0.7", "0.9"])
def test_the_large_schedule_costs_a_few_percent(make_case, monkeypatch, text, dtype):
    """A set number of inexact iterations: on the pattern, and nearly as good, summed over six problems."""
    pattern, errors = Pattern.parse(text), []
    monkeypatch.setattr(shifted_systems, "product_dtype", lambda device: dtype)
    for seed in range(6):
        problem = make_case(16, 48, correlation=0.5, seed=seed).problem.damped(0.01)
        none_lost = problem.loss(problem.optimum())
        sparse = admm_by_products(problem, pattern)
        assert pattern.check(sparse).ok
        large = refit(problem, sparse != 0, start=sparse)
        errors.append([float(problem.loss(weight) - none_lost) for weight in (solve(problem, pattern), large)])
    small_error, large_error = map(sum, zip(*errors, strict=True))
    assert large_error <= 1.05 * small_error


@pytest.mark.parametrize("size", [1e-60, 1e-4, 1e4, 1e60])
def test_large_problems_in_any_unit(make_case, size):
    """Activations in other units: nearly the same mask, which rounding may tip, and no more error."""
    case, pattern = make_case(8, 48, correlation=0.5), Pattern.parse("2:4")
    units = size * torch.logspace(-1, 1, 48, dtype=torch.float64)
    given = case.problem
    other = LayerProblem(given.hessian * units[:, None] * units, given.target * units, given.weight / units)
    found, expected = admm_by_products(other, pattern), admm_by_products(given, pattern)
    assert float(((found != 0) == (expected != 0)).double().mean()) > 0.95
    errors = [given.loss(refit(given, w != 0)) - given.loss(given.optimum()) for w in (found * units, expected)]
    torch.testing.assert_close(errors[0], errors[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("rank", [5, None])
@pytest.mark.parametrize("text", ["2:4", "0.9"])
def test_large_problems_of_few_patches_and_dead_inputs(make_case, text, rank):
    """With and without the rank being known, on the pattern, and nearly as good as exact iterations over six problems."""
    pattern, errors = Pattern.parse(text), []
    for seed in range(6):
        case = make_case(9, 64, samples=5, seed=seed)
        case.inputs[8:20] = 0
        problem = replace(case.problem, rank=rank).damped(0.1)
        none_lost = problem.loss(problem.optimum())
        found = admm_by_products(problem, pattern)
        assert torch.isfinite(found).all()
        assert pattern.check(found).ok
        assert isinstance(problem.factors["systems"], LowRankSystems) == (rank is not None)
        weights = (refit(problem, found != 0), solve(problem, pattern))
        errors.append([float(problem.loss(weight) - none_lost) for weight in weights])
    large_error, small_error = map(sum, zip(*errors, strict=True))
    assert large_error <= 1.05 * small_error


def test_layers_with_one_hessian_share_its_inverse(make_case):
    problem, pattern = make_case(8, 48).problem.damped(0.01), Pattern.parse("2:4")
    admm_by_products(problem, pattern)
    systems = problem.factors["systems"]
    admm_by_products(problem.rows(torch.arange(3)), pattern)
    assert problem.factors["systems"] is systems


def test_large_problems_take_products(make_case, monkeypatch):
    """The size of the problem decides, and the user's rho reaches both ways."""
    problem, pattern, seen = make_case(4, 24).problem.damped(0.01), Pattern.parse("2:4"), []
    monkeypatch.setattr(module, "admm_by_products", lambda problem, pattern, rho: seen.append(rho))
    admm(problem, pattern, rho=0.2)
    assert seen == []
    monkeypatch.setattr(module, "LARGE_WORK", 0)
    admm(problem, pattern, rho=0.2)
    assert seen == [0.2]
