"""fxprune train: trains a named model on a named data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fxprune.cli.command import stderr, stdout
from fxprune.cli.parameters import TASK, BatchSize, Device, Out, Register, TestImages, data_name
from fxprune.data import make_loader
from fxprune.devices import default_device
from fxprune.errors import OptionsError
from fxprune.experiments.recipe import Recipe
from fxprune.experiments.runs import start_run
from fxprune.experiments.tasks import Task, import_user_code, scoring_loader
from fxprune.experiments.training import BEST, LAST, Epoch, Step
from fxprune.experiments.training import train as run_training


def train(
    task: Annotated[Task, TASK],
    recipe: Annotated[Recipe, "Recipe"],
    config: dict[str, Any],
    *,
    register: Register = None,
    batch_size: BatchSize = 128,
    test_images: TestImages = None,
    augment: Annotated[bool, typer.Option(help="Crop and mirror colour images.", rich_help_panel=TASK)] = True,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.", rich_help_panel=TASK)] = 0,
    device: Device = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from last.pt, if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier training.")] = False,
) -> None:
    """Train a model; best.pt, last.pt and log.csv are written after every epoch.

    The best checkpoint is chosen on the validation images where the data set has some, else on the test images.
    """
    import_user_code(register or ())
    folder = out or Path("out", "train", f"{task.model}-{data_name(task.data)}")
    if (folder / LAST).is_file() and not (resume or overwrite):
        raise OptionsError(
            f"{folder} holds a training: go on with --resume, replace it with --overwrite, or name another --out"
        )
    splits = task.load_data(augment=augment)
    torch.manual_seed(recipe.seed)
    start = task.trained_model if task.weights or task.pretrained else task.new_model
    model = start(splits.info.num_classes)
    place = default_device(device)
    train_loader = make_loader(splits.train, batch_size=batch_size, shuffle=True, num_workers=workers)
    scored = splits if splits.val is None else dataclasses.replace(splits, test=splits.val)
    test_loader = scoring_loader(scored, images=test_images)
    run = start_run(folder, "train", config)
    with _Bar(recipe.epochs, len(train_loader)) as bar:
        log = run_training(
            model, train_loader, test_loader, recipe,
            device=place, folder=folder, resume=resume, on_step=bar.step, on_epoch=bar.epoch,
        )  # fmt: skip
    best = max(log, key=lambda epoch: epoch.test_accuracy)
    chosen_on = "test" if splits.val is None else "validation"
    run.finish({"last": dataclasses.asdict(log[-1]), "best": dataclasses.asdict(best), "chosen_on": chosen_on})
    last, top = f"last epoch {log[-1].test_accuracy:.2f}%", f"best (epoch {best.epoch}) {best.test_accuracy:.2f}%"
    stdout.print(f"{last}, {top}, of the {chosen_on} images", soft_wrap=True)
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
            f"test {epoch.test_accuracy:.2f}%, {epoch.seconds:.1f} s"
        )
