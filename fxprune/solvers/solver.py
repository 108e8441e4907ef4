"""Solvers as objects: an algorithm with its own settings, its name, and what it needs."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fxprune.errors import OptionsError
from fxprune.pattern import Pattern
from fxprune.solvers.admm import admm
from fxprune.solvers.exact_obs import exact_obs
from fxprune.solvers.magnitude import magnitude
from fxprune.solvers.problem import LayerProblem
from fxprune.solvers.sparsegpt import sparsegpt

SolverFunction = Callable[[LayerProblem, Pattern], Tensor]


@dataclass(frozen=True)
class Solver(ABC):
    """Chooses the weights of one group of a layer that stay, and their values. Subclasses are frozen dataclasses.

    Attributes:
        name: as `method=` takes it.
        published: whether it runs by default as its paper has it, without what is fxprune's own (`Options.resolved`).
        safeguarded: whether the largest weights may be kept in place of its choice where they leave a smaller error.
        takes_rows: whether, under a pattern of each row, it solves some rows as it would among the others.
    """

    name: ClassVar[str]
    published: ClassVar[bool] = False
    safeguarded: ClassVar[bool] = False
    takes_rows: ClassVar[bool] = False

    @property
    def needs_statistics(self) -> bool:
        """Whether it reads H and T; if not, no input is observed and no Hessian factored for its sake."""
        return True

    @abstractmethod
    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:
        """Sparse weights (R, D) for a damped problem."""

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keeps the largest weights, changes none."""

    name: ClassVar[str] = "magnitude"
    published: ClassVar[bool] = True

    @property
    def needs_statistics(self) -> bool:  # noqa: D102
        return False

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:  # noqa: D102
        return magnitude(problem, pattern)


@dataclass(frozen=True)
class SparseGPT(Solver):
    """SparseGPT (Frantar & Alistarh 2023).

    Attributes:
        block_size: columns of a lazy block, at least 1.
    """

    block_size: int = 128
    name: ClassVar[str] = "sparsegpt"
    published: ClassVar[bool] = True
    safeguarded: ClassVar[bool] = True
    takes_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise OptionsError(f"block_size is {self.block_size!r}; it is a number of columns, 128 in the paper")

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:  # noqa: D102
        return sparsegpt(problem, pattern, block_size=self.block_size)


@dataclass(frozen=True)
class ExactOBS(Solver):
    """Exact OBS (Frantar, Singh & Alistarh 2022): greedy, one weight at a time; slow."""

    name: ClassVar[str] = "exact_obs"
    published: ClassVar[bool] = True
    safeguarded: ClassVar[bool] = True
    takes_rows: ClassVar[bool] = True

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:  # noqa: D102
        return exact_obs(problem, pattern)


@dataclass(frozen=True)
class ADMM(Solver):
    """ADMM for the mask (after ALPS, Meng et al. 2024).

    Attributes:
        rho: first penalty, above 0; smaller is slower and better. None: by the size of the problem.
    """

    rho: float | None = None
    name: ClassVar[str] = "admm"
    safeguarded: ClassVar[bool] = True
    takes_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rho is not None and not (isinstance(self.rho, (int, float)) and self.rho > 0):
            raise OptionsError(f"rho is {self.rho!r}; it is a penalty above 0, usually 0.01 to 0.1")

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:  # noqa: D102
        return admm(problem, pattern, rho=self.rho)


@dataclass(frozen=True)
class FunctionSolver(Solver):
    """A function of one's own in a solver's place.

    Attributes:
        function: (damped LayerProblem, Pattern) -> sparse weights (R, D).
        label: its name.
        reads_statistics: False for one that reads the problem's weight and nothing else.
    """

    function: SolverFunction = magnitude
    label: str = ""
    reads_statistics: bool = True
    name: ClassVar[str] = "function"

    @property
    def needs_statistics(self) -> bool:  # noqa: D102
        return self.reads_statistics

    def __call__(self, problem: LayerProblem, pattern: Pattern) -> Tensor:  # noqa: D102
        return self.function(problem, pattern)

    def __str__(self) -> str:
        return self.label


SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (Magnitude(), SparseGPT(), ExactOBS(), ADMM())}


def register(name: str, *, needs_statistics: bool = True) -> Callable[[SolverFunction], SolverFunction]:
    """Decorator that makes a function selectable as `fxprune.compile(..., method=name)`.

    Args:
        name: of the method; another solver of that name is replaced.
        needs_statistics: False for a solver that reads the problem's weight and nothing else: it is then given a
            `LayerProblem.of_weights`.
    """

    def add(function: SolverFunction) -> SolverFunction:
        SOLVERS[name] = FunctionSolver(function, name, needs_statistics)
        return function

    return add


def get(method: str | Solver | SolverFunction) -> Solver:
    """The solver of a name; a solver is returned as it is, and a function as one.

    Raises:
        OptionsError: there is none of this name; the message lists those there are.
    """
    if isinstance(method, Solver):
        return method
    if isinstance(method, type) and issubclass(method, Solver):
        raise OptionsError(f"method is the class {method.__name__}; give an object of it, {method.__name__}()")
    if callable(method):
        known: Any = method
        return FunctionSolver(known, getattr(method, "__name__", type(method).__name__))
    if method not in SOLVERS:
        raise OptionsError(f"unknown method {method!r}; choose one of {', '.join(map(repr, SOLVERS))}")
    return SOLVERS[method]
