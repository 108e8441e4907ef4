"""Pure tensor maths, one algorithm a file. A solver takes a damped `LayerProblem` and a `Pattern`, and returns weights."""

from __future__ import annotations

from fxprune.solvers.admm import admm
from fxprune.solvers.exact_obs import exact_obs
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.refit import refit
from fxprune.solvers.solver import (
    ADMM,
    SOLVERS,
    ExactOBS,
    FunctionSolver,
    Magnitude,
    Solver,
    SolverFunction,
    SparseGPT,
    get,
    register,
)
from fxprune.solvers.sparsegpt import sparsegpt

__all__ = [
    "ADMM",
    "SOLVERS",
    "ExactOBS",
    "FunctionSolver",
    "LayerProblem",
    "Magnitude",
    "Solver",
    "SolverFunction",
    "SparseGPT",
    "admm",
    "exact_obs",
    "get",
    "magnitude",
    "refit",
    "register",
    "sparsegpt",
]
