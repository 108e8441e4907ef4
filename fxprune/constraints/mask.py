"""Mask: "2:4", "0.9", "mixed:0.6". Decides which weights are zero; leaves the values of the others free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration.calibration import Calibration
from fxprune.constraints.sensitivity import sensitivities
from fxprune.errors import PatternError
from fxprune.geometry import LayerGeometry
from fxprune.layers.constraint import Chain, Constraint, Part, Rest, refit_rows, register
from fxprune.options import Method
from fxprune.pattern import MixedPattern, NMPattern, Pattern
from fxprune.runtime.processes import of_first
from fxprune.solvers.allocation import allocate
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.shared_out import by_groups, by_rows

SAMPLED_ROWS = (
    8  # Of larger layers, to see whether another mask is worth a re-fit of all rows: 0.4% of the time on ResNet-20.
)
SMALL_LAYER = 2**20  # R x D x D up to which all rows take no more than that.


@register
@dataclass(frozen=True)
class Mask(Constraint):
    """Weights are zero as a `Pattern` asks.

    Attributes:
        pattern: which.
        allocated: whether it is a layer's own share of a budget.
    """

    pattern: Pattern
    allocated: bool = False

    @classmethod
    def parse(cls, text: str) -> Mask | None:  # noqa: D102 - documented on Constraint
        return cls(Pattern.parse(text)) if Pattern.is_pattern(text) else None

    def __str__(self) -> str:
        return str(self.pattern)

    @property
    def sparsity(self) -> float:  # noqa: D102
        return self.pattern.sparsity

    def decline(self, geometry: LayerGeometry) -> str | None:  # noqa: D102
        return self.pattern.decline(geometry)

    def solve(self, part: Part, rest: Rest, method: Method) -> tuple[Part, ...]:
        """The solver chooses the weights that stay; with `Options.refit` they are then fitted by least squares."""
        if self.decline(part.geometry) is not None:  # A factor may be too narrow for what the layer could hold.
            return rest(part)
        if isinstance(self.pattern, MixedPattern):
            raise PatternError(f"pattern {self} is a choice over layers: a budget has to be allocated first")
        problem = part.problem
        if part.mask is not None:  # Choose among the weights that an earlier mask left, to put out what they put out.
            target = part.matrix @ problem.hessian if problem.is_observed else problem.target
            problem = replace(problem, weight=part.matrix, target=target)
        matrix = by_groups(problem, lambda group: sparse_matrix(group, self.pattern, method))
        if part.mask is not None:
            part = part.masked(matrix != 0, method, start=matrix)
        else:
            part = replace(part, matrix=matrix, mask=matrix != 0)
        return rest(replace(part, pattern=str(self.pattern)))

    def is_shared(self, method: Method) -> bool:  # noqa: D102
        budget = method.options.global_budget and not isinstance(self.pattern, NMPattern)
        return not self.allocated and (budget or isinstance(self.pattern, MixedPattern))

    def allocate(
        self, graph_module: GraphModule, layers: Sequence[Node], calibration: Calibration, method: Method
    ) -> Mapping[Node, Constraint | str]:
        """Each layer gets a level, such that what all cost together at the output is least and the budget is kept.

        Dynamic programming over the costs that `sensitivities` measures, after SPDY (Frantar & Alistarh 2022).

        Raises:
            PatternError: the model puts out no floating point tensor, so that nothing can be measured there.
        """
        levels = self.pattern.levels
        chains: list[Chain | None] = [() if level is None else (Mask(level),) for level in levels]
        found = sensitivities(graph_module, dict.fromkeys(layers, chains), calibration, method)
        sizes = [found[node].weights for node in layers]
        kept = [[size if level is None else level.kept(size) for level in levels] for size in sizes]
        chosen = allocate([list(found[node].costs) for node in layers], kept, self.pattern.kept(sum(sizes)))
        dense = f"dense within the budget of {self.pattern}"
        return {
            node: dense if (level := levels[index]) is None else Mask(level, allocated=True)
            for node, index in zip(layers, chosen, strict=True)
        }


def sparse_matrix(problem: LayerProblem, pattern: Pattern, method: Method) -> Tensor:
    """What the solver makes of one group: (R, D) float64, which keeps the pattern; with `Options.refit`, fitted on its mask.

    No solver finds the best mask for certain. Where the largest weights alone leave a smaller error on the layer's own
    statistics, which happens where these are few or alike, they are kept instead; but not in place of a user's solver.
    """

    def fitted(problem: LayerProblem, matrix: Tensor) -> Tensor:
        return refit_rows(problem, matrix != 0, matrix) if method.options.refit else matrix

    if method.solver.takes_rows and isinstance(pattern, NMPattern):
        found = by_rows(problem, lambda part: method.solver(part, pattern))
    else:  # In every process the same.
        found = method.solver(problem, pattern)
    found = fitted(problem, found)
    if not method.solver.safeguarded:
        return found
    largest = magnitude(problem, pattern)
    count, columns = found.shape
    if method.options.refit and count > SAMPLED_ROWS and count * columns**2 > SMALL_LAYER:
        rows = torch.linspace(0, count - 1, SAMPLED_ROWS, device=found.device).round().long()
        few = problem.rows(rows)
        lost = few.losses(fitted(few, largest[rows])) - few.losses(found[rows])
        if of_first(bool(lost.mean() > 2 * lost.std() / SAMPLED_ROWS**0.5)):  # Clearly worse; nearly always it is.
            return found
    largest = fitted(problem, largest)
    return largest if bool(problem.loss(largest) < problem.loss(found)) else found
