from __future__ import annotations

import pytest
import torch

from fxprune.pattern import Pattern
from fxprune.solvers import magnitude


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
