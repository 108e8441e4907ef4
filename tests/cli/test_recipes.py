"""Recipes by layer, memory limits, checkpoints and scans on the command line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from fxprune.cli.parameters import in_bytes
from fxprune.errors import OptionsError
from fxprune.experiments.grid_rows import read_rows
from fxprune.experiments.yaml_files import read_yaml
from fxprune.models import create
from fxprune.saving import load

Fxprune = Callable[..., str]


def test_each_layer_gets_its_own_and_the_run_folder_knows(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    again = ("prune", "--config", pruned / "config.yaml", "--no-onnx")
    fxprune(*again, "--pattern", "2:4", "--pattern", "8=rank:ratio=0.6", "--out", tmp_path / "a")
    layers = load(tmp_path / "a" / "pruned.pt").report.layers
    assert [(layer.name, layer.status) for layer in layers][1:] == [
        ("3", "pruned"), ("8", "factored")
    ]  # fmt: skip
    assert read_yaml(tmp_path / "a" / "config.yaml")["pattern"] == {"8": "rank:ratio=0.6", "*": "2:4"}
    fxprune("prune", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b")
    first, second = (load(tmp_path / name / "pruned.pt").state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    fxprune("plot", tmp_path / "a", "--out", tmp_path / "plots", "--formats", "png")
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3


def test_a_mapping_and_a_chain_in_yaml(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    text = (
        (pruned / "config.yaml").read_text().replace("pattern: 2:4", 'pattern: {"3": rank:ratio=0.7+2:4, "8": dense}')
    )
    (tmp_path / "c.yaml").write_text(text)
    fxprune("prune", "--config", tmp_path / "c.yaml", "--no-onnx", "--out", tmp_path / "a")
    report = load(tmp_path / "a" / "pruned.pt").report
    assert [(layer.name, layer.pattern) for layer in report.layers if layer.pattern] == [("3.0", "2:4"), ("3.1", "2:4")]
    assert report["8"].reason == "dense in the recipe"
    assert report["0"].reason == "named by no entry of the recipe"


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("conv*=2:4",), "error: the recipe's 'conv*' matches no layer that the model calls; layers: '0', '3', '8'"),
        (("3=2:4", "3=1:4"), "error: two recipes are for layers '3'"),
        (("8=rank:1.5",), "error: cannot read 'rank:1.5'"),
        (("8=int8", "2:4"), "which this version of fxprune cannot do yet"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    fxprune: Fxprune, pruned: Path, tmp_path: Path, patterns: tuple[str, ...], said: str
) -> None:
    flags = [word for pattern in patterns for word in ("--pattern", pattern)]
    output = fxprune("prune", "--config", pruned / "config.yaml", "--out", tmp_path / "x", *flags, code=1)
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert said in line
    assert output.splitlines()[-1] == line


def test_a_grid_of_recipes(fxprune: Fxprune, own_model: Path, digits: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        f"register: {own_model}\nmethods: [magnitude]\ncalibration_images: 100\n"
        f"models: [{{model: tiny_cli, data: {digits}, weights: {trained / 'last.pt'}}}]\n"
        'patterns:\n  - rank:ratio=0.7+2:4\n  - {"8": dense, "*": 1:4}\n'
    )
    for _ in range(2):  # The second time all rows are there.
        said = fxprune("benchmark", tmp_path / "grid.yaml", "--out", tmp_path / "r.csv")
    assert "2 of 2 rows finished" in said
    chain, by_layer = read_rows(tmp_path / "r.csv")
    assert (chain.pattern, by_layer.pattern) == ("rank:ratio=0.7+2:4", "8: dense, *: 1:4")
    assert by_layer.layers_pruned == 1
    fxprune("plot", tmp_path / "r.csv", "--out", tmp_path, "--formats", "png")
    assert [file.name for file in tmp_path.glob("*.png")] == ["methods-tiny_cli.png"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("4GB", 4 * 10**9), ("512 MiB", 2**29), ("1.5g", 15 * 10**8), ("2e6", 2 * 10**6), ("100", 100), (None, None)],
)
def test_sizes(text: str | None, found: int | None) -> None:
    assert in_bytes(text) == found


@pytest.mark.parametrize("text", ["0", "-1GB", "4XB", "GB", "1.2.3", "", "nan", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionsError, match=r"--memory-limit .*such as 4GB or 512MiB"):
        in_bytes(text)


@pytest.mark.parametrize("command", ["prune", "low-rank"])
def test_finished_layers_are_kept_and_memory_is_limited(
    fxprune: Fxprune, own_model: Path, digits: Path, trained: Path, tmp_path: Path, command: str
) -> None:
    given = (command, "--register", own_model, "--model", "tiny_cli", "--data", digits, "--weights", trained / "last.pt",
             "--calibration-images", 100, "--no-onnx", "--checkpoint-dir", tmp_path / "layers")  # fmt: skip
    fxprune(*given, "--out", tmp_path / "a")
    assert list((tmp_path / "layers").iterdir())
    fxprune(*given, "--memory-limit", "100kB", "--out", tmp_path / "b")
    first, second = (load(tmp_path / name / "pruned.pt").state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = fxprune(*given, "--calibration-images", 90, "--out", tmp_path / "c", code=1)
    assert "checkpoint_dir" in other
    assert "--memory-limit 4 apples: write a size" in fxprune(*given, "--memory-limit", "4 apples", code=1)


def test_a_scan_is_a_table_a_csv_and_a_picture(
    fxprune: Fxprune, own_model: Path, digits: Path, trained: Path, tmp_path: Path
) -> None:
    given = ("scan", "--register", own_model, "--model", "tiny_cli", "--data", digits, "--weights", trained / "last.pt",
             "--calibration-images", 100, "--out", tmp_path / "scan")  # fmt: skip
    said = fxprune(*given, "--recipe", "2:4", "--recipe", "rank:0.6")
    assert "Relative error at the output" in said
    assert {file.name for file in (tmp_path / "scan").iterdir()} == {
        "scan.csv", "scan.png", "scan.svg", "config.yaml", "run.json"
    }  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "scan" / "scan.csv").open()))
    assert [(row["name"], row["recipe"]) for row in rows] == [(n, r) for n in "038" for r in ("2:4", "rank:0.6")]
    assert math.isnan(float(rows[0]["cost"]))
    assert f"{float(rows[2]['cost']):.2e}" in said
    assert "holds a run of fxprune scan" in fxprune(*given, code=1)
    fxprune("scan", "--config", tmp_path / "scan" / "config.yaml", "--overwrite")
    assert json.loads((tmp_path / "scan" / "run.json").read_text())["results"]["layers"] == 3
    assert "cannot read '2:5x'" in fxprune(*given, "--overwrite", "--recipe", "2:5x", code=1)


NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


def test_open_sizes_and_chosen_names_reach_the_file(fxprune: Fxprune, pruned: Path, tmp_path: Path) -> None:
    names = ("--input-names", "digit", "--output-names", "scores")
    fxprune("prune", "--config", pruned / "config.yaml", *names, "--out", tmp_path / "b")
    (tmp_path / "net.py").write_text(NET)
    given = ("--model", f"{tmp_path / 'net.py'}:net", "--input-shape", "1,28,28")
    torch.save(create(given[1]).state_dict(), tmp_path / "net.pt")
    fxprune("export", tmp_path / "net.pt", *given, *names, "--dynamic-size", "--out", tmp_path / "a.onnx")
    for file in (tmp_path / "a.onnx", tmp_path / "b" / "model.onnx"):
        graph = onnx.load(str(file)).graph
        assert [value.name for value in (*graph.input, *graph.output)] == ["digit", "scores"]
        batch, channels, *size = graph.input[0].type.tensor_type.shape.dim
        assert batch.dim_param
        assert channels.dim_value == 1
        assert [bool(side.dim_param) for side in size] == [file.name == "a.onnx"] * 2
    # The model that was pruned pools to 2 x 2, which cannot be written for open sizes.
    said = fxprune("export", pruned / "pruned.pt", "--dynamic-size", "--out", tmp_path / "c.onnx", code=1)
    assert "leave dynamic_size out" in said
    assert not (tmp_path / "c.onnx").exists()
