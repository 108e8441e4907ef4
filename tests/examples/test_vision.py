from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::fxprune.errors.CalibrationWarning")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_boxes_are_matched_once_and_by_class() -> None:
    matched = example("yolo_detector.py")["matched"]
    a = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]]
    )
    classes = torch.tensor([0, 1, 0, 2])
    assert matched((a, classes), (a, classes)) == 1
    assert matched((a, classes), (a, torch.tensor([0, 2, 0, 2]))) == 0.75  # One has another class.
    assert matched((a, classes), (a[:1], classes[:1])) == 0.25  # Two would like the same partner.
    assert matched((a, classes), (a + 6.0, classes)) == 0  # Overlap of a twelfth.
    assert matched((a[:0], classes[:0]), (a, classes)) == 0


@pytest.mark.slow
def test_the_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ultralytics")
    share = example("yolo_detector.py")["main"](folder=tmp_path, size=64, count=32)
    said = capsys.readouterr().out
    assert 0 < share <= 1
    assert "have a partner" in said
    assert onnxruntime.InferenceSession(str(tmp_path / "yolo11n.onnx")).get_inputs()[0].shape[1] == 3


@pytest.mark.slow
def test_the_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agreement = example("unet_segmentation.py")["main"](folder=tmp_path)
    dense, pruned = (float(x) for x in re.findall(r"over union ([\d.]+)%", capsys.readouterr().out))
    assert dense > 60  # It has learned something; all background is a third of that.
    assert pruned > dense - 5
    assert agreement > 0.95
    assert (tmp_path / "unet.onnx").is_file()
