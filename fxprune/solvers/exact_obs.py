"""Exact OBS (Frantar, Singh & Alistarh 2022): greedy, one weight at a time, every row with its own inverse Hessian.

The slow reference: O(R D^3) time, rows in chunks because each one holds a D x D matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.pattern import NMPattern, Pattern, UnstructuredPattern
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit

CHUNK_BYTES = 256 * 2**20


def exact_obs(problem: LayerProblem, pattern: Pattern) -> Tensor:
    """Prune W* = T H^-1 greedily; returns (R, D).

    For N:M a weight may go only while its group has more than N left. For an unstructured pattern each row is pruned
    to the end, and the weights whose removal cost least, over all rows, are the ones that go (the global step of
    the paper's section 4). The weights left are the least-squares solution on their support.
    """
    weight, inverse = problem.optimum(), problem.once("inverse", lambda: torch.linalg.inv(problem.hessian))
    rows_at_once = max(1, CHUNK_BYTES // (inverse.numel() * inverse.element_size()))
    if isinstance(pattern, NMPattern):
        chunks = [_greedy(w, inverse, pattern)[0] for w in weight.split(rows_at_once)]
        return torch.cat(chunks)
    assert isinstance(pattern, UnstructuredPattern)
    costs = torch.cat([_greedy(w, inverse, None)[1] for w in weight.split(rows_at_once)])
    return refit(problem, pattern.mask(costs))


def _greedy(weight: Tensor, inverse: Tensor, pattern: NMPattern | None) -> tuple[Tensor, Tensor]:
    """Prune a chunk of rows, all rows one weight a step.

    Returns:
        The pruned weights (r, D), and for each weight the error added when it went (r, D), made monotone along each
        row's order so that a threshold on it keeps a suffix of the order; weights that stayed have infinity.
    """
    rows, columns = weight.shape
    weight, inverse = weight.clone(), inverse.expand(rows, -1, -1).clone()
    row = torch.arange(rows, device=weight.device)
    left = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    cost = torch.full_like(weight, torch.inf)
    worst, infinity = torch.zeros_like(weight[:, 0]), torch.full_like(weight[:, 0], torch.inf)
    steps = columns if pattern is None else columns // pattern.m * (pattern.m - pattern.n)
    for _ in range(steps):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        score = torch.where(left, weight**2 / diagonal, torch.inf)
        if pattern is not None:
            in_group = left.unflatten(1, (-1, pattern.m)).sum(-1, keepdim=True) > pattern.n
            score = torch.where(in_group.expand(-1, -1, pattern.m).flatten(1), score, torch.inf)
        best, j = score.min(1)
        worst = torch.maximum(worst.nextafter(infinity), best)  # Strictly, lest a tie keep what went first.
        cost[row, j] = worst
        column = inverse[row, :, j]
        pivot = column[row, j]
        weight -= (weight[row, j] / pivot)[:, None] * column
        inverse.baddbmm_(column[:, :, None], (column / -pivot[:, None])[:, None, :])
        left[row, j] = False
        weight[row, j] = 0
        inverse[row, j, j] = 1  # Its row and column are zero now; the one keeps the scores finite.
    return weight * left, cost
