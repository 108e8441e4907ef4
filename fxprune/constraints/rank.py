"""Rank: "rank:0.7". Splits a layer in two smaller ones; leaves the values of both free, each a part of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.calibration.batches import tensors_in
from fxprune.calibration.calibration import Calibration
from fxprune.errors import OptionsError, PatternError
from fxprune.geometry import LayerGeometry
from fxprune.graph import has_hooks, module_of
from fxprune.layers.constraint import Constraint, Part, Rest, register
from fxprune.layers.splits import SPLITS, Split, full_rank, geometries
from fxprune.options import Method
from fxprune.ranks.plan import Choice, RankPlan, RankRule
from fxprune.ranks.survey import survey
from fxprune.runtime.processes import on_first
from fxprune.solvers.low_rank import Factors, data_aware_factors, plain_factors, refit_second
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.spatial_split import (
    SpatialFactors,
    data_aware_spatial_factors,
    first_hessian,
    plain_spatial_factors,
    refit_second_kernel,
    second_equations,
)

SINGULAR = 1e-9  # Damping of a second factor whose inputs a mask may have left dependent.


@register
@dataclass(frozen=True)
class Rank(Constraint):
    """A layer becomes two: the weight that they make together has at most rank r.

    Attributes:
        rule: how ranks are chosen, or a plan that has chosen them.
        splits: those to consider, "channel" (k x k to r channels, then 1 x 1) and "spatial" (k x 1, then 1 x k).
        multiple: ranks are multiples of it; with 4 both factors can hold 2:4.
        choice: the split and rank of this layer, once allocated.
        macs: of this layer for one sample, (before, after), once allocated.
        of_network: whether a budget is one of the network's MACs; if not, of those of the layers that share the constraint.
    """

    rule: RankRule | RankPlan
    splits: tuple[Split, ...] = SPLITS
    multiple: int = 4
    choice: Choice | None = None
    macs: tuple[int, ...] = ()
    of_network: bool = True

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise OptionsError(f"multiple is {self.multiple}; ranks are multiples of it, so it should be at least 1")

    @classmethod
    def parse(cls, text: str) -> Rank | None:
        """Read "rank:0.7" (the network keeps 70% of its MACs), "rank:energy=0.95", "rank:ratio=0.5" or "rank:speedup=1.3"."""
        match = re.fullmatch(r"rank:(?:(\w+)=)?(.+)", text)
        if match is None:
            return None
        try:
            return cls(RankRule.parse(f"{match[1] or 'macs'}:{match[2]}"))
        except OptionsError as error:
            raise PatternError(
                f"cannot read {text!r}; write 'rank:0.7' (70% of the MACs stay), 'rank:energy=0.95', 'rank:ratio=0.5' "
                "or 'rank:speedup=1.3'"
            ) from error

    def __str__(self) -> str:
        if self.choice is not None:
            return f"rank {self.choice.rank} ({self.choice.split})"
        if isinstance(self.rule, RankPlan):
            return self.rule.rule
        kind = "" if self.rule.kind == "macs" else f"{self.rule.kind}="
        return f"rank:{kind}{self.rule.value:g}"

    def decline(self, geometry: LayerGeometry) -> str | None:  # noqa: D102 - documented on Constraint
        if geometry.groups > 1:
            return f"{geometry.groups} groups, each small already"
        if geometry.transposed:
            return "a transposed convolution is not split in two"
        if geometry.blocks > 1:
            return f"{geometry.blocks} blocks of columns, and factors need all columns together"
        if any(full_rank(geometry, split) > 1 for split in self.splits):
            return None
        if min(geometry.rows, geometry.columns) < 2:
            return f"a weight of {geometry.rows} x {geometry.columns} has rank 1 as it is"
        kernel = " x ".join(map(str, geometry.kernel_size)) or "Linear"
        return f"{kernel} has no spatial split, which takes a 2-D kernel of several rows and columns"

    @property
    def changes_geometry(self) -> bool:  # noqa: D102
        return True

    def is_shared(self, method: Method) -> bool:  # noqa: D102
        return self.choice is None

    def allocate(
        self, graph_module: GraphModule, layers: Sequence[Node], calibration: Calibration, method: Method
    ) -> Mapping[Node, Constraint | str]:
        """Each layer gets a rank and a split by the rule, on the dense model; one that gains nothing stays whole.

        Raises:
            OptionsError: the rule is out of reach, or a plan does not fit the layers.
        """
        plan = self.rule if isinstance(self.rule, RankPlan) else self._plan(graph_module, layers, calibration, method)
        plan.check(graph_module)
        found: dict[Node, Constraint | str] = {}
        for node in layers:
            name = str(node.target)
            module, choice = module_of(node), plan.choice(name)
            if choice is None:
                found[node] = plan.reason(name)
            elif module is not None and has_hooks(module):
                found[node] = "its forward hooks would be lost"
            else:
                macs = (plan.layers[name].macs, choice.macs)
                found[node] = replace(self, rule=replace(plan, layers={}), choice=choice, macs=macs)
        return found

    def _plan(
        self, graph_module: GraphModule, layers: Sequence[Node], calibration: Calibration, method: Method
    ) -> RankPlan:
        assert isinstance(self.rule, RankRule)
        calibration.on_layer("choosing ranks", 0)
        found = survey(graph_module, layers, calibration, method, splits=self.splits, multiple=self.multiple)
        if self.rule.kind != "speedup":
            return self.rule.plan(found if self.of_network else found.of_its_layers)
        from fxprune.ranks.speedup import plan_for_speedup  # It exports files, for which the rest is not needed.

        calibration.on_layer("measuring", 0)
        example = calibration.images(graph_module, 1)
        factor, inputs = self.rule.value, list(tensors_in(example))
        return on_first(lambda: plan_for_speedup(graph_module, found, factor, inputs))

    def solve(self, part: Part, rest: Rest, method: Method) -> tuple[Part, ...]:
        """Factors with the least output error ("data_aware"), or for methods that see no images the truncated SVD."""
        assert self.choice is not None, "ranks are allocated before layers are solved"
        split, rank = self.choice.split, self.choice.rank
        kernel = (part.geometry.kernel_size[0], part.geometry.kernel_size[1]) if split == "spatial" else None
        problem = next(part.problem.groups()) if part.problem.is_observed else None
        factors = self._factors(part.problem.weight[0], problem, rank, kernel, method)
        reads, gives = geometries(part.geometry, split, rank)
        first = factors.first.flatten(1)
        of_first = _first_problem(problem, first, kernel, factors)
        (solved,) = rest(Part(reads, of_first, first[None], suffix="0"))
        second = factors.second.flatten(1)[None]
        of_second = _second_problem(problem, solved.matrix[0], second, kernel)
        if problem is not None and solved.mask is not None:
            second = of_second.optimum()  # It makes up for what the first has lost.
        return (solved, *rest(Part(gives, of_second, second, suffix="1")))

    def _factors(
        self, weight: Tensor, problem: LayerProblem | None, rank: int, kernel: tuple[int, int] | None, method: Method
    ) -> Factors | SpatialFactors:
        """Factors of a weight (R, D); for a spatial split, `kernel` is (ky, kx)."""
        refit = problem if method.options.refit else None
        if problem is not None and method.factorisation == "data_aware":
            if kernel is None:
                return data_aware_factors(problem, rank)
            return data_aware_spatial_factors(problem, kernel, rank)
        if kernel is not None:
            split = plain_spatial_factors(weight, kernel, rank)
            return replace(split, second=refit_second_kernel(refit, kernel, split.first)) if refit else split
        plain = plain_factors(weight, rank)
        return replace(plain, second=refit_second(refit, plain.first)) if refit else plain


def _first_problem(
    problem: LayerProblem | None, first: Tensor, kernel: tuple[int, int] | None, factors: Factors | SpatialFactors
) -> LayerProblem:
    """What a constraint on the first factor (r, D) has to keep: the channels that it hands to the second.

    With orthonormal columns in the second factor, the error of these channels is the error of the layer's output. A spatial
    factor is read at kx places: its Hessian is the mean over them.
    """
    if problem is None:
        return LayerProblem.of_weights(first[None])
    hessian = problem.hessian if kernel is None else first_hessian(problem, kernel)
    return LayerProblem(hessian[None], (first @ hessian)[None], first[None], damping=problem.damping)


def _second_problem(
    problem: LayerProblem | None, first: Tensor, second: Tensor, kernel: tuple[int, int] | None
) -> LayerProblem:
    """The second factor's (1, R, r) or (1, R, kx r) problem, the first given: what goes in is what the first puts out."""
    if problem is None:
        return LayerProblem.of_weights(second)
    if kernel is None:
        hessian, target = first @ problem.hessian @ first.mT, problem.target @ first.mT
    else:
        hessian, target = second_equations(problem, first.unflatten(1, (kernel[0], -1)), kernel)
    return LayerProblem(hessian[None], target[None], second).damped(SINGULAR)
