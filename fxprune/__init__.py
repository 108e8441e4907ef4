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
    "alone",
    "compile",
    "constraints",
    "default_passes",
    "diff",
    "export_onnx",
    "filled_zeros",
    "import_onnx",
    "inspect_onnx",
    "keep_zeros",
    "load",
    "low_rank",
    "models",
    "passes",
    "restore_zeros",
    "save",
    "scan",
    "solvers",
    "state_dict_for",
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
    from fxprune.fine_tuning.keep_zeros import keep_zeros
    from fxprune.fine_tuning.original_class import state_dict_for
    from fxprune.fine_tuning.recorded_zeros import filled_zeros, restore_zeros
    from fxprune.graph_diff import diff
    from fxprune.onnx_import import import_onnx
    from fxprune.options import Options
    from fxprune.pattern import Pattern
    from fxprune.rank_reduction import low_rank
    from fxprune.recipe import Recipe
    from fxprune.report import LayerReport, PruneReport
    from fxprune.runtime.processes import alone
    from fxprune.saving import load, save
    from fxprune.scanning import scan
else:
    from fxprune.runtime.first_use import on_first_use

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
            "alone": "fxprune.runtime.processes",
            "compile": "fxprune.compiler",
            "default_passes": "fxprune.compiler",
            "diff": "fxprune.graph_diff",
            "export_onnx": "fxprune.export",
            "filled_zeros": "fxprune.fine_tuning.recorded_zeros",
            "import_onnx": "fxprune.onnx_import",
            "inspect_onnx": "fxprune.export",
            "keep_zeros": "fxprune.fine_tuning.keep_zeros",
            "load": "fxprune.saving",
            "low_rank": "fxprune.rank_reduction",
            "restore_zeros": "fxprune.fine_tuning.recorded_zeros",
            "save": "fxprune.saving",
            "scan": "fxprune.scanning",
            "state_dict_for": "fxprune.fine_tuning.original_class",
            "validate_onnx": "fxprune.export",
        },
    )
