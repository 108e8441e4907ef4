"""Exact OBS against a greedy search that inverts the Hessian of what is left anew at every step."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fxprune.pattern import NMPattern, Pattern
from fxprune.solvers import LayerProblem, exact_obs, sparsegpt


def least_squares(problem: LayerProblem, row: int, support: list[int]) -> Tensor:
    return problem.target[row, support] @ torch.linalg.inv(problem.hessian[support][:, support])


def naive_order(problem: LayerProblem, row: int, pattern: NMPattern | None) -> list[tuple[int, float]]:
    """The weights of a row in the order in which they go, with the error that each one adds."""
    left, gone = list(range(problem.hessian.shape[0])), []
    while True:
        if pattern is None:
            free = left
        else:
            free = [j for j in left if sum(k // pattern.m == j // pattern.m for k in left) > pattern.n]
        if not free:
            return gone
        inverse = torch.linalg.inv(problem.hessian[left][:, left])
        weight = problem.target[row, left] @ inverse
        cost = {j: float(weight[i] ** 2 / inverse[i, i]) for i, j in enumerate(left) if j in free}
        worst = min(cost, key=lambda j: cost[j])
        left.remove(worst)
        gone.append((worst, cost[worst]))


def on_support(problem: LayerProblem, kept: list[list[int]]) -> Tensor:
    weight = torch.zeros_like(problem.target)
    for row, support in enumerate(kept):
        if support:
            weight[row, support] = least_squares(problem, row, support)
    return weight


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("text", "columns"), [("1:2", 4), ("2:4", 20), ("1:4", 12), ("4:8", 16), ("3:5", 15)])
def test_nm_equals_the_naive_search(make_case, text, columns, rows):
    problem, pattern = make_case(rows, columns, correlation=0.5).problem.damped(0.01), Pattern.parse(text)
    gone = [[j for j, _ in naive_order(problem, row, pattern)] for row in range(rows)]
    expected = on_support(problem, [[j for j in range(columns) if j not in g] for g in gone])
    found = exact_obs(problem, pattern)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert torch.equal(found != 0, pattern.mask((found != 0).double()))


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (6, 12)])
def test_unstructured_equals_the_naive_search(make_case, rows, columns, sparsity):
    """Every row is pruned to the end; over all rows, those weights go whose row had lost least up to them."""
    problem, pattern = make_case(rows, columns, correlation=0.5).problem.damped(0.01), Pattern.parse(sparsity)
    ranked = []
    for row in range(rows):
        worst = 0.0
        for step, (j, cost) in enumerate(naive_order(problem, row, None)):
            worst = max(worst, cost)
            ranked.append((worst, step, row, j))
    gone = {(row, j) for _, _, row, j in sorted(ranked)[: rows * columns - pattern.kept(rows * columns)]}
    expected = on_support(problem, [[j for j in range(columns) if (row, j) not in gone] for row in range(rows)])
    torch.testing.assert_close(exact_obs(problem, pattern), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_rows_in_chunks_give_the_same(make_case, monkeypatch, pattern):
    problem, pattern = make_case(7, 16, correlation=0.5).problem.damped(0.01), Pattern.parse(pattern)
    whole = exact_obs(problem, pattern)
    monkeypatch.setattr(importlib.import_module("fxprune.solvers.exact_obs"), "CHUNK_BYTES", 3 * 16 * 16 * 8)
    torch.testing.assert_close(exact_obs(problem, pattern), whole, rtol=1e-12, atol=1e-12)


def test_greedy_beats_sparsegpt(make_case):
    problem, pattern = make_case(16, 32, correlation=0.6, own_output=True).problem.damped(0.01), Pattern.parse("2:4")
    assert problem.loss(exact_obs(problem, pattern)) < problem.loss(sparsegpt(problem, pattern))


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_dead_inputs_and_few_samples(make_case, pattern):
    case = make_case(6, 16, samples=5)
    case.inputs[3] = 0
    found = exact_obs(case.problem.damped(0.0), Pattern.parse(pattern))
    assert torch.isfinite(found).all()
    assert Pattern.parse(pattern).check(found).ok
