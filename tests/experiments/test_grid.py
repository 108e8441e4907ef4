from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.errors import DataError, FxPruneError, OptionsError
from fxprune.experiments import grid as grid_module
from fxprune.experiments.checkpoints import save_checkpoint
from fxprune.experiments.grid import Grid, read_grid, run_grid
from fxprune.experiments.grid_rows import Row, read_rows, write_rows
from fxprune.experiments.tasks import Task
from fxprune.models import create, register
from fxprune.options import Options


@register("tiny_grid", input_shape=(1, 8, 8), num_classes=3, mean=(0.5,), std=(0.5,))
def tiny(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, num_classes))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 60), ("test", 30)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "data.npz", **arrays)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "weights.pt", create("tiny_grid"))
    return Task("tiny_grid", str(tmp_path / "data.npz"), str(tmp_path / "weights.pt"))


def small(task: Task, **changes: object) -> Grid:
    given = {"patterns": ("2:4", "0.5"), "methods": ("magnitude", "sparsegpt"), "calibration_images": (30,)}
    return Grid(models=(("tiny", task),), **{**given, **changes})  # type: ignore[arg-type]


def test_every_combination_is_a_row(task: Task, tmp_path: Path) -> None:
    seen: list[tuple[Row, int, int]] = []
    rows = run_grid(small(task, seeds=(0, 1)), tmp_path / "r.csv", device="cpu", on_row=lambda *a: seen.append(a))
    assert [(row.pattern, row.method, row.seed) for row in rows] == [
        (p, m, s) for p in ("2:4", "0.5") for m in ("magnitude", "sparsegpt") for s in (0, 1)
    ]
    assert all(row.status == "ok" and row.layers_pruned and row.sparsity > 0.4 for row in rows)  # type: ignore[operator]
    assert [(number, count) for _, number, count in seen] == [(i, 8) for i in range(1, 9)]
    assert read_rows(tmp_path / "r.csv") == rows
    sparse = [row.accuracy for row in rows]
    assert len({row.dense_accuracy for row in rows}) == 1
    assert all(0 <= accuracy <= 100 for accuracy in sparse)  # type: ignore[operator]


def test_figures_are_those_of_the_compiler(task: Task, tmp_path: Path) -> None:
    import fxprune
    from fxprune.data import calibration_loader, make_loader
    from fxprune.experiments.evaluation import agreement

    (row,) = run_grid(
        small(task, patterns=("1:4",), methods=("sparsegpt",), seeds=(3,), options=Options(damping=0.3)),
        tmp_path / "r.csv", device="cpu",
    )  # fmt: skip
    splits = task.load_data()
    model = task.trained_model(3)
    loader = calibration_loader(splits.train, 30, seed=3)
    compiled = fxprune.compile(
        model, loader, "1:4", method="sparsegpt", device="cpu", progress=False, options=Options(damping=0.3, seed=3)
    )
    close = agreement(model, compiled, make_loader(splits.test))
    assert (row.agreement, row.kl) == (pytest.approx(close.top1), pytest.approx(close.kl))
    assert row.sparsity == compiled.report.sparsity
    assert '"damping": 0.3' in row.settings


def test_a_failing_row_loses_no_other(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = grid_module.compile

    def compile_but(model: nn.Module, images: object, pattern: str, **kwargs: object) -> object:
        if (pattern, kwargs["method"]) == ("2:4", "sparsegpt"):
            raise RuntimeError("CUDA out of\n memory")
        return true(model, images, pattern, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(grid_module, "compile", compile_but)
    rows = run_grid(small(task), tmp_path / "r.csv", device="cpu")
    assert [row.status for row in rows] == ["ok", "failed", "ok", "ok"]
    assert rows[1].error == "RuntimeError: CUDA out of memory"
    assert rows[1].accuracy is None

    # The next run keeps the three and tries the one again.
    calls: list[str] = []

    def noting(*args: object, **kwargs: object) -> object:
        calls.append(str(kwargs["method"]))
        return true(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(grid_module, "compile", noting)
    again = run_grid(small(task), tmp_path / "r.csv", device="cpu")
    assert calls == ["sparsegpt"]
    assert [row.status for row in again] == ["ok"] * 4
    assert again[0] == rows[0]
    assert len(read_rows(tmp_path / "r.csv")) == 4


def test_a_model_that_cannot_be_loaded_fails_all_its_rows_once(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str | None] = []
    true = Task.load_data
    monkeypatch.setattr(Task, "load_data", lambda self: loads.append(self.weights) or true(self))
    gone = dataclasses.replace(task, weights=str(tmp_path / "gone.pt"))
    grid = dataclasses.replace(small(task, patterns=("2:4",)), models=(("gone", gone), ("tiny", task)))
    rows = run_grid(grid, tmp_path / "r.csv", device="cpu")
    assert [row.status for row in rows] == ["failed", "failed", "ok", "ok"]
    assert "gone.pt" in rows[0].error
    assert loads == [gone.weights, task.weights]


def test_an_interruption_keeps_what_is_finished(task: Task, tmp_path: Path) -> None:
    def stop(row: Row, number: int, rows: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grid(small(task), tmp_path / "r.csv", device="cpu", on_row=stop)
    assert [row.status for row in read_rows(tmp_path / "r.csv")] == ["ok", "ok"]


def test_rows_of_another_grid_stay_and_other_weights_are_other_rows(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    one = {"patterns": ("2:4",), "methods": ("magnitude",)}
    run_grid(small(task, **one), path, device="cpu")
    run_grid(small(task, patterns=("1:4",), methods=("magnitude",)), path, device="cpu")
    assert [row.pattern for row in read_rows(path)] == ["2:4", "1:4"]
    torch.manual_seed(1)
    save_checkpoint(task.weights, create("tiny_grid"))  # type: ignore[arg-type]
    run_grid(small(task, **one), path, device="cpu")
    run_grid(small(task, **one, options=Options(damping=0.5)), path, device="cpu")
    assert len(read_rows(path)) == 4


def test_a_grid_is_read_from_yaml(task: Task, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(
        f"models:\n  - {{name: a, model: tiny_grid, data: {task.data}, weights: w.pt, num-classes: 3, mean: [0.5], std: [1]}}\n"
        "  - {model: resnet20, data: cifar10, pretrained: true}\n"
        "patterns: [2:4, 0.9]\nmethods: admm\nseeds: [0, 1]\ncalibration-images: 64\n"
        "options: {damping: 0.1, refit: false}\nexclude: fc\ntest_images: 10\n"
    )
    grid = read_grid(tmp_path / "grid.yaml")
    assert grid.models == (
        ("a", Task("tiny_grid", task.data, "w.pt", num_classes=3, mean=(0.5,), std=(1,))),
        ("resnet20", Task("resnet20", "cifar10", pretrained=True)),
    )
    assert (grid.patterns, grid.methods, grid.seeds, grid.calibration_images) == (
        ("2:4", "0.9"),
        ("admm",),
        (0, 1),
        (64,),
    )
    assert grid.options == Options(damping=0.1, refit=False)
    assert (grid.exclude, grid.test_images) == (("fc",), 10)


GOOD = "models: [{model: simple_cnn, data: digits}]\npatterns: [2:4]\nmethods: [admm]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pattern: [2:4]\n", "unknown key 'pattern'; did you mean patterns"),
        ("models: []\npatterns: [2:4]\nmethods: [admm]\n", "models is missing"),
        (GOOD.replace("2:4", "4:2"), "4:2"),
        (GOOD.replace("admm", "adm"), "unknown method 'adm'"),
        (GOOD.replace("data: digits", "dat: digits"), "model 'simple_cnn': unknown key 'dat'; did you mean data"),
        (GOOD.replace(", data: digits", ""), "needs both model and data"),
        (GOOD.replace("{model: simple_cnn, data: digits}", "simple_cnn"), "a model is a mapping"),
        (GOOD + "seeds: [a]\n", "invalid literal"),
        (GOOD + "options: {dampin: 1}\n", "unknown key 'dampin'"),
        (GOOD + "options: {damping: -1}\n", "damping is -1"),
        (GOOD + "options: {seed: 1}\n", "seeds"),
        (GOOD.replace("[{", "[{model: simple_cnn, data: mnist}, {"), "same name"),
        (GOOD + "register: no_such_file.py\n", "no_such_file"),
    ],
)
def test_wrong_grids_are_errors(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(FxPruneError, match=said):
        read_grid(tmp_path / "grid.yaml")


def test_a_csv_of_something_else_is_not_overwritten(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("my,own,figures\n1,2,3\n")
    with pytest.raises(DataError, match="no CSV of fxprune benchmark"):
        run_grid(small(task), path)
    assert path.read_text() == "my,own,figures\n1,2,3\n"
    assert issubclass(OptionsError, FxPruneError)


def test_rows_survive_the_csv(tmp_path: Path) -> None:
    rows = [
        Row("a, b", '{"x": 1}', "w", "2:4", "admm", 0, 10, "{}", "ok", 90.0, 1 / 3, 99.5, 1e-17, 0.5, 3, 1.25, "c"),
        Row("c", "{}", "absent", "0.9", "m", 1, 10, "{}", "failed", error='said "no",\tand left'),
    ]
    write_rows(tmp_path / "r.csv", rows)
    assert read_rows(tmp_path / "r.csv") == rows
    assert len(list(csv.reader((tmp_path / "r.csv").open()))) == 3
