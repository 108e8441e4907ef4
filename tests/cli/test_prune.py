from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from fxprune.experiments.yaml_files import read_yaml
from fxprune.pattern import Pattern
from fxprune.saving import load

Fxprune = Callable[..., str]


def test_it_writes_weights_onnx_reports_and_how_it_was_made(pruned: Path) -> None:
    assert {file.name for file in pruned.iterdir()} == {
        "pruned.pt", "model.onnx", "report.csv", "report.json", "onnx.json", "config.yaml", "run.json"
    }  # fmt: skip
    record = json.loads((pruned / "run.json").read_text())
    results = record["results"]
    assert results["dense_accuracy"] - 15 < results["accuracy"] <= 100
    assert results["onnx_accuracy"] == pytest.approx(results["accuracy"], abs=0.34)
    assert results["layers_pruned"] == 2
    assert record["config"]["pattern"] == "2:4"
    assert record["config"]["method"] == "admm"
    assert record["seconds"] > 0
    compiled = load(pruned / "pruned.pt")
    assert Pattern.parse("2:4").check(compiled.get_submodule("3").weight).ok
    assert compiled.report.sparsity == pytest.approx(results["sparsity"])
    rows = list(csv.DictReader((pruned / "report.csv").open()))
    assert [row["name"] for row in rows] == ["0", "3", "8"]
    report = json.loads((pruned / "report.json").read_text())
    assert (report["images_read"], report["images"], report["images_held_out"]) == (200, 180, 20)
    onnx.checker.check_model(str(pruned / "model.onnx"))


def test_the_written_configuration_makes_it_again(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    assert read_yaml(pruned / "config.yaml")["pattern"] == "2:4"
    said = fxprune("prune", "--config", pruned / "config.yaml", "--out", tmp_path, "--no-onnx")
    assert "dense" in said
    first, second = (load(folder / "pruned.pt").state_dict() for folder in (pruned, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "model.onnx").exists()


def test_every_option_reaches_the_compiler(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    fxprune("prune", "--config", pruned / "config.yaml", "--out", tmp_path, "--no-onnx", "--pattern", "0.75",
            "--method", "sparsegpt", "--exclude", "8", "--refit", "--damping", "0.1", "--test-images", 50)  # fmt: skip
    report = load(tmp_path / "pruned.pt").report
    assert (report.pattern, report.method) == ("0.75", "sparsegpt")
    assert report["3"].sparsity == pytest.approx(0.75, abs=0.01)
    assert report["8"].status == "kept"
    assert report["3"].damping == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pattern", "4:2"), "4:2"),
        (("--method", "sparsgpt"), "unknown method 'sparsgpt'"),
        (("--exclude", "nothing"), "'nothing' matches no module"),
        (("--damping", "-1"), "damping is -1"),
        (("--model", "resnet20"), "does not fit"),
    ],
)
def test_errors_name_what_is_wrong(
    fxprune: Fxprune, pruned: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in fxprune("prune", "--config", pruned / "config.yaml", "--out", tmp_path / "x", *arguments, code=1)
    assert not (tmp_path / "x" / "run.json").exists()


def test_weights_are_needed(fxprune: Fxprune, digits: Path, tmp_path: Path) -> None:
    said = fxprune("prune", "--model", "simple_cnn", "--data", digits, "--out", tmp_path / "x", code=1)
    assert "simple_cnn has no weights" in said


def test_a_failed_run_does_not_look_finished(
    fxprune: Fxprune, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = ("prune", "--config", pruned / "config.yaml", "--out", tmp_path, "--no-onnx")
    fxprune(*again)
    assert (tmp_path / "run.json").exists()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxprune.saving.save", full)
    assert "No space left on device" in fxprune(*again, "--overwrite", code=1)
    # Nothing of the first run is left to be taken for this one's.
    assert {file.name for file in tmp_path.iterdir()} == {"config.yaml", "report.csv", "report.json"}


OWN_LEAF = """
import torch
from torch import nn
from fxprune.models import register


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.detach().sum()) > 0 else x * 3


@register("gated_cli", input_shape=(1, 28, 28), num_classes=10, mean=(0.1307,), std=(0.3081,))
def gated(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 5, 4), nn.ReLU(), Gate(), nn.Flatten(), nn.Linear(144, num_classes))
"""


def test_a_model_with_an_untraceable_module_of_ones_own(fxprune: Fxprune, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(OWN_LEAF)
    own = ("--register", tmp_path / "gated.py", "--model", "gated_cli", "--data", digits)
    fxprune("train", *own, "--epochs", 1, "--out", tmp_path / "t")
    weights = ("--weights", tmp_path / "t" / "last.pt", "--calibration-images", 50)
    said = fxprune("prune", *own, *weights, "--no-onnx", "--out", tmp_path / "p", "--pattern", "mixed:0.4")
    assert "symbolic_shapes" not in said  # torch.export, which is tried first, has a lot to say about it.
    results = json.loads((tmp_path / "p" / "run.json").read_text())["results"]
    said = fxprune("evaluate", tmp_path / "p" / "pruned.pt")
    assert f"{results['accuracy']:.2f}% of 300" in said
    fxprune("plot", tmp_path / "p", "--out", tmp_path / "plots", "--formats", "svg")
    fxprune("diff", tmp_path / "p")
