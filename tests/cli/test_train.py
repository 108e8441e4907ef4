from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxprune.experiments.checkpoints import load_checkpoint
from fxprune.models import create

Fxprune = Callable[..., str]
DIGITS = "the fixture's file"


def test_it_learns_and_writes_a_run_folder(trained: Path) -> None:
    assert {file.name for file in trained.iterdir()} == {"best.pt", "last.pt", "log.csv", "config.yaml", "run.json"}
    rows = list(csv.DictReader((trained / "log.csv").open()))
    record = json.loads((trained / "run.json").read_text())
    results = record["results"]
    assert float(rows[-1]["val_accuracy"]) == results["last"]["val_accuracy"] > 60
    assert results["best"]["val_accuracy"] == max(float(row["val_accuracy"]) for row in rows)
    assert results["best"]["test_accuracy"] > 60
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["config"]["epochs"] == 2
    assert record["command"] == "train"


def test_the_same_configuration_gives_the_same_weights(fxprune: Fxprune, trained: Path, tmp_path: Path) -> None:
    fxprune("train", "--config", trained / "config.yaml", "--out", tmp_path)
    first, second = (torch.load(folder / "last.pt", weights_only=True)["state_dict"] for folder in (trained, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resuming_goes_on_and_an_old_training_is_kept(fxprune: Fxprune, trained: Path, tmp_path: Path) -> None:
    base = ("train", "--config", trained / "config.yaml", "--out", tmp_path)
    fxprune(*base, "--epochs", 1)
    assert "--resume" in fxprune(*base, "--epochs", 1, code=1)
    assert "another recipe" in fxprune(*base, "--resume", code=1)
    fxprune(*base, "--epochs", 1, "--resume")
    assert load_checkpoint(tmp_path / "last.pt", create("tiny_cli")).epoch == 1
    fxprune(*base, "--overwrite", "--test-images", 100)
    assert load_checkpoint(tmp_path / "last.pt", create("tiny_cli")).epoch == 2


def test_validation_images_are_held_out_of_training(fxprune: Fxprune, trained: Path, tmp_path: Path) -> None:
    base = ("train", "--config", trained / "config.yaml", "--epochs", 1)
    assert "best on 250 validation images" in fxprune(*base, "--validation", 0.25, "--out", tmp_path / "some")
    assert "validation images" not in fxprune(*base, "--validation", 0, "--out", tmp_path / "none")
    best, last = (
        torch.load(tmp_path / "none" / name, weights_only=True)["state_dict"] for name in ("best.pt", "last.pt")
    )
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_training_goes_on_from_given_weights(fxprune: Fxprune, trained: Path, tmp_path: Path) -> None:
    fxprune("train", "--config", trained / "config.yaml", "--out", tmp_path, "--weights", trained / "last.pt",
            "--epochs", 1, "--learning-rate", 1e-3, "--optimizer", "adamw", "--schedule", "cosine")  # fmt: skip
    before, after = (json.loads((folder / "run.json").read_text())["results"] for folder in (trained, tmp_path))
    assert after["last"]["train_loss"] < before["last"]["train_loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "simple_cn", "--data", "digits"), "no model named 'simple_cn'; did you mean simple_cnn"),
        (("--model", "simple_cnn", "--data", "digit"), "did you mean digits"),
        (("--model", "simple_cnn"), "no data set is named"),
        (("--data", DIGITS, "--mean", "0.5", "--std", "1"), "no model is named"),
        (("--model", "simple_cnn", "--data", "digits", "--learning-rate", "-1"), "learning_rate is -1.0"),
        (("--model", "simple_cnn", "--data", "digits", "--register", "no_such.py"), "cannot import 'no_such.py'"),
        (("--model", "simple_cnn", "--data", DIGITS, "--weights", "no.pt"), "there is no file no.pt"),
    ],
)
def test_errors_name_what_is_wrong(
    fxprune: Fxprune, digits: Path, arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    arguments = tuple(str(digits) if argument == DIGITS else argument for argument in arguments)
    output = fxprune("train", *arguments, "--out", tmp_path / "x", code=1)
    assert said in output
    assert output.count("\n") <= 2
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_whole_checkpoints_and_exit_code_130(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxprune", "train", "--config", str(trained / "config.yaml"), "--epochs", "500",
               "--out", str(tmp_path)]  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    until = time.monotonic() + 120
    while not (tmp_path / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert load_checkpoint(tmp_path / "last.pt", create("tiny_cli")).epoch >= 1
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert not (tmp_path / "run.json").exists()
