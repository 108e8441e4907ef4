"""The whole path on the networks people use: compile with the default method, export, validate, inspect, diff, save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import fxprune
from fxprune import models

SIZE: dict[str, int] = {
    "resnet20": 32, "resnet56": 32, "resnet50": 64, "mobilenet_v3_small": 64, "densenet121": 64, "googlenet": 64,
    "lraspp_mobilenet_v3_large": 64,
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in ("resnet20", "resnet56"):
        return models.create(name).eval()
    model = torchvision.models.get_model(name, weights=None, **ARGUMENTS.get(name, {})).train()
    with torch.no_grad():  # BatchNorm statistics of such images: untrained networks let values die out otherwise.
        for _ in range(8):
            model(torch.randn(16, 3, SIZE[name], SIZE[name]))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZE)
def test_compile_export_validate_inspect_diff_save(name: str, tmp_path: Path) -> None:
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 3, SIZE[name], SIZE[name], generator=generator) for _ in range(2)]
    compiled = fxprune.compile(model, images, "2:4", progress=False)
    pruned = [layer for layer in compiled.report.layers if layer.status == "pruned"]
    assert len(pruned) >= 0.6 * len(compiled.report.layers)
    assert all(layer.reason for layer in compiled.report.layers if layer.status != "pruned")

    path = tmp_path / "model.onnx"
    exported = fxprune.export_onnx(compiled, path, images[0][:2])
    assert all(exported[layer.name].ok for layer in pruned)
    checked = fxprune.validate_onnx(compiled, path, images, progress=False)
    assert checked.parity.samples == 16
    assert sum("2:4" in layer.patterns for layer in fxprune.inspect_onnx(path).layers) >= len(pruned)

    difference = fxprune.diff(model, compiled)
    assert all(len(line) <= 100 for line in str(difference).splitlines())
    difference.to_html(tmp_path / "diff.html")
    difference.to_json(tmp_path / "diff.json")
    found = json.loads((tmp_path / "diff.json").read_text())
    assert found
    assert fxprune.diff(compiled, compiled).is_empty

    fxprune.save(compiled, tmp_path / "model.fxp")
    loaded = fxprune.load(tmp_path / "model.fxp")
    with torch.no_grad():
        for a, b in zip(outputs(loaded(images[0])), outputs(compiled(images[0])), strict=True):
            assert torch.equal(a, b)


def outputs(result: Any) -> list[torch.Tensor]:
    return list(result.values()) if isinstance(result, dict) else [result]
