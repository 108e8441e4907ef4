"""fxprune: one-shot pruning of trained CNNs as a torch.fx graph-transformation compiler."""

from __future__ import annotations

from fxprune import models, passes, solvers
from fxprune.compiled import CompiledModule
from fxprune.compiler import compile
from fxprune.errors import FxPruneError
from fxprune.export import export_onnx, inspect_onnx, validate_onnx
from fxprune.fine_tuning.keep_zeros import keep_zeros
from fxprune.fine_tuning.original_class import state_dict_for
from fxprune.fine_tuning.recorded_zeros import filled_zeros, restore_zeros
from fxprune.graph_diff import diff
from fxprune.options import Options
from fxprune.pattern import Pattern
from fxprune.rank_reduction import low_rank
from fxprune.report import LayerReport, PruneReport
from fxprune.saving import load, save

__version__ = "0.1.0"

__all__ = [
    "CompiledModule",
    "FxPruneError",
    "LayerReport",
    "Options",
    "Pattern",
    "PruneReport",
    "compile",
    "diff",
    "export_onnx",
    "filled_zeros",
    "inspect_onnx",
    "keep_zeros",
    "load",
    "low_rank",
    "models",
    "passes",
    "restore_zeros",
    "save",
    "solvers",
    "state_dict_for",
    "validate_onnx",
]
