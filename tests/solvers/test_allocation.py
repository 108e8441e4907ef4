"""The dynamic programme against trying every combination."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxprune.errors import SolverError
from fxprune.solvers.allocation import allocate


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all_combinations(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(5, 4, generator=generator).tolist()
    kept = torch.randint(1, 30, (5, 4), generator=generator).tolist()
    budget = 60
    feasible = [
        (sum(costs[i][level] for i, level in enumerate(levels)), levels)
        for levels in itertools.product(range(4), repeat=5)
        if sum(kept[i][level] for i, level in enumerate(levels)) <= budget
    ]
    if not feasible:
        pytest.skip("this seed has no feasible choice")
    assert tuple(allocate(costs, kept, budget)) == min(feasible)[1]


def test_a_budget_above_the_resolution_is_never_exceeded():
    kept = [[1_000_003, 500_001, 250_001]] * 7
    costs = [[0.0, 1.0 + i, 5.0] for i in range(7)]
    budget = 4_000_000
    chosen = allocate(costs, kept, budget)
    total = sum(kept[i][level] for i, level in enumerate(chosen))
    assert total <= budget
    assert 0 in chosen
    assert chosen != [2] * 7


def test_an_impossible_budget_is_an_error():
    with pytest.raises(SolverError, match="below the 10"):
        allocate([[1.0], [1.0]], [[5], [5]], 9)
