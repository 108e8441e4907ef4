from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxprune.experiments import runs
from fxprune.experiments.runs import source_commit, start_run
from fxprune.experiments.yaml_files import read_yaml


def test_a_run_says_how_it_was_made(tmp_path: Path) -> None:
    config = {"pattern": "2:4", "seed": 3, "weights": None, "mean": [0.5]}
    run = start_run(tmp_path / "a" / "b", "prune", config)
    assert read_yaml(run.folder / "config.yaml") == config
    assert not (run.folder / "run.json").exists()
    run.finish({"accuracy": 91.0})
    record = json.loads((run.folder / "run.json").read_text())
    assert record["config"] == config
    assert record["results"] == {"accuracy": 91.0}
    assert record["seconds"] >= 0
    assert {"python", "torch", "fxprune"} <= set(record["versions"])
    assert record["machine"]["torch_threads"] >= 1


def test_a_new_run_removes_the_old_record(tmp_path: Path) -> None:
    start_run(tmp_path, "prune", {}).finish({})
    start_run(tmp_path, "prune", {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_the_commit_is_that_of_fxprunes_own_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = source_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40
    # As if installed into a folder that no repository tracks.
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert source_commit() is None
