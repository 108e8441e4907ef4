from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fxprune.export import OnnxReport


def test_table(exported: tuple[Path, OnnxReport]) -> None:
    text = str(exported[1])
    lines = text.splitlines()
    assert lines[0].strip() == "net.onnx: ONNX opset 20, fp32, pruned to 2:4 with magnitude"
    assert max(map(len, lines)) <= 110
    row = next(line for line in lines if "square" in line)
    for cell in (".weight", "Conv", "16x16x3x3", "2:4 ok", "50.0%"):
        assert cell in row
    assert "batches of 3, 6" in text
    assert f"{exported[1].size.file:,} bytes" in text
    assert "2:4, small: gain unlikely" in text
    assert "N:M zeros bring no speed-up" in text
    assert "\x1b[" not in text
    assert "\x1b[" in exported[1].render(color=True)


def test_accuracy_line(exported: tuple[Path, OnnxReport]) -> None:
    report = exported[1]
    labelled = replace(report, parity=replace(report.parity, accuracy_model=91.25, accuracy_onnx=91.0))
    assert "Accuracy: model 91.25%, file 91.00%." in str(labelled)
    assert "Accuracy" not in str(report)


def test_json(exported: tuple[Path, OnnxReport], tmp_path: Path) -> None:
    exported[1].to_json(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["parity"]["batch_sizes"] == [3, 6]
    assert stored["layers"][1]["name"] == "grouped"
    assert stored["sparsity"] == exported[1].sparsity
    assert "explanation" in stored["layers"][1]


def test_unknown_layer(exported: tuple[Path, OnnxReport]) -> None:
    with pytest.raises(KeyError, match="no layer named 'x'; there are: stem, grouped"):
        exported[1]["x"]
