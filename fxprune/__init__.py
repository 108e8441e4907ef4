"""fxprune: one-shot pruning of trained CNNs as a torch.fx graph-transformation compiler."""

from __future__ import annotations

from fxprune import constraints, models, passes, solvers
from fxprune.calibration.calibration import Calibration
from fxprune.compiled import CompiledModule
from fxprune.compiler import compile, default_passes
from fxprune.errors import CalibrationWarning, FxPruneError
from fxprune.export import export_onnx, inspect_onnx, validate_onnx
from fxprune.graph_diff import diff
from fxprune.options import Options
from fxprune.pattern import Pattern
from fxprune.rank_reduction import low_rank
from fxprune.recipe import Recipe
from fxprune.report import LayerReport, PruneReport
from fxprune.saving import load, save
from fxprune.scan import scan

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationWarning",
    "CompiledModule",
    "FxPruneError",
    "LayerReport",
    "Options",
    "Pattern",
    "PruneReport",
    "Recipe",
    "compile",
    "constraints",
    "default_passes",
    "diff",
    "export_onnx",
    "inspect_onnx",
    "load",
    "low_rank",
    "models",
    "passes",
    "save",
    "scan",
    "solvers",
    "validate_onnx",
]
