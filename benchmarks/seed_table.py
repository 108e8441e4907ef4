"""Four classifiers trained, pruned 2:4 in one shot and exported to ONNX, in one command.

    python -m benchmarks.seed_table                   on a CPU: narrow networks, trained shortly (half an hour)
    python -m benchmarks.seed_table --device cuda     on a GPU: all four, in full

Training goes on where it was interrupted, and rows that the CSV holds are not run again. Weights and ONNX files go to
out/seed_table; the table to seed_table.csv, .md and .png beside this file. The data (`FXPRUNE_DATA`, else
../shared/data) are MNIST and CIFAR-10; the CIFAR-10 images there are re-encoded as JPEG, which costs some points.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

import fxprune
from benchmarks.machine import machine
from benchmarks.seed_table_output import write_markdown, write_plot
from benchmarks.seed_table_rows import Row
from fxprune.data import calibration_loader, load_data, make_loader
from fxprune.experiments.csv_rows import read_rows, write_rows
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.experiments.training import train
from fxprune.experiments.training_recipe import TrainingRecipe
from fxprune.export import export_onnx
from fxprune.models import create, model_info

HERE = Path(__file__).resolve().parent
METHODS = ("magnitude", "sparsegpt", "admm")
MNIST, CIFAR10 = "mnist/mnist.npz", "cifar10/cifar10_jpeg_train.npz"


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        name: label of the rows; it says so where the training was shortened.
        model: registered name.
        data: file under the data folder.
        recipe: of the training.
        images: only the first so many training images; None takes all.
        width: of the model's first stage; None is the model's own.
        augment: crop and mirror the training images.
        allowed_drop: accuracy that sparsegpt and admm may lose, in points; None sets no bar.
    """

    name: str
    model: str
    data: str
    recipe: TrainingRecipe
    images: int | None = None
    width: int | None = None
    augment: bool = False
    allowed_drop: float | None = None


FAST: dict[str, Any] = {"amp": True, "channels_last": True}
FULL = (
    Task("simple_cnn, MNIST", "simple_cnn", MNIST, TrainingRecipe(10, **FAST), allowed_drop=0.3),
    Task("cifar_cnn, CIFAR-10", "cifar_cnn", CIFAR10, TrainingRecipe(30, **FAST), augment=True, allowed_drop=4.0),
    Task("resnet18_cifar, CIFAR-10", "resnet18_cifar", CIFAR10, TrainingRecipe(30, **FAST), augment=True),
    Task("vgg16_cifar, CIFAR-10", "vgg16_cifar", CIFAR10, TrainingRecipe(40, learning_rate=0.05, **FAST), augment=True),
)
SHORT = (
    Task("simple_cnn, MNIST", "simple_cnn", MNIST, TrainingRecipe(3, channels_last=True), allowed_drop=0.3),
    Task(
        "cifar_cnn, CIFAR-10 (width 16, 10,000 images, 4 epochs)", "cifar_cnn", CIFAR10,
        TrainingRecipe(4, channels_last=True), images=10_000, width=16, allowed_drop=4.0,
    ),
    Task(
        "resnet18_cifar, CIFAR-10 (width 16, 20,000 images, 6 epochs)", "resnet18_cifar", CIFAR10,
        TrainingRecipe(6, channels_last=True), images=20_000, width=16,
    ),
    Task(
        "vgg16_cifar, CIFAR-10 (width 16, 20,000 images, 6 epochs)", "vgg16_cifar", CIFAR10,
        TrainingRecipe(6, learning_rate=0.05, channels_last=True), images=20_000, width=16,
    ),
)  # fmt: skip
SHORTENED = (
    "The CIFAR-10 networks are a quarter as wide as their originals and were trained shortly: in full, resnet18_cifar and "
    "vgg16_cifar take 0.56 and 0.33 billion MACs an image, a day or more on two cores. `--device cuda` trains "
    "all four in full."
)


def run(
    tasks: Sequence[Task],
    data_root: Path,
    csv_file: Path,
    weights_folder: Path,
    *,
    device: str = "cpu",
    calibration_images: int = 1024,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Train what is not trained, run what the CSV does not hold, write it after each row; the tasks' rows in order."""
    known = {row.key: row for row in read_rows(csv_file, Row)}
    rows: list[Row] = []
    for task in tasks:
        todo = [_row(task, data_root, method, calibration_images) for method in METHODS]
        if any(row.key not in known for row in todo):
            prepared = _Prepared.of(task, data_root, weights_folder / task.model, device)
            for row in todo:
                if row.key not in known:
                    known[row.key] = prepared.prune(row, weights_folder)
                    write_rows(csv_file, Row, known.values())
        for row in todo:
            rows.append(known[row.key])
            on_row(rows[-1])
    return rows


def _row(task: Task, data_root: Path, method: str, calibration_images: int) -> Row:
    images = task.images or _count(data_root / task.data)
    return Row(task.name, task.model, task.width, images, task.recipe.epochs, calibration_images, method)


def _count(path: Path) -> int:
    with np.load(path) as file:
        return len(file["labels" if "labels" in file else "train_labels"])


@dataclass(frozen=True)
class _Prepared:
    """What the rows of one task share."""

    task: Task
    model: nn.Module
    train: Any
    test: Any
    test_images: int
    accuracy: float
    seconds: float
    device: str

    @classmethod
    def of(cls, task: Task, data_root: Path, folder: Path, device: str) -> _Prepared:
        info = model_info(task.model)
        splits = load_data(data_root / task.data, mean=info.mean, std=info.std, augment=task.augment)
        images = splits.train if task.images is None else Subset(splits.train, range(task.images))
        test = make_loader(splits.test, batch_size=500)
        torch.manual_seed(task.recipe.seed)
        model = create(task.model, **({} if task.width is None else {"width": task.width}))
        log = train(
            model, make_loader(images, shuffle=True), test, task.recipe, device=device, folder=folder, resume=True,
            on_epoch=lambda e: print(f"{task.name}: epoch {e.epoch}, {e.val_accuracy:.2f}%, {e.seconds:.0f} s"),
        )  # fmt: skip
        # What is scored is the last epoch: the best one would have been chosen by the test images.
        seconds, count = sum(epoch.seconds for epoch in log), len(splits.test)  # type: ignore[arg-type]
        model.to(memory_format=torch.contiguous_format)
        return cls(task, model, images, test, count, evaluate(model, test), seconds, device)

    def prune(self, row: Row, folder: Path) -> Row:
        """Prune, score and export; the file is kept only if onnxruntime computes what the graph does."""
        images = calibration_loader(self.train, row.calibration_images)
        compiled = fxprune.compile(self.model, images, "2:4", method=row.method, device=self.device, progress=False)
        close = agreement(self.model, compiled, self.test)
        accuracy = evaluate(compiled, self.test)
        file = folder / f"{row.model}_{row.method}_2-4.onnx"
        onnx = export_onnx(compiled.to("cpu"), file, next(iter(self.test))[0], loader=self.test)
        return dataclasses.replace(
            row,
            dense_accuracy=self.accuracy,
            accuracy=accuracy,
            drop=self.accuracy - accuracy,
            allowed_drop=None if row.method == "magnitude" else self.task.allowed_drop,
            agreement=100 * close.top1,
            kl=close.kl,
            sparsity=compiled.report.sparsity,
            layers_pruned=sum(layer.status == "pruned" for layer in compiled.report.layers),
            onnx_accuracy=onnx.parity.accuracy_onnx or 0.0,
            onnx_max_rel=onnx.parity.max_rel,
            test_images=self.test_images,
            train_seconds=round(self.seconds, 1),
            compile_seconds=round(compiled.report.seconds, 2),
            machine=machine(self.device),
        )


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cuda runs all four in full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("FXPRUNE_DATA", HERE.parents[1] / "shared/data"))
    )
    parser.add_argument("--output", type=Path, default=HERE / "seed_table", help="path without suffix")
    parser.add_argument("--weights", type=Path, default=Path("out/seed_table"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = FULL if torch.device(arguments.device).type == "cuda" else SHORT
    rows = run(
        tasks,
        arguments.data,
        arguments.output.with_suffix(".csv"),
        arguments.weights / arguments.device,
        device=arguments.device,
        on_row=lambda row: print(f"{row.name}, {row.method}: {row.accuracy:.2f}% (dense {row.dense_accuracy:.2f}%)"),
    )
    write_markdown(arguments.output.with_suffix(".md"), rows, "" if tasks is FULL else SHORTENED)
    write_plot(arguments.output, rows)


if __name__ == "__main__":
    main()
