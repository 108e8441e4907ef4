"""fxprune train: trains a named model on a named data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fxprune.cli.command import Group, stderr, stdout, working
from fxprune.cli.parameters import (
    DATA,
    RUNNING,
    TASK,
    BatchSize,
    Device,
    Out,
    Overwrite,
    Register,
    TestImages,
    data_name,
    model_name,
)
from fxprune.errors import OptionsError
from fxprune.experiments.tasks import Task, import_user_code, scoring_loader
from fxprune.experiments.training_recipe import TrainingRecipe

if TYPE_CHECKING:  # imported when a command starts
    from fxprune.experiments.training import Epoch, Step


def train(
    task: Annotated[Task, TASK],
    recipe: Annotated[TrainingRecipe, Group("Recipe", everyday=("epochs",))],
    config: dict[str, Any],
    *,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from last.pt, if there is one.")] = False,
    overwrite: Overwrite = False,
    validation: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the training images that best.pt is chosen on, where the data has no validation images of its "
            "own; 0 trains on all, and best.pt is then the last epoch's.",
            rich_help_panel=DATA,
        ),
    ] = 0.1,
    test_images: TestImages = None,
    register: Register = None,
    augment: Annotated[bool, typer.Option(help="Crop and mirror colour images.", rich_help_panel=DATA)] = True,
    batch_size: BatchSize = 128,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.", rich_help_panel=RUNNING)] = 0,
    device: Device = None,
) -> None:
    """Train a model; best.pt, last.pt and log.csv are written after every epoch.

    best.pt is the epoch with the highest accuracy on validation images. The test images are looked at once, at the end.
    """
    import torch

    from fxprune.data import make_loader
    from fxprune.experiments.checkpoints import load_weights
    from fxprune.experiments.evaluation import evaluate
    from fxprune.experiments.runs import WRITES, check_folder, start_run
    from fxprune.experiments.training import BEST, best_epoch
    from fxprune.experiments.training import train as run_training
    from fxprune.runtime.devices import default_device

    place = default_device(device)
    import_user_code(register or ())
    folder = out or Path("out", "train", f"{model_name(task.model)}-{data_name(task.data)}")
    if resume and overwrite:
        raise OptionsError("resume goes on with an earlier training and overwrite removes it; give one of them")
    check_folder(folder, "train", overwrite=overwrite, resume=resume)
    with working(f"reading {task.data}"):
        splits = task.load_data(augment=augment)
    torch.manual_seed(recipe.seed)
    start = task.trained_model if task.weights or task.pretrained else task.new_model
    model = start(splits.info.num_classes)
    splits = splits.with_validation(validation, seed=recipe.seed)
    train_loader = make_loader(splits.train, batch_size=batch_size, shuffle=True, num_workers=workers)
    held_out = None if splits.val is None else make_loader(splits.val, batch_size=256)
    run = start_run(folder, "train", config, overwrite=overwrite, resume=resume)
    with _Bar(recipe.epochs, len(train_loader)) as bar:
        log = run_training(
            model, train_loader, held_out, recipe,
            device=place, folder=folder, resume=resume, on_step=bar.step, on_epoch=bar.epoch,
        )  # fmt: skip
    best = best_epoch(log)
    test = scoring_loader(splits, images=test_images)
    with working("scoring on the test images"):
        results: dict[str, Any] = {"last": dataclasses.asdict(log[-1]) | {"test_accuracy": evaluate(model, test)}}
        load_weights(model, folder / BEST)
        results["best"] = dataclasses.asdict(best) | {"test_accuracy": evaluate(model, test)}
    results["input_shape"] = list(splits.info.input_shape)
    results["num_classes"] = splits.info.num_classes
    run.finish(results, WRITES["train"])
    last, top = (f"{results[which]['test_accuracy']:.2f}% of the test images" for which in ("last", "best"))
    if held_out is not None:
        stdout.print(f"epoch {best.epoch}, best on {len(splits.val)} validation images: {top}", soft_wrap=True)  # type: ignore[arg-type]
    stdout.print(f"last epoch: {last}", soft_wrap=True)
    stdout.print(f"weights: {folder / BEST}", soft_wrap=True)


class _Bar(Progress):
    """A progress bar over all steps, with loss and accuracy, and one line above it for each epoch done."""

    def __init__(self, epochs: int, steps: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
        self.epochs = epochs
        self.bar = self.add_task(f"epoch 1/{epochs}", total=epochs * steps)

    def step(self, step: Step) -> None:
        text = f"epoch {step.epoch}/{self.epochs}  loss {step.loss:.3f}  accuracy {step.accuracy:.1f}%"
        self.update(self.bar, completed=(step.epoch - 1) * step.steps + step.step, description=text)

    def epoch(self, epoch: Epoch) -> None:
        self.console.print(
            f"epoch {epoch.epoch}/{self.epochs}: loss {epoch.train_loss:.4f}, train {epoch.train_accuracy:.2f}%, "
            + ("" if epoch.val_accuracy is None else f"validation {epoch.val_accuracy:.2f}%, ")
            + f"{epoch.seconds:.1f} s",
            soft_wrap=True,
        )
