from __future__ import annotations

import pytest
import torch

from fxprune.constraints.mask import sparse_matrix
from fxprune.pattern import Pattern
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit
from tests.pipelines import method_of


def few_samples(seed: int, rows: int = 4, columns: int = 8, samples: int = 3) -> LayerProblem:
    """One group whose inputs span fewer directions than it has columns: solvers find worse masks than magnitude's there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, rows, columns, generator=generator, dtype=torch.float64)
    hessian = (x.mT @ x)[None]
    return LayerProblem(hessian, weight @ hessian, weight).damped(0.01)


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.75"])
@pytest.mark.parametrize("solver", ["admm", "sparsegpt", "exact_obs"])
def test_no_method_is_worse_than_magnitude_on_its_own_statistics(solver: str, pattern: str) -> None:
    method, parsed = method_of(solver, pattern), Pattern.parse(pattern)
    alone = 0
    for seed in range(60):
        problem = few_samples(seed)
        (group,) = problem.groups()
        largest, own = magnitude(group, parsed), method.solver(group, parsed)
        if method.options.refit:
            largest, own = (refit(group, matrix != 0) for matrix in (largest, own))
        found = sparse_matrix(group, parsed, method)
        assert parsed.check(found).ok
        assert float(group.loss(found)) <= min(float(group.loss(largest)), float(group.loss(own))) + 1e-9
        alone += bool(group.loss(own) > group.loss(largest) + 1e-9)
    assert alone or solver == "exact_obs" or pattern == "0.75", "the solver alone is never worse on these problems"


@pytest.mark.parametrize(("columns", "rows"), [(192, 32), (432, 8)])
def test_nor_is_it_on_layers_of_which_a_few_rows_are_compared_first(columns: int, rows: int) -> None:
    pattern, method, alone = Pattern.parse("2:4"), method_of("admm", "2:4"), 0
    for seed in range(6):
        (group,) = few_samples(seed, rows, columns, samples=9).groups()
        masks = [matrix != 0 for matrix in (method.solver(group, pattern), magnitude(group, pattern))]
        ours, largest = (float(group.loss(refit(group, mask))) for mask in masks)
        assert float(group.loss(sparse_matrix(group, pattern, method))) <= min(ours, largest) + 1e-6 * abs(ours)
        alone += ours > largest
    assert alone, "the solver alone is never worse on these problems"


def test_where_statistics_are_many_a_few_rows_settle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = few_samples(0, 32, 192, samples=4000).groups()
    fitted = []

    def counting(problem: LayerProblem, *arguments: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        fitted.append(len(problem.weight))
        return refit(problem, *arguments, **named)

    monkeypatch.setattr("fxprune.layers.constraint.refit", counting)
    sparse_matrix(group, Pattern.parse("2:4"), method_of("admm", "2:4"))
    assert fitted == [32, 8]
