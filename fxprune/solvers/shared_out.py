"""Groups of a layer, or rows of a group, shared out over processes: each is a least-squares problem of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxprune.runtime.processes import alone, gathered, joined, world
from fxprune.solvers.problem import LayerProblem

LEAST_WORK = 10**7  # MACs of R x D x D; what is less is done as soon in one process as half of it in each of two.


def by_groups(problem: LayerProblem, solve: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """What `solve(group, *of_group)` (R/G, D) gives for each group, (G, R/G, D); of several groups each process solves some.

    Args:
        problem: (G, D, D) and (G, R/G, D), the same in all processes.
        solve: takes the problem of one group.
        matrices: (G, R/G, D), of which it takes those of the group.
    """
    groups, own = list(zip(problem.groups(), *matrices, strict=True)), world().share(problem.target.shape[0])
    if world().count == 1 or len(groups) == 1:
        return torch.stack([solve(*group) for group in groups])
    with alone():
        found = [solve(*group) for group in groups[own]]
    return joined(torch.stack(found) if found else problem.target[:0])


def by_rows(problem: LayerProblem, solve: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """What `solve(problem, *matrices)` gives, (R, D); each process solves some rows of a large problem.

    Args:
        problem: of one group, (D, D) and (R, D), the same in all processes.
        solve: one to which a row is a problem of its own, but for what it asks of the others by `LayerProblem.of_all`.
        matrices: (R, D), which it takes too.
    """
    here, (rows, columns) = world(), problem.target.shape
    if here.count == 1 or rows < here.count or rows * columns**2 < LEAST_WORK:
        return solve(problem, *matrices)
    own = torch.arange(rows, device=problem.target.device)[here.share(rows)]
    return joined(solve(replace(problem.rows(own), of_all=gathered), *(matrix[own] for matrix in matrices)))
