from __future__ import annotations

import pytest
import torch

from fxprune.constraints.mask import sparse_matrix
from fxprune.pattern import Pattern
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit
from tests.pipelines import method_of


def few_samples(seed: int) -> LayerProblem:
    """One group whose inputs span fewer directions than it has columns: solvers find worse masks than magnitude's there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 4, 8, generator=generator, dtype=torch.float64)
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
