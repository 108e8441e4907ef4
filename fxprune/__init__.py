"""fxprune: one-shot pruning of trained CNNs as a torch.fx graph-transformation compiler."""

from __future__ import annotations

from fxprune import models, passes, solvers
from fxprune.compiled import CompiledModule
from fxprune.compiler import compile
from fxprune.errors import FxPruneError
from fxprune.options import Options
from fxprune.pattern import Pattern
from fxprune.report import LayerReport, PruneReport

__version__ = "0.1.0"

__all__ = [
    "CompiledModule",
    "FxPruneError",
    "LayerReport",
    "Options",
    "Pattern",
    "PruneReport",
    "compile",
    "models",
    "passes",
    "solvers",
]
