"""Short ways to run a part of the pipeline on a model, for tests of that part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxprune import Calibration, Options, solvers
from fxprune.annotations import report_of
from fxprune.options import Method
from fxprune.passes import (
    Allocate,
    InsertObservers,
    RemoveObservers,
    RollUpRecurrent,
    SolveLayers,
    UnrollRecurrent,
    verify,
)
from fxprune.recipe import Recipe
from fxprune.report import PruneReport
from fxprune.tracing import trace


def method_of(solver: str, recipe: object = "2:4", **options: Any) -> Method:
    """A solver with its resolved options."""
    found, parsed = solvers.get(solver), Recipe.parse(recipe)
    return Method(found, Options(**options).resolved(found, parsed))


def calibration(batches: Iterable[Any], **settings: Any) -> Calibration:
    """A calibration set of which nothing is held out unless a test says so."""
    return Calibration(batches, **{"holdout": 0.0, **settings})


def solve(
    model: nn.Module,
    batches: Iterable[Any],
    solver: str = "admm",
    recipe: object = "2:4",
    *,
    exclude: Sequence[str] = (),
    **options: Any,
) -> GraphModule:
    """Trace a model and solve its layers, without permutation or anything else that happens before or after.

    By plain least squares: what `shrink` and `temperature` add has tests of its own.
    """
    graph_module, parsed = trace(model), Recipe.parse(recipe)
    method = method_of(solver, recipe, **{"permute": False, "shrink": False, "temperature": False, **options})
    images = calibration(batches)
    UnrollRecurrent(exclude=exclude)(graph_module, images)
    InsertObservers(parsed, exclude=exclude, reconstruct=bool(method.options.reconstruct))(graph_module)
    Allocate(method)(graph_module, images)
    assert SolveLayers(parsed, method)(graph_module, images).modified
    RemoveObservers()(graph_module)
    RollUpRecurrent()(graph_module)
    verify(graph_module)
    return graph_module


def report_in(graph_module: nn.Module) -> PruneReport:
    """The report that solving left."""
    found = report_of(graph_module)
    assert found is not None
    return found
