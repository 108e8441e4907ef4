"""fxprune: one-shot pruning of trained CNNs as a torch.fx graph-transformation compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    "inspect_onnx",
    "load",
    "low_rank",
    "models",
    "passes",
    "save",
    "solvers",
    "validate_onnx",
]

# Type checkers read the imports. At run time each name is imported when it is first used: `import fxprune` loads
# neither torch nor onnxruntime, and the command line answers at once.
if TYPE_CHECKING:
    from fxprune import models, passes, solvers
    from fxprune.compiled import CompiledModule
    from fxprune.compiler import compile
    from fxprune.errors import FxPruneError
    from fxprune.export import export_onnx, inspect_onnx, validate_onnx
    from fxprune.graph_diff import diff
    from fxprune.options import Options
    from fxprune.pattern import Pattern
    from fxprune.rank_reduction import low_rank
    from fxprune.report import LayerReport, PruneReport
    from fxprune.saving import load, save
else:
    from fxprune.first_use import on_first_use

    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "CompiledModule": "fxprune.compiled",
            "FxPruneError": "fxprune.errors",
            "LayerReport": "fxprune.report",
            "Options": "fxprune.options",
            "Pattern": "fxprune.pattern",
            "PruneReport": "fxprune.report",
            "compile": "fxprune.compiler",
            "diff": "fxprune.graph_diff",
            "export_onnx": "fxprune.export",
            "inspect_onnx": "fxprune.export",
            "load": "fxprune.saving",
            "low_rank": "fxprune.rank_reduction",
            "save": "fxprune.saving",
            "validate_onnx": "fxprune.export",
        },
    )
