"""ONNX files: written, confirmed in onnxruntime, inspected; and where their sparsity pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "Deployment",
    "Inspection",
    "LayerCheck",
    "OnnxReport",
    "Rule",
    "assess_deployment",
    "export_onnx",
    "inspect_onnx",
    "tensorrt_2to4",
    "torch_semi_structured",
    "validate_onnx",
]

# The deployment rules need torch alone; what reads or writes a file brings onnx and onnxruntime, on first use.
if TYPE_CHECKING:
    from fxprune.export.inspection import Inspection, inspect_onnx
    from fxprune.export.onnx import export_onnx
    from fxprune.export.onnx_report import LayerCheck, OnnxReport
    from fxprune.export.validate import validate_onnx
    from fxprune.layers.deployment import Deployment, Rule, assess_deployment, tensorrt_2to4, torch_semi_structured
else:
    from fxprune.runtime.first_use import on_first_use

    __getattr__, __dir__ = on_first_use(
        __name__,
        {
            "Deployment": "fxprune.layers.deployment",
            "Inspection": "fxprune.export.inspection",
            "LayerCheck": "fxprune.export.onnx_report",
            "OnnxReport": "fxprune.export.onnx_report",
            "Rule": "fxprune.layers.deployment",
            "assess_deployment": "fxprune.layers.deployment",
            "export_onnx": "fxprune.export.onnx",
            "inspect_onnx": "fxprune.export.inspection",
            "tensorrt_2to4": "fxprune.layers.deployment",
            "torch_semi_structured": "fxprune.layers.deployment",
            "validate_onnx": "fxprune.export.validate",
        },
    )
