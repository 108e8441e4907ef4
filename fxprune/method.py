"""How layers are solved: a solver, and the options that are right for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxprune.options import Options
from fxprune.solvers.solver import Solver

Factorisation = Literal["data_aware", "svd"]


@dataclass(frozen=True)
class Method:
    """A solver with resolved options (`Options.resolved`).

    Attributes:
        solver: chooses the weights that stay.
        options: resolved.
        label: what the report calls the method; "" for the solver's own name.
    """

    solver: Solver
    options: Options
    label: str = ""

    @property
    def name(self) -> str:
        """As the report has it."""
        return self.label or str(self.solver)

    @property
    def factorisation(self) -> Factorisation:
        """How a layer is split: by the output error, or by the weight alone for a solver that sees no images."""
        return "data_aware" if self.solver.needs_statistics else "svd"

    @property
    def needs_statistics(self) -> bool:
        """Whether anything that is done to a layer depends on the calibration images."""
        o = self.options
        return (
            self.solver.needs_statistics or o.target != "weights" or bool(o.refit or o.bias_correction or o.reconstruct)
        )
