from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Fxprune = Callable[..., str]
GREY = ("--mean", 0.1307, "--std", 0.3081)


def figures(fxprune: Fxprune, tmp_path: Path, *arguments: object) -> dict[str, object]:
    fxprune("evaluate", *arguments, "--json-file", tmp_path / "figures.json")
    return json.loads((tmp_path / "figures.json").read_text())


def test_graph_and_onnx_file_give_the_figures_of_the_run(
    fxprune: Fxprune, pruned: Path, trained: Path, tmp_path: Path
) -> None:
    results = json.loads((pruned / "run.json").read_text())["results"]
    for name in ("pruned.pt", "model.onnx"):
        found = figures(fxprune, tmp_path, pruned / name, "--against", trained / "last.pt")
        assert found["images"] == 300
        assert found["accuracy"] == pytest.approx(results["accuracy"], abs=0.34)
        assert found["agreement"] == pytest.approx(results["agreement"], abs=0.0034)
        assert found["kl"] == pytest.approx(results["kl"], rel=1e-3)


def test_weights_give_the_accuracy_of_the_training(fxprune: Fxprune, trained: Path, tmp_path: Path) -> None:
    results = json.loads((trained / "run.json").read_text())["results"]
    assert figures(fxprune, tmp_path, trained / "last.pt")["accuracy"] == results["last"]["test_accuracy"]


def test_flags_win_over_the_run_folder(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    assert figures(fxprune, tmp_path, pruned / "pruned.pt", "--test-images", 100)["images"] == 100
    assert "no model named 'none'" in fxprune("evaluate", pruned / "pruned.pt", "--model", "none", code=1)


def test_without_a_run_folder_the_data_must_be_named(
    fxprune: Fxprune, pruned: Path, trained: Path, digits: Path, tmp_path: Path
) -> None:
    for file in (pruned / "pruned.pt", pruned / "model.onnx", trained / "last.pt"):
        shutil.copy(file, tmp_path)
    assert "no data set is named" in fxprune("evaluate", tmp_path / "pruned.pt", code=1)
    first = figures(fxprune, tmp_path, tmp_path / "pruned.pt", "--data", digits, *GREY)
    second = figures(fxprune, tmp_path, tmp_path / "model.onnx", "--data", digits, *GREY)
    assert first["accuracy"] == pytest.approx(second["accuracy"], abs=0.34)
    assert "name the model" in fxprune("evaluate", tmp_path / "last.pt", "--data", digits, *GREY, code=1)


@pytest.mark.parametrize("name", ["absent.pt", "absent.onnx"])
def test_absent_files_are_named(fxprune: Fxprune, digits: Path, tmp_path: Path, name: str) -> None:
    assert name in fxprune("evaluate", tmp_path / name, "--data", digits, *GREY, code=1)


def test_guessing_is_not_a_success(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    said = fxprune(
        "evaluate", pruned / "pruned.pt", "--mean", 0.5, "--std", 1000, "--json-file", tmp_path / "f.json", code=1
    )
    assert "no better than guessing" in said
    assert json.loads((tmp_path / "f.json").read_text())["images"] == 300


def test_images_of_another_shape_are_refused(fxprune: Fxprune, pruned: Path) -> None:
    colour = ("--mean", 0.5, "--std", 1) * 3
    said = fxprune("evaluate", pruned / "model.onnx", *colour, code=1)
    assert "the images are (256, 3, 28, 28)" in said
