"""What a constraint is, and the chain of them under which a layer is solved.

A constraint is given a `Part`: one matrix product and its least-squares problem. It decides one thing about the weights, and
hands what is still free to the rest of the chain, as parts again. A mask decides which weights are zero and hands on one part.
A rank decides how many channels lie between two factors and hands on two parts, one for each factor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxprune.errors import PatternError
from fxprune.geometry import LayerGeometry
from fxprune.options import Method
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit
from fxprune.solvers.shared_out import by_groups, by_rows

if TYPE_CHECKING:
    from fxprune.calibration.calibration import Calibration


@dataclass(frozen=True)
class Part:
    """One matrix product of a layer that is being solved, and what the constraints so far have decided about it.

    Attributes:
        geometry: how it reads its input.
        problem: its damped least-squares problem, (G, D, D) and (G, R/G, D).
        matrix: (G, R/G, D) float64, its weights so far: the optimum, until a constraint decides.
        mask: where weights may differ from zero, same shape; None: everywhere.
        pattern: the sparsity pattern that the mask satisfies, in words; "".
        suffix: of the module that it becomes, such as "0" for the first of two factors; "" for the layer itself.
    """

    geometry: LayerGeometry
    problem: LayerProblem
    matrix: Tensor
    mask: Tensor | None = None
    pattern: str = ""
    suffix: str = ""

    def masked(self, mask: Tensor, method: Method, *, start: Tensor | None = None) -> Part:
        """The part with zeros outside the mask, and outside any mask before; with `Options.refit` the rest is fitted anew.

        Args:
            mask: (G, R/G, D) bool, where weights may differ from zero.
            method: solver and options.
            start: (G, R/G, D) weights to fit from, and to keep without a fit; None: those of the part.
        """
        mask = mask if self.mask is None else mask & self.mask
        masked = replace(self, matrix=torch.where(mask, self.matrix if start is None else start, 0), mask=mask)
        return replace(masked, matrix=masked.fitted(self.problem)) if method.options.refit else masked

    def fitted(self, problem: LayerProblem) -> Tensor:
        """The best weights (G, R/G, D) for a problem on the part's mask, or anywhere if it has none."""
        if self.mask is None:
            return problem.optimum()
        return by_groups(problem, refit_rows, self.mask, self.matrix)


def refit_rows(problem: LayerProblem, mask: Tensor, start: Tensor) -> Tensor:
    """`refit` of one group, (R, D); processes share the rows."""
    return by_rows(problem, lambda part, on, at: refit(part, on, start=at), mask, start)


Rest: TypeAlias = Callable[[Part], tuple[Part, ...]]


class Constraint(ABC):
    """A rule that a layer's weights must keep. Subclasses are frozen dataclasses whose `str` is their text in a recipe."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Constraint | None:
        """The constraint that a piece of a recipe asks for; None if the text is not in this constraint's notation.

        Raises:
            PatternError: if it is, and its figure is out of range.
        """

    @abstractmethod
    def decline(self, geometry: LayerGeometry) -> str | None:
        """Why a layer of this geometry cannot keep the constraint, or None if it can."""

    @abstractmethod
    def solve(self, part: Part, rest: Rest, method: Method) -> tuple[Part, ...]:
        """Decide, fit what stays free, and hand it to the rest of the chain: `return rest(part.masked(mask, method))`.

        What earlier constraints decided stays decided: weights outside `part.mask` stay zero, which `Part.masked` sees to.

        Args:
            part: of the layer. For methods that look at no images `part.problem.is_observed` is False, and H and T are NaN.
            rest: solves a part under the constraints that follow.
            method: solver and options.

        Returns:
            All parts of the layer, from its input to its output.
        """

    @property
    def changes_geometry(self) -> bool:
        """Whether the parts that it leaves read their inputs in another way than the layer does."""
        return False

    @property
    def is_of_graph(self) -> bool:
        """Whether it is decided on the graph, before the layers are solved, which then have to be as the graph says."""
        return False

    @property
    def sparsity(self) -> float:
        """Share of weights that it sets to zero."""
        return 0.0

    def is_shared(self, method: Method) -> bool:
        """Whether layers share a budget, so that `allocate` has to say what each one gets."""
        return False

    def allocate(
        self, graph_module: GraphModule, layers: Sequence[Node], calibration: Calibration, method: Method
    ) -> Mapping[Node, Constraint | str]:
        """What each of the layers under a shared budget gets: a constraint of its own, or why it stays as it is."""
        return dict.fromkeys(layers, self)


Chain: TypeAlias = tuple[Constraint, ...]
CONSTRAINTS: list[type[Constraint]] = []
NOT_YET = ("int8",)


def register(constraint: type[Constraint]) -> type[Constraint]:
    """Class decorator: recipes are read by this constraint's `parse` too."""
    CONSTRAINTS.append(constraint)
    return constraint


def parse_chain(text: str) -> Chain:
    """Read a chain such as "rank:0.7+2:4"; "dense" is the empty one.

    Raises:
        PatternError: a piece is in no constraint's notation; the message lists what there is.
    """
    if text.strip() == "dense":
        return ()
    chain = tuple(_parse(piece.strip(), text) for piece in text.split("+"))
    for kind in {type(constraint) for constraint in chain}:
        if sum(isinstance(constraint, kind) for constraint in chain) > 1:
            raise PatternError(f"recipe {text!r} has two constraints of one kind; a layer can keep one of each")
    if (first := next((c for c in chain[1:] if c.is_of_graph), None)) is not None:
        others = "+".join(str(c) for c in chain if c is not first)
        raise PatternError(f"recipe {text!r}: {first} comes first, write '{first}+{others}'")
    return chain


def _parse(piece: str, text: str) -> Constraint:
    for kind in CONSTRAINTS:
        if (constraint := kind.parse(piece)) is not None:
            return constraint
    if piece.startswith(NOT_YET):
        raise PatternError(
            f"recipe {text!r} asks for {piece!r}, which this version of fxprune cannot do yet; "
            "leave it out, or register a constraint of your own for it (fxprune.constraints.register)"
        )
    raise PatternError(
        f"cannot read {piece!r}{f' in the recipe {text!r}' if piece != text else ''}; write N:M, such as '2:4' (2 kept of "
        "every 4 input channels), a sparsity between 0 and 1, such as '0.9', 'mixed:0.6' (dense, 2:4 and 1:4 layers, at "
        "most 0.75), 'rank:0.7' (low-rank factors with 70% of the MACs), 'channels:0.7' (fewer channels, with 70% of the "
        "MACs), 'dense', or several joined by '+'"
    )


def keep_possible(chain: Sequence[Constraint], geometry: LayerGeometry, whole: str = "") -> tuple[Chain, str]:
    """The constraints that a layer can keep, and why it cannot keep the others.

    What follows a constraint that changes the layer's geometry is asked again when the layer is solved.

    Args:
        chain: constraints, in order.
        geometry: of the layer.
        whole: why no two layers can take its place, or "".
    """
    kept: list[Constraint] = []
    reasons = []
    for constraint in chain:
        reason = None if any(accepted.changes_geometry for accepted in kept) else constraint.decline(geometry)
        if reason is None and constraint.changes_geometry and whole:
            reason = whole
        if reason is None:
            kept.append(constraint)
        else:
            reasons.append(reason)
    return tuple(kept), "; ".join(reasons)


def chain_text(chain: Chain) -> str:
    """A chain as it is written in a recipe."""
    return "+".join(map(str, chain)) or "dense"
