from __future__ import annotations

import pytest
import torch

from fxprune import solvers
from fxprune.pattern import Pattern
from fxprune.solvers import LayerProblem, magnitude


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("text", "columns"), [("1:2", 6), ("2:4", 12), ("1:4", 4), ("4:8", 16), ("3:5", 15)])
def test_keeps_the_largest_of_every_group(make_case, text, columns, rows):
    problem = make_case(rows, columns).problem
    found = magnitude(problem, Pattern.parse(text))
    n, m = map(int, text.split(":"))
    for row, weights in zip(found, problem.weight, strict=True):
        for start in range(0, columns, m):
            order = sorted(range(start, start + m), key=lambda j: -abs(float(weights[j])))
            for j in order[:n]:
                assert row[j] == weights[j]
            for j in order[n:]:
                assert row[j] == 0


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_keeps_the_largest_of_the_layer(make_case, sparsity):
    problem = make_case(4, 10).problem
    found = magnitude(problem, Pattern.parse(sparsity))
    kept = round(40 * (1 - sparsity))
    smallest_kept = problem.weight.abs().flatten().sort(descending=True).values[kept - 1]
    torch.testing.assert_close(found, problem.weight * (problem.weight.abs() >= smallest_kept), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["2:4", "1:4", "0.7"])
def test_the_weights_are_all_it_reads(make_case, text):
    """What it gives does not depend on statistics, and none need be there, whatever the number of groups."""
    problem, pattern = make_case(5, 12).problem, Pattern.parse(text)
    found = magnitude(problem, pattern)
    alone = LayerProblem.of_weights(torch.stack([problem.weight, -problem.weight]))
    assert alone.hessian.untyped_storage().nbytes() == 8
    first, second = (magnitude(group, pattern) for group in alone.groups())
    assert torch.equal(first, found)
    assert torch.equal(second, -found)


def test_solvers_say_whether_they_need_statistics():
    needy = {name for name, solver in solvers.SOLVERS.items() if solver.needs_statistics}
    assert needy == {"sparsegpt", "exact_obs", "admm"}


@pytest.mark.parametrize("needed", [True, False])
def test_a_solver_of_ones_own_says_so_when_it_is_registered(needed):
    def largest(problem, pattern):
        return problem.weight * pattern.mask(problem.weight.abs())

    try:
        solvers.register("largest")(largest)
        assert solvers.get("largest").needs_statistics  # Unless it says otherwise.
        solvers.register("largest", needs_statistics=needed)(largest)
        assert solvers.get("largest").needs_statistics is needed
    finally:
        del solvers.SOLVERS["largest"]


def test_a_solver_that_reads_statistics_it_was_not_given_fails(make_case):
    alone = LayerProblem.of_weights(make_case(4, 8).problem.weight)
    for name in ("sparsegpt", "exact_obs", "admm"):
        with pytest.raises(RuntimeError):
            solvers.get(name)(alone, Pattern.parse("2:4"))
