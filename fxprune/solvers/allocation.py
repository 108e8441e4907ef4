"""One sparsity level for each layer under a common budget, exactly, by dynamic programming.

The knapsack over layers of Xu et al. 2023 (2308.10438) and of SPDY (Frantar & Alistarh 2022): minimise the sum of the
layers' costs subject to the sum of their kept weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.errors import SolverError

BUCKETS = 10_000


def allocate(costs: Sequence[Sequence[float]], kept: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose a level for each layer.

    Args:
        costs: costs[i][j], what level j costs layer i.
        kept: kept[i][j], the weights that level j leaves in layer i.
        budget: how many weights all layers together may keep. It is cut into `BUCKETS` steps, and each layer's count is
            rounded up to a step, so the choice never exceeds the budget.

    Returns:
        The index of the chosen level of each layer.

    Raises:
        SolverError: if even the sparsest levels exceed the budget.
    """
    step = max(1, -(-budget // BUCKETS))
    size = budget // step
    best = np.zeros(size + 1)
    choices = []
    for layer_costs, layer_kept in zip(costs, kept, strict=True):
        total = np.full((len(layer_costs), size + 1), np.inf)
        for level, (cost, count) in enumerate(zip(layer_costs, layer_kept, strict=True)):
            used = -(-count // step)
            if used <= size:
                total[level, used:] = best[: size + 1 - used] + cost
        choices.append(total.argmin(0))
        best = total.min(0)
    if not np.isfinite(best[size]):
        least = sum(map(min, kept))
        raise SolverError(f"the budget of {budget} weights is below the {least} that the sparsest levels keep")
    chosen, left = [], size
    for layer_choices, layer_kept in zip(reversed(choices), reversed(kept), strict=True):
        level = int(layer_choices[left])
        chosen.append(level)
        left -= -(-layer_kept[level] // step)
    return chosen[::-1]
