"""ONNX files: written, confirmed in onnxruntime, inspected; and where their sparsity pays."""

from __future__ import annotations

from fxprune.export.deployment import Deployment, Rule, assess_deployment, tensorrt_2to4, torch_semi_structured
from fxprune.export.inspection import Inspection, inspect_onnx
from fxprune.export.onnx import export_onnx
from fxprune.export.onnx_report import LayerCheck, OnnxReport
from fxprune.export.validate import validate_onnx

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
