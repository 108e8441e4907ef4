"""fxprune: one-shot pruning of trained CNNs as a torch.fx graph-transformation compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

# Type checkers read the imports. At run time each name is imported when it is first used: `import fxprune` loads
# neither torch nor onnxruntime, and the command line answers at once.
if TYPE_CHECKING:
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
    from fxprune.scanning import scan
else:
    from fxprune.first_use import on_first_use

    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "Calibration": "fxprune.calibration.calibration",
            "CalibrationWarning": "fxprune.errors",
            "CompiledModule": "fxprune.compiled",
            "FxPruneError": "fxprune.errors",
            "LayerReport": "fxprune.report",
            "Options": "fxprune.options",
            "Pattern": "fxprune.pattern",
            "PruneReport": "fxprune.report",
            "Recipe": "fxprune.recipe",
            "compile": "fxprune.compiler",
            "default_passes": "fxprune.compiler",
            "diff": "fxprune.graph_diff",
            "export_onnx": "fxprune.export",
            "inspect_onnx": "fxprune.export",
            "load": "fxprune.saving",
            "low_rank": "fxprune.rank_reduction",
            "save": "fxprune.saving",
            "scan": "fxprune.scanning",
            "validate_onnx": "fxprune.export",
        },
    )
