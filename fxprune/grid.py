"""A benchmark grid: models x patterns x methods x seeds, read from YAML, run row by row into one CSV."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune import solvers
from fxprune.compiler import compile
from fxprune.data import DataSplits, calibration_loader
from fxprune.errors import DataError, FxPruneError, OptionsError
from fxprune.evaluation import agreement, evaluate
from fxprune.files import atomic
from fxprune.options import Options
from fxprune.pattern import Pattern
from fxprune.runs import source_commit
from fxprune.tasks import Task, import_user_code, scoring_loader
from fxprune.yaml_files import check_keys, read_yaml

OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Row:
    """One line of the CSV: what was run, then what came out. Accuracies and agreement in percent.

    Attributes:
        name: the model's label.
        task: model, data and further fields of the task, as JSON.
        weights: the first digits of the weights file's SHA-256, or "pretrained": other weights are another row.
        pattern: as asked for.
        method: as asked for.
        seed: of the calibration images, and of whatever is random.
        calibration_images: how many.
        settings: options, exclude and test_images, as JSON.
        status: "ok" or "failed".
        error: what went wrong.
    """

    name: str
    task: str
    weights: str
    pattern: str
    method: str
    seed: int
    calibration_images: int
    settings: str
    status: str = ""
    dense_accuracy: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sparsity: float | None = None
    layers_pruned: int | None = None
    seconds: float | None = None
    commit: str = ""
    error: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same row: all that comes before the status."""
        return tuple(str(getattr(self, name)) for name in KEY)


KEY = tuple(field.name for field in dataclasses.fields(Row))[:8]
NUMBERS = {"seed": int, "calibration_images": int, "layers_pruned": int} | dict.fromkeys(
    ("dense_accuracy", "accuracy", "agreement", "kl", "sparsity", "seconds"), float
)


@dataclass(frozen=True)
class Grid:
    """What to run: the product of models, patterns, methods, seeds and numbers of calibration images.

    Attributes:
        models: label and task of each.
        patterns: "2:4", "0.9", ...
        methods: names of solvers.
        seeds: one row each.
        calibration_images: likewise.
        options: of every row.
        exclude: layers to leave as they are, by name or pattern.
        test_images: score on the first so many; None takes all.
        batch_size: of calibration.
        register: modules or .py files that register models or solvers.
    """

    models: tuple[tuple[str, Task], ...]
    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    calibration_images: tuple[int, ...] = (1024,)
    options: Options = Options()
    exclude: tuple[str, ...] = ()
    test_images: int | None = None
    batch_size: int = 128
    register: tuple[str, ...] = ()


def read_grid(path: str | Path) -> Grid:
    """Read a grid from YAML; keys are the fields of Grid, a model is a mapping of Task's fields and `name`.

    Raises:
        OptionsError: an unknown key or a value of the wrong type.
        PatternError: a pattern that cannot be read.
        FxPruneError: an unknown method, or user code that cannot be imported.
    """
    content = read_yaml(path)
    check_keys(content, (field.name for field in dataclasses.fields(Grid)), str(path))
    for key in ("models", "patterns", "methods"):
        if not content.get(key):
            raise OptionsError(f"{path}: {key} is missing; a grid needs models, patterns and methods")
    if "seed" in (content.get("options") or {}):
        raise OptionsError(f"{path}: options holds a seed; a grid has seeds: [...] of its own")
    lists = {key: _list(content[key]) for key in ("patterns", "methods", "exclude", "register") if content.get(key)}
    numbers = {key: _list(content[key]) for key in ("seeds", "calibration_images") if content.get(key) is not None}
    try:
        grid = Grid(
            models=tuple(_model(entry, path) for entry in content["models"]),
            options=_record(Options, content.get("options") or {}, f"{path}: options"),
            **{key: tuple(map(str, value)) for key, value in lists.items()},
            **{key: tuple(map(int, value)) for key, value in numbers.items()},
            **{key: int(content[key]) for key in ("test_images", "batch_size") if content.get(key) is not None},
        )
    except (TypeError, ValueError) as error:
        raise OptionsError(f"{path}: {error}") from error
    import_user_code(grid.register)
    for pattern in grid.patterns:
        Pattern.parse(pattern)
    for method in grid.methods:
        solvers.get(method)
    names = [name for name, _ in grid.models]
    if len(set(names)) < len(names):
        raise OptionsError(f"{path}: two models have the same name; give each a name of its own ({', '.join(names)})")
    return grid


def run_grid(
    grid: Grid,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
    on_row: Callable[[Row, int, int], None] = lambda row, number, rows: None,
) -> list[Row]:
    """Run every row that the CSV does not hold as finished, and write the CSV after each.

    Rows of an earlier grid stay in the file; rows that failed are run again. A row's failure is written down and ends
    that row alone.

    Args:
        grid: what to run.
        path: the CSV.
        device: where to compute; None takes CUDA if there is one.
        progress: show a progress bar for each compilation.
        on_row: called after each row, also for one that was there already, with its number from 1 and how many there are.

    Returns:
        The grid's rows in order.

    Raises:
        DataError: the CSV is there but none that this function wrote.
        OSError: the CSV cannot be written.
    """
    known = {row.key: row for row in read_rows(path)} if Path(path).exists() else {}
    rows: list[Row] = []
    count = len(grid.models) * sum(1 for _ in _combinations(grid))
    commit = source_commit() or ""
    for name, task in grid.models:
        prepared: _Prepared | None = None
        for pattern, method, seed, images in _combinations(grid):
            row = _row(grid, name, task, pattern, method, seed, images)
            done = known.get(row.key)
            if done is None or done.status != OK:
                try:
                    prepared = prepared or _Prepared.of(task, grid, device)
                    found = prepared.run(row, grid, progress)
                    done = dataclasses.replace(row, status=OK, commit=commit, **found)
                except Exception as error:  # whatever it is, it is this row's alone
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    done = dataclasses.replace(row, status=FAILED, commit=commit, error=text)
                known[row.key] = done
                write_rows(path, known.values())
            rows.append(done)
            on_row(done, len(rows), count)
    return rows


@dataclass(frozen=True)
class _Prepared:
    """What all rows of one model share."""

    model: nn.Module
    splits: DataSplits
    test: Any
    dense_accuracy: float
    device: torch.device | str | None

    @classmethod
    def of(cls, task: Task, grid: Grid, device: torch.device | str | None) -> _Prepared:
        splits = task.load_data()
        model = task.trained_model(splits.info.num_classes)
        test = scoring_loader(splits, images=grid.test_images)
        return cls(model, splits, test, evaluate(model, test, device), device)

    def run(self, row: Row, grid: Grid, progress: bool) -> dict[str, Any]:
        images = calibration_loader(self.splits.train, row.calibration_images, grid.batch_size, seed=row.seed)
        options = dataclasses.replace(grid.options, seed=row.seed)
        compiled = compile(
            self.model, images, row.pattern,
            method=row.method, exclude=grid.exclude, device=self.device, progress=progress, options=options,
        )  # fmt: skip
        close = agreement(self.model, compiled, self.test, self.device)
        return {
            "dense_accuracy": self.dense_accuracy,
            "accuracy": evaluate(compiled, self.test, self.device),
            "agreement": close.top1,
            "kl": close.kl,
            "sparsity": compiled.report.sparsity,
            "layers_pruned": sum(layer.status == "pruned" for layer in compiled.report.layers),
            "seconds": round(compiled.report.seconds, 3),
        }
