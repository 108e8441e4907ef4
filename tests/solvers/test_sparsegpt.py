"""SparseGPT against algorithm 1 of the paper written out: one row and one column at a time, explicit inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.pattern import NMPattern, Pattern, UnstructuredPattern
from fxprune.solvers import LayerProblem, sparsegpt
from fxprune.solvers.sparsegpt import inverse_factor


def naive(problem: LayerProblem, pattern: Pattern, block_size: int) -> Tensor:
    weight = problem.target @ torch.linalg.inv(problem.hessian)
    rows, columns = weight.shape
    # The inverse over the columns from j on, by Gaussian elimination of one column after another.
    inverses = [torch.linalg.inv(problem.hessian)]
    for _ in range(columns - 1):
        last = inverses[-1]
        inverses.append((last - torch.outer(last[:, 0], last[0]) / last[0, 0])[1:, 1:])
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if isinstance(pattern, NMPattern) and j % pattern.m == 0:
            for row in range(rows):
                group = range(j, j + pattern.m)
                order = sorted(group, key=lambda k: float(weight[row, k] ** 2 / inverses[k][0, 0]))
                keep[row, order[: pattern.m - pattern.n]] = False
        if isinstance(pattern, UnstructuredPattern) and j % block_size == 0:
            block = range(j, min(j + block_size, columns))
            scored = [(float(weight[r, k] ** 2 / inverses[k][0, 0]), r, k) for r in range(rows) for k in block]
            stay = pattern.kept(rows * (block[-1] + 1)) - pattern.kept(rows * j)
            for _, row, k in sorted(scored)[: len(scored) - stay]:
                keep[row, k] = False
        for row in range(rows):
            if not keep[row, j]:
                weight[row, j:] -= weight[row, j] / inverses[j][0, 0] * inverses[j][0]
                weight[row, j] = 0
    return weight


@pytest.mark.parametrize("block_size", [1, 5, 8, 128])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("text", "columns"), [("1:2", 4), ("2:4", 40), ("1:4", 12), ("4:8", 24), ("3:5", 35)])
def test_nm_equals_the_naive_algorithm(make_case, text, columns, rows, block_size):
    problem, pattern = make_case(rows, columns, correlation=0.5).problem.damped(0.01), Pattern.parse(text)
    found = sparsegpt(problem, pattern, block_size=block_size)
    torch.testing.assert_close(found, naive(problem, pattern, block_size), rtol=1e-9, atol=1e-9)
    assert pattern.check(found).ok
    assert torch.equal(found != 0, pattern.mask((found != 0).double()))  # Exactly N of M, and zeros that are zero.


@pytest.mark.parametrize("block_size", [1, 4, 7, 128])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (4, 17), (9, 30)])
def test_unstructured_equals_the_naive_algorithm(make_case, rows, columns, sparsity, block_size):
    problem, pattern = make_case(rows, columns, correlation=0.5).problem.damped(0.01), Pattern.parse(sparsity)
    found = sparsegpt(problem, pattern, block_size=block_size)
    torch.testing.assert_close(found, naive(problem, pattern, block_size), rtol=1e-9, atol=1e-9)
    assert int((found != 0).sum()) == pattern.kept(rows * columns)


def test_compensation_lowers_the_error(make_case):
    """The same mask with the dense weights is worse: the test would not notice if nothing were compensated otherwise."""
    problem, pattern = make_case(8, 24, correlation=0.6, own_output=True).problem.damped(0.01), Pattern.parse("2:4")
    found = sparsegpt(problem, pattern)
    assert problem.loss(found) < problem.loss(problem.weight * (found != 0))


def test_inverse_factor(make_case):
    hessian = make_case(1, 9).problem.hessian
    upper = inverse_factor(hessian)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.mT @ upper, torch.linalg.inv(hessian))


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_dead_inputs_and_few_samples(make_case, pattern):
    case = make_case(6, 16, samples=5)
    case.inputs[3] = 0
    found = sparsegpt(case.problem.damped(0.0), Pattern.parse(pattern))
    assert torch.isfinite(found).all()
    assert Pattern.parse(pattern).check(found).ok
