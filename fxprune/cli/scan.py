"""fxprune scan: what each layer would cost under each recipe, as a table, a CSV and a picture."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.command import Group, stderr, stdout, warn, working
from fxprune.cli.parameters import (
    SOLVER,
    TASK,
    BatchSize,
    CalibrationImages,
    Device,
    Exclude,
    MemoryLimit,
    Out,
    Overwrite,
    Register,
    data_name,
    in_bytes,
    model_name,
)  # fmt: skip
from fxprune.errors import OptionsError
from fxprune.experiments.tasks import Task, import_user_code
from fxprune.options import Options

TABLE, PICTURE = "scan.csv", "scan"
RECIPES = ("2:4", "1:4")
HOW = Group(SOLVER.title, left_out=("global_budget", "polish"))  # of the network, not of a layer


def scan(
    task: Annotated[Task, TASK],
    options: Annotated[Options, HOW],
    config: dict[str, Any],
    *,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="2:4, 0.9, rank:0.5, rank:0.5+2:4, ...; once for each. 2:4 and 1:4 by default."),
    ] = None,
    method: Annotated[str, typer.Option(help="admm, sparsegpt, exact_obs, magnitude, or one of your own.")] = "admm",
    exclude: Exclude = None,
    calibration_images: CalibrationImages = 256,
    out: Out = None,
    overwrite: Overwrite = False,
    register: Register = None,
    batch_size: BatchSize = 128,
    device: Device = None,
    memory_limit: MemoryLimit = None,
) -> None:
    """Measure what it would cost at the model's output to compress each layer alone, under each of several recipes.

    Nothing is changed. The figures say which layers to spare, with --exclude or a recipe of their own; see --pattern of
    fxprune prune.
    """
    from fxprune import solvers
    from fxprune.constraints import parse_chain
    from fxprune.data import calibration_split, make_loader
    from fxprune.experiments.runs import check_folder, start_run
    from fxprune.files import atomic
    from fxprune.runtime.processes import on_first, world
    from fxprune.scanning import scan

    if task.model is None or task.data is None:
        raise OptionsError("name a model and images to calibrate on, with --model and --data; fxprune scan --help")
    limit, recipes = in_bytes(memory_limit), tuple(dict.fromkeys(recipe or RECIPES))
    for text in recipes:
        parse_chain(text)
    import_user_code(register or ())
    solvers.get(method)
    folder = out or Path("out", "scan", f"{model_name(task.model)}-{data_name(task.data)}-{method}")
    if world().is_first:
        check_folder(folder, "scan", overwrite=overwrite)
    with working(f"reading {task.data}"):
        splits = task.load_data(labelled=False)
    model = task.trained_model(splits.info.num_classes)
    chosen, _ = calibration_split(splits.train, calibration_images, options.seed, balanced=splits.labelled)
    run = on_first(lambda: start_run(folder, "scan", config, overwrite=overwrite))
    found = scan(
        model, make_loader(chosen, batch_size=batch_size), recipes, method=method, exclude=tuple(exclude or ()),
        options=options, device=device, progress=stderr.is_terminal, memory_limit=limit,
    )  # fmt: skip
    if not world().is_first:
        return
    stdout.out(found.render(color=stdout.is_terminal), highlight=False)
    with atomic(folder / TABLE) as part:
        found.to_csv(part)
    files = [TABLE]
    try:
        plots: Any = importlib.import_module("fxprune.plots")
    except ModuleNotFoundError as error:
        warn(f"there is no picture without {error.name}: pip install 'fxprune[plot]'")
    else:
        picture = plots.costs_at_the_output(found, model_name(task.model))
        files += [file.name for file in plots.save_figure(picture, folder / PICTURE)]
    run.finish({"layers": len(found.layers) // len(recipes)}, files)
    stdout.print(f"\n{folder}: {', '.join(files)}, run.json", soft_wrap=True)
