"""Run folders: never a mix of two runs, and of use from any directory and without the code that registered the model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fxprune.models import registry

Fxprune = Callable[..., str]

NET = """
import torch
from torch import nn
from fxprune.models import register


@register("elsewhere_cli", input_shape=(1, 28, 28), num_classes=10, mean=(0.1307,), std=(0.3081,))
def net(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes)
    )
"""


@pytest.fixture(scope="module")
def made(fxprune: Fxprune, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `work` with reg.py, data.npz, and the runs out/t and out/p, all made with relative paths."""
    work = tmp_path_factory.mktemp("work")
    (work / "reg.py").write_text(NET)
    shutil.copy(digits, work / "data.npz")
    own = ("--register", "reg.py", "--model", "elsewhere_cli", "--data", "data.npz")
    here = os.getcwd()
    os.chdir(work)
    try:
        fxprune("train", *own, "--epochs", 1, "--batch-size", 20, "--out", "out/t")
        fxprune("prune", *own, "--weights", "out/t/last.pt", "--calibration-images", 100, "--out", "out/p")
    finally:
        os.chdir(here)
    return work


def test_everything_works_from_another_directory(
    fxprune: Fxprune, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = json.loads((made / "out/p/run.json").read_text())["results"]
    said = fxprune("evaluate", made / "out/p/pruned.pt", "--against", made / "out/t/last.pt")
    assert f"{results['accuracy']:.2f}% of 300" in said
    assert f"{results['agreement']:.2%}" in said
    assert "2:4" in fxprune("diff", made / "out/p")
    said = fxprune("plot", made / "out/p", "--out", "plots", "--formats", "svg")
    assert "without the dense" not in said
    fxprune("prune", "--config", made / "out/p/config.yaml", "--out", "again", "--no-onnx")
    assert Path("again/run.json").is_file()


def test_a_pruned_model_needs_no_code_of_the_users(
    fxprune: Fxprune, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry._ENTRIES, "elsewhere_cli")
    folder = tmp_path / "moved"
    shutil.copytree(made / "out" / "p", folder)
    for name in ("config.yaml", "run.json"):
        (folder / name).write_text((folder / name).read_text().replace(f"{made}/reg.py", f"{tmp_path}/gone.py"))
    results = json.loads((folder / "run.json").read_text())["results"]
    said = fxprune("evaluate", folder / "pruned.pt", "--against", folder / "model.onnx")
    assert f"{results['accuracy']:.2f}% of 300" in said
    assert "without the code of elsewhere_cli" in said
    said = fxprune("plot", folder, "--out", tmp_path / "plots", "--formats", "svg")
    assert "without the dense model's spectra" in said
    assert "masks-moved.svg" in said
    said = fxprune("diff", folder, code=1)
    assert "compared with the dense model that it was made from, which cannot be built" in said
    assert "gone.py" in said
    assert "fxprune diff BEFORE AFTER" in said
    fxprune("diff", folder / "pruned.pt", folder / "pruned.pt")
    assert "gone.py" in fxprune("evaluate", folder / "pruned.pt", "--against", made / "out/t/last.pt", code=1)


def test_a_used_folder_is_refused_before_any_work_and_replaced_on_request(
    fxprune: Fxprune, pruned: Path, tmp_path: Path
) -> None:
    again = ("prune", "--config", pruned / "config.yaml", "--out", tmp_path)
    fxprune(*again)
    (tmp_path / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    said = fxprune(*again, "--no-onnx", "--method", "magnitude", code=1)
    assert "holds a run of fxprune prune: replace it with --overwrite, or name another folder with --out" in said
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    fxprune(*again, "--no-onnx", "--method", "magnitude", "--overwrite")
    assert {file.name for file in tmp_path.iterdir()} == set(before) - {"model.onnx", "onnx.json"}
    record = json.loads((tmp_path / "run.json").read_text())
    assert set(record["files"]) == set(before) - {"model.onnx", "onnx.json", "notes.txt"}
    assert record["config"]["method"] == "magnitude"


def test_a_wrong_option_does_not_cost_the_old_run(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    again = ("prune", "--config", pruned / "config.yaml", "--out", tmp_path, "--no-onnx")
    fxprune(*again)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fxprune(*again, "--overwrite", "--weights", tmp_path / "no.pt", code=1)
    fxprune(*again, "--overwrite", "--pattern", "4:2", code=1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_are_not_removed_by_the_run_that_reads_them(fxprune: Fxprune, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(trained, folder)
    lines = (folder / "config.yaml").read_text().splitlines()
    (tmp_path / "p.yaml").write_text("\n".join(x for x in lines if x.startswith(("model:", "data:", "register:"))))
    prune = ("prune", "--config", tmp_path / "p.yaml", "--weights", folder / "last.pt", "--out", folder,
             "--calibration-images", 100)  # fmt: skip
    assert "holds a run of fxprune train" in fxprune(*prune, code=1)
    assert "which --overwrite would remove" in fxprune(*prune, "--overwrite", code=1)
    assert (folder / "last.pt").exists()


def test_a_training_is_not_resumed_in_the_folder_of_a_pruning(fxprune: Fxprune, trained: Path, pruned: Path) -> None:
    said = fxprune("train", "--config", trained / "config.yaml", "--out", pruned, "--resume", code=1)
    assert "holds a run of fxprune prune" in said
    assert "exclude" not in said
