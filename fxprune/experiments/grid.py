"""A benchmark grid: models x patterns x methods x seeds, read from YAML, run row by row into one CSV."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fxprune import solvers
from fxprune.compiler import compile
from fxprune.data import DataSplits, calibration_loader
from fxprune.errors import OptionsError
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.experiments.grid_rows import FAILED, OK, Row, read_rows, write_rows
from fxprune.experiments.recipe_texts import RecipeText
from fxprune.experiments.runs import source_commit
from fxprune.experiments.tasks import Task, import_user_code, scoring_loader
from fxprune.experiments.yaml_files import check_keys, read_yaml
from fxprune.options import Options
from fxprune.recipe import Recipe
from fxprune.runtime.devices import default_device
from fxprune.runtime.processes import alone, gathered, on_first, world

T = TypeVar("T")
Record = TypeVar("Record", Task, Options)


@dataclass(frozen=True)
class Grid:
    """What to run: the product of models, patterns, methods, seeds and numbers of calibration images.

    Attributes:
        models: label and task of each.
        patterns: recipes as `fxprune.compile` takes them: "2:4", "rank:0.7+2:4", {"fc": "dense", "*": "2:4"}.
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
    patterns: tuple[RecipeText, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    calibration_images: tuple[int, ...] = (1024,)
    options: Options = field(default_factory=Options)
    exclude: tuple[str, ...] = ()
    test_images: int | None = None
    batch_size: int = 128
    register: tuple[str, ...] = ()


_TEXTS = ("methods", "exclude", "register")
_NUMBERS = ("seeds", "calibration_images")


def read_grid(path: str | Path) -> Grid:
    """Read a grid from YAML; keys are the fields of Grid, a model is a mapping of Task's fields and `name`.

    Raises:
        OptionsError: an unknown key or a value of the wrong type.
        PatternError: a recipe that cannot be read.
        FxPruneError: an unknown method, or user code that cannot be imported.
    """
    content = read_yaml(path)
    check_keys(content, (f.name for f in dataclasses.fields(Grid)), str(path))
    for key in ("models", "patterns", "methods"):
        if not content.get(key):
            raise OptionsError(f"{path}: {key} is missing; a grid needs models, patterns and methods")
    if "seed" in (content.get("options") or {}):
        raise OptionsError(f"{path}: options holds a seed; a grid has seeds: [...] of its own")
    given: dict[str, Any] = {}
    try:
        given |= {key: tuple(map(str, _list(content[key]))) for key in _TEXTS if content.get(key) is not None}
        given |= {key: tuple(map(int, _list(content[key]))) for key in _NUMBERS if content.get(key) is not None}
        given |= {key: int(content[key]) for key in ("test_images", "batch_size") if content.get(key) is not None}
        given["patterns"] = tuple(map(_recipe, _list(content["patterns"])))
        given["models"] = tuple(_model(entry, path) for entry in _list(content["models"]))
        given["options"] = _record(Options, content.get("options") or {}, f"{path}: options")
    except (TypeError, ValueError) as error:
        raise OptionsError(f"{path}: {error}") from error
    grid = Grid(**given)
    import_user_code(grid.register)
    for pattern in grid.patterns:
        Recipe.parse(pattern)
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

    Finished rows of an earlier grid stay in the file; rows that failed are run again. A row's failure is written down and
    ends that row alone.

    Of several processes each runs rows of its own, alone, and writes them to a file beside the CSV, into which the first one
    gathers them at the end. What is left of a run that was cut short is taken up by the next one.

    Args:
        grid: what to run.
        path: the CSV.
        device: where to compute; None takes CUDA if there is one.
        progress: show a progress bar for each compilation.
        on_row: called after each row of this process, also for one that was there already, with its number from 1 and how many
            there are.

    Returns:
        The grid's rows in order.

    Raises:
        DataError: the CSV is there but none that this function wrote.
        OSError: the CSV cannot be written.
    """
    path, here = Path(path), world()
    known = on_first(lambda: _finished(path))
    tasks = dict(grid.models)
    rows = [(_row(grid, name, task, *of), of[0]) for name, task in tasks.items() for of in _combinations(grid)]
    missing = [row.key for row, _ in rows if row.key not in known]
    to_run = {*missing[here.number :: here.count]}
    commit, place = source_commit() or "", default_device(device)
    # Loaded once, and only if a row needs it; if that fails, it fails for all rows alike.
    prepare = functools.lru_cache(maxsize=1)(lambda name: _attempt(_Prepared.of, tasks[name], grid, place))
    own: dict[tuple[str, ...], Row] = {}
    for number, (row, recipe) in enumerate(rows, start=1):
        if row.key in to_run:
            with alone():
                prepared, error = prepare(row.name)
                found: dict[str, Any] | None = None
                if prepared is not None:
                    found, error = _attempt(prepared.run, row, recipe, grid, progress)
            status = FAILED if found is None else OK
            own[row.key] = dataclasses.replace(row, status=status, commit=commit, error=error, **(found or {}))
            if here.count == 1:
                write_rows(path, [*known.values(), *own.values()])
            else:
                write_rows(_part(path, here.number), own.values())
        if row.key in own or (row.key in known and here.is_first):
            on_row(own.get(row.key) or known[row.key], number, len(rows))
    for of_one in gathered(own):
        known |= of_one
    asked_for = [known.pop(row.key) for row, _ in rows]
    if here.count > 1:
        on_first(lambda: _gather(path, [*known.values(), *asked_for]))
    return asked_for


def _finished(path: Path) -> dict[tuple[str, ...], Row]:
    """The finished rows of the CSV, with those that processes of a run that was cut short have left beside it."""
    files = [path, *_parts(path)]
    known = {row.key: row for file in files if file.exists() for row in read_rows(file) if row.status == OK}
    if len(files) > 1:
        _gather(path, known.values())
    return known


def _gather(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows to the CSV, and only then remove what processes have written beside it."""
    write_rows(path, rows)
    for part in _parts(path):
        part.unlink()


def _part(path: Path, process: int) -> Path:
    """Where one of several processes writes its rows."""
    return path.with_name(f"{path.name}.process{process}")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.process*"))


def _attempt(function: Callable[..., T], *arguments: Any) -> tuple[T | None, str]:
    """What a function returns, and ""; or None and what went wrong, whatever it is."""
    try:
        return function(*arguments), ""
    except Exception as error:
        return None, " ".join(f"{type(error).__name__}: {error}".split())


@dataclass(frozen=True)
class _Prepared:
    """What all rows of one model share."""

    model: nn.Module
    splits: DataSplits
    test: Any
    dense_accuracy: float
    device: torch.device

    @classmethod
    def of(cls, task: Task, grid: Grid, device: torch.device) -> _Prepared:
        splits = task.load_data()
        model = task.trained_model(splits.info.num_classes)
        test = scoring_loader(splits, images=grid.test_images)
        return cls(model, splits, test, evaluate(model, test, device), device)

    def run(self, row: Row, recipe: RecipeText, grid: Grid, progress: bool) -> dict[str, Any]:
        images = calibration_loader(self.splits.train, row.calibration_images, grid.batch_size, seed=row.seed)
        options = dataclasses.replace(grid.options, seed=row.seed)
        compiled = compile(
            self.model, images, recipe,
            method=row.method, exclude=grid.exclude, device=self.device, progress=progress, options=options,
        )  # fmt: skip
        close = agreement(self.model, compiled, self.test, self.device)
        return {
            "dense_accuracy": self.dense_accuracy,
            "accuracy": evaluate(compiled, self.test, self.device),
            "agreement": close.top1,
            "kl": close.kl,
            "sparsity": compiled.report.sparsity,
            "layers_pruned": sum(layer.is_compressed for layer in compiled.report.layers),
            "seconds": round(compiled.report.seconds, 3),
        }


def _combinations(grid: Grid) -> Iterator[tuple[RecipeText, str, int, int]]:
    return itertools.product(grid.patterns, grid.methods, grid.seeds, grid.calibration_images)


def _row(grid: Grid, name: str, task: Task, recipe: RecipeText, method: str, seed: int, images: int) -> Row:
    """The row before it is run."""
    where = {"data": task.data, "model": task.model} | _changed(task, Task(task.model, task.data, task.weights))
    settings = _changed(grid.options, Options())
    settings |= {key: value for key in ("exclude", "test_images") if (value := getattr(grid, key))}
    return Row(
        name=name,
        task=json.dumps(where),
        weights=_fingerprint(task),
        pattern=str(Recipe.parse(recipe)),
        method=method,
        seed=seed,
        calibration_images=images,
        settings=json.dumps(settings),
    )


def _changed(record: Any, default: Any) -> dict[str, Any]:
    """Fields that are not as in `default`."""
    names = [f.name for f in dataclasses.fields(record)]
    return {name: getattr(record, name) for name in names if getattr(record, name) != getattr(default, name)}


def _fingerprint(task: Task) -> str:
    if task.weights is None or not Path(task.weights).is_file():
        return "pretrained" if task.pretrained else "absent"
    return hashlib.sha256(Path(task.weights).read_bytes()).hexdigest()[:12]


def _recipe(value: Any) -> RecipeText:
    return {str(name): str(of) for name, of in value.items()} if isinstance(value, Mapping) else str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _model(entry: Any, path: str | Path) -> tuple[str, Task]:
    if not isinstance(entry, Mapping):
        raise OptionsError(f"{path}: a model is a mapping such as {{model: simple_cnn, data: digits}}, not {entry!r}")
    fields = {key.replace("-", "_"): value for key, value in entry.items()}
    name = fields.pop("name", fields.get("model"))
    task = _record(Task, fields, f"{path}: model {name!r}")
    if task.model is None or task.data is None:
        raise OptionsError(f"{path}: model {name!r} needs both model and data")
    return str(name), task


def _record(record: type[Record], values: Mapping[str, Any], where: str) -> Record:
    values = {key.replace("-", "_"): tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    check_keys(values, (f.name for f in dataclasses.fields(record)), where)
    return record(**values)
