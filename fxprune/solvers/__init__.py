"""Pure tensor maths, one algorithm a file. A solver takes a damped `LayerProblem` and a `Pattern`, and returns weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fxprune.errors import FxPruneError
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


_weights_only: list[Solver] = [magnitude]


def register(name: str, *, needs_statistics: bool = True) -> Callable[[Solver], Solver]:
    """Decorator that makes a function selectable as `fxprune.compile(..., method=name)`.

    Args:
        name: of the method; another solver of that name is replaced.
        needs_statistics: False for a solver that reads the problem's weight and nothing else: it is then given a
            `LayerProblem.of_weights`, and no input is observed and no Hessian factored for its sake.
    """

    def add(solver: Solver) -> Solver:
        SOLVERS[name] = solver
        _weights_only[:] = [other for other in _weights_only if other is not solver]
        if not needs_statistics:
            _weights_only.append(solver)
        return solver

    return add


def needs_statistics(solver: Solver) -> bool:
    """Whether a solver reads H or T of its problem, and not the dense weights alone."""
    return all(solver is not other for other in _weights_only)


def get(name: str) -> Solver:
    """The solver called `name`.

    Raises:
        FxPruneError: if there is none; the message lists those there are.
    """
    if name not in SOLVERS:
        raise FxPruneError(f"unknown method {name!r}; choose one of {', '.join(map(repr, SOLVERS))}")
    return SOLVERS[name]


__all__ = [
    "SOLVERS",
    "LayerProblem",
    "Solver",
    "admm",
    "exact_obs",
    "get",
    "magnitude",
    "needs_statistics",
    "refit",
    "register",
    "sparsegpt",
]
