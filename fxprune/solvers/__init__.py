"""Pure tensor maths, one algorithm a file. A solver takes a damped `LayerProblem` and a `Pattern`, and returns weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxprune.errors import OptionsError
from fxprune.pattern import Pattern
from fxprune.solvers.admm import admm
from fxprune.solvers.exact_obs import exact_obs
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit
from fxprune.solvers.sparsegpt import sparsegpt

Solver = Callable[[LayerProblem, Pattern], Tensor]

SOLVERS: dict[str, Solver] = {
    "magnitude": magnitude,
    "sparsegpt": sparsegpt,
    "exact_obs": exact_obs,
    "admm": admm,
}


def register(name: str) -> Callable[[Solver], Solver]:
    """Decorator that makes a function selectable as `fxprune.compile(..., method=name)`."""

    def add(solver: Solver) -> Solver:
        SOLVERS[name] = solver
        return solver

    return add


def get(name: str) -> Solver:
    """The solver called `name`.

    Raises:
        OptionsError: if there is none; the message lists those there are.
    """
    if name not in SOLVERS:
        raise OptionsError(f"unknown method {name!r}; choose one of {', '.join(map(repr, SOLVERS))}")
    return SOLVERS[name]


__all__ = [
    "SOLVERS",
    "LayerProblem",
    "Solver",
    "admm",
    "exact_obs",
    "get",
    "magnitude",
    "refit",
    "register",
    "sparsegpt",
]
