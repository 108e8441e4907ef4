from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.fx import symbolic_trace

from fxprune.annotations import annotate_graph
from fxprune.export import export_onnx, inspect_onnx, validate_onnx
from fxprune.pattern import Pattern
from fxprune.report import LayerReport, PruneReport

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vgg11_bn": {},
    "mobilenet_v2": {},
    "densenet121": {},
    "googlenet": {"aux_logits": False, "init_weights": False},
    "mobilenet_v3_small": {},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in MODELS), ("resnet18", "fp16"), ("mobilenet_v3_small", "fp16")]
)
def test_export_validate_inspect(name: str, precision: str, tmp_path: Path) -> None:
    model = torchvision.models.get_model(name, weights=None, **MODELS[name]).eval()
    graph_module = symbolic_trace(model)
    pattern = Pattern.parse("2:4")
    layers = []
    for layer, module in graph_module.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] % 4 == 0:
            module.weight.data = pattern.project(module.weight.data)
            layers.append(LayerReport(layer, type(module).__name__, tuple(module.weight.shape), "2:4", "pruned"))
    annotate_graph(graph_module, report=PruneReport(tuple(layers), "magnitude", "2:4"))
    path = tmp_path / "model.onnx"
    report = export_onnx(graph_module, path, torch.randn(2, 3, 64, 64), precision=precision)
    assert all(report[layer.name].ok for layer in layers)
    assert report.parity.max_rel < (1e-5 if precision == "fp32" else 2e-3)
    assert validate_onnx(graph_module, path, [torch.randn(3, 3, 64, 64)], progress=False).parity.samples == 3
    found = inspect_onnx(path)
    assert sum("2:4" in layer.patterns for layer in found.layers) >= 0.9 * len(layers)
