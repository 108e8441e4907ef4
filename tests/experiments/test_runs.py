from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxprune.errors import OptionsError
from fxprune.experiments import runs
from fxprune.experiments.runs import absolute_paths, check_folder, source_commit, start_run
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


def finished(folder: Path, command: str = "prune", *, files: tuple[str, ...] = ("pruned.pt", "report.csv")) -> Path:
    """A folder with a finished run, and a file and a folder of the user's own."""
    run = start_run(folder, command, {"seed": 1})
    for name in files:
        (folder / name).write_text("old")
    run.finish({}, files)
    (folder / "diff.html").write_text("mine")
    (folder / "plots").mkdir()
    return folder


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    for command in ("prune", "train"):
        with pytest.raises(OptionsError, match=r"holds a run of fxprune prune: replace it with --overwrite, or name"):
            start_run(folder, command, {})
    with pytest.raises(OptionsError, match="holds a run of fxprune prune"):
        check_folder(folder, "train", resume=True)
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("command", ["prune", "train", "low-rank"])
def test_overwrite_removes_what_the_old_run_wrote_and_nothing_else(tmp_path: Path, command: str) -> None:
    folder = finished(tmp_path)
    (folder / "best.pt").write_text("mine")  # fxprune prune did not write it
    start_run(folder, command, {}, overwrite=True)
    assert names(folder) == {"config.yaml", "diff.html", "plots", "best.pt"}


def test_an_unfinished_run_is_known_by_its_configuration(tmp_path: Path) -> None:
    start_run(tmp_path, "prune", {})
    for name in ("pruned.pt", ".123-model.onnx", ".git-model.onnx", "last.pt"):
        (tmp_path / name).write_text("")
    with pytest.raises(OptionsError, match="holds an unfinished run of fxprune prune"):
        start_run(tmp_path, "prune", {})
    start_run(tmp_path, "train", {"a": 1}, overwrite=True)
    assert names(tmp_path) == {"config.yaml", ".git-model.onnx", "last.pt"}
    assert read_yaml(tmp_path / "config.yaml") == {"a": 1}


def test_a_run_that_failed_before_it_wrote_anything_is_not_in_the_way(tmp_path: Path) -> None:
    start_run(tmp_path, "prune", {})
    (tmp_path / ".123-pruned.pt").write_text("half")
    start_run(tmp_path, "train", {"a": 1})
    assert names(tmp_path) == {"config.yaml"}
    assert read_yaml(tmp_path / "config.yaml") == {"a": 1}


def test_files_that_no_run_wrote_are_not_replaced_either(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    check_folder(tmp_path, "train")
    with pytest.raises(OptionsError, match=r"holds model\.onnx, which fxprune prune would write"):
        start_run(tmp_path, "prune", {})
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(OptionsError, match=r"holds config\.yaml, which fxprune train would write"):
        start_run(tmp_path, "train", {})


def test_resuming_keeps_the_files_but_not_the_record(tmp_path: Path) -> None:
    folder = finished(tmp_path, "train", files=("last.pt",))
    with pytest.raises(OptionsError, match="go on with --resume"):
        start_run(folder, "train", {})
    start_run(folder, "train", {}, resume=True)
    assert names(folder) == {"config.yaml", "last.pt", "diff.html", "plots"}


def test_a_record_cannot_have_other_files_removed(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    record = json.loads((folder / "run.json").read_text())
    for files in (["../outside", str(outside), "plots/..", "*", "", 3, None], "outside"):
        (folder / "run.json").write_text(json.dumps(record | {"files": files}))
        start_run(folder, "prune", {}, overwrite=True).finish({})
        assert outside.read_text() == "mine"
        assert {"diff.html", "plots"} <= names(folder)


def test_what_the_run_reads_is_not_removed(tmp_path: Path) -> None:
    folder = finished(tmp_path, "train", files=("best.pt", "last.pt"))
    with pytest.raises(OptionsError, match=r"weights is .* which --overwrite would remove"):
        start_run(folder, "prune", {"weights": f"{folder}/../{folder.name}/best.pt"}, overwrite=True)
    assert (folder / "best.pt").exists()


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.npz").write_text("")
    Path("digits").mkdir()
    config = {
        "weights": "a/best.pt", "data": "mine.npz", "out": "out", "root": None, "register": ["reg.py", "my.package"],
        "model": "nets.py:Net", "seed": 0,
    }  # fmt: skip
    run = start_run("out", "prune", config)
    assert run.config == read_yaml("out/config.yaml") == {
        "weights": f"{tmp_path}/a/best.pt", "data": f"{tmp_path}/mine.npz", "out": f"{tmp_path}/out", "root": None,
        "register": [f"{tmp_path}/reg.py", "my.package"], "model": f"{tmp_path}/nets.py:Net", "seed": 0,
    }  # fmt: skip
    assert absolute_paths({"data": "digits", "model": "timm/resnet18"}) == {"data": "digits", "model": "timm/resnet18"}
    run.finish({})
    assert json.loads(Path("out/run.json").read_text())["working_directory"] == str(tmp_path)


def test_the_commit_is_that_of_fxprunes_own_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = source_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40
    # As if installed into a folder that no repository tracks.
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert source_commit() is None
