"""Trains a classifier: SGD or AdamW, one-cycle or cosine, checkpoints that a later run goes on from."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import FxPruneError
from fxprune.experiments.checkpoints import load_checkpoint, save_checkpoint
from fxprune.experiments.evaluation import evaluate
from fxprune.experiments.training_recipe import TrainingRecipe
from fxprune.files import atomic
from fxprune.graph import device_of

LAST, BEST, LOG = "last.pt", "best.pt", "log.csv"
READ_EVERY = 20  # steps between two looks at the running loss: each look waits for the GPU


class TrainingError(FxPruneError):
    """Training cannot start, go on or be resumed as asked."""


@dataclass(frozen=True)
class Epoch:
    """One line of the training log; accuracies in percent: of training images as augmented, and of validation images."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    val_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class Step:
    """Where training is: epochs and steps counted from 1, loss and accuracy over this epoch so far."""

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float


def train(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    recipe: TrainingRecipe,
    *,
    device: torch.device | str = "cpu",
    folder: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[Epoch, ...]:
    """Train a model in place.

    Args:
        model: maps images (N, C, H, W) to logits (N, classes); afterwards on ``device``, in eval mode.
        train_loader: batches (images, labels), a sized iterable that shuffles and augments from torch's global random
            state, as ``make_loader(..., shuffle=True)`` does without a seed.
        val_loader: batches (images, labels) that accuracy is measured on after each epoch. The best checkpoint is
            chosen by it, so its accuracy there is slightly too good: these should not be the test images. Without one
            the last epoch's weights count as the best.
        recipe: how.
        device: where.
        folder: receives last.pt, best.pt and log.csv after each epoch; None writes nothing.
        resume: go on from last.pt in ``folder``, if there is one: the result is that of a run never interrupted.
        on_step: called now and then within an epoch.
        on_epoch: called after each epoch.

    Returns:
        The log, one entry an epoch, those before a resumption included.

    Raises:
        TrainingError: the loss became NaN or infinite; or last.pt comes from another recipe.
        CheckpointError: last.pt does not fit the model, or a checkpoint cannot be written; the one before is whole.
    """
    place = torch.device(device)
    model.to(place)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, recipe)
    log: list[Epoch] = []
    if resume and folder is not None and (Path(folder) / LAST).is_file():
        log = _resume(Path(folder), model, optimizer, recipe)
    trainer = _Trainer.of(model, optimizer, recipe)
    for number in range(len(log) + 1, recipe.epochs + 1):
        started = time.perf_counter()
        # Each epoch has a seed of its own, so that a resumed run draws what an uninterrupted one would.
        torch.manual_seed(recipe.seed * 100_003 + number)
        loss, accuracy = _epoch(trainer, train_loader, number, on_step)
        scored = None if val_loader is None else evaluate(model, val_loader)
        rate = float(optimizer.param_groups[0]["lr"])
        log.append(Epoch(number, rate, loss, accuracy, scored, time.perf_counter() - started))
        if folder is not None:
            _save(Path(folder), model, optimizer, recipe, log)
        on_epoch(log[-1])
    model.eval()
    return tuple(log)


@dataclass(frozen=True)
class _Trainer:
    """What every step needs. `half` is the number type of mixed precision, None without it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: TrainingRecipe
    place: torch.device
    half: torch.dtype | None
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: TrainingRecipe) -> _Trainer:
        place = device_of(model)
        half = None
        if recipe.amp and place.type == "cuda":
            half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        scaler = torch.amp.GradScaler(place.type, enabled=half == torch.float16)
        return cls(model, optimizer, recipe, place, half, scaler)

    def step(self, images: Tensor, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One update; the loss, and how many images were right before it."""
        images = images.to(self.place, non_blocking=True)
        labels = labels.to(self.place, non_blocking=True).reshape(-1)
        if self.recipe.channels_last:
            images = images.to(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.place.type, dtype=self.half, enabled=self.half is not None):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def _epoch(
    trainer: _Trainer, loader: Iterable[Any], number: int, on_step: Callable[[Step], None]
) -> tuple[float, float]:
    """One pass over the training images; mean loss and accuracy in percent."""
    recipe = trainer.recipe
    steps = len(loader)  # type: ignore[arg-type]
    loss_sum, right, seen = torch.zeros((), device=trainer.place), torch.zeros((), device=trainer.place), 0
    trainer.model.train()
    for step, (images, labels) in enumerate(loader):
        if len(images) == 1 and steps > 1:
            continue  # BatchNorm over a single image of 1x1 maps has no variance; this is the last, odd batch
        rate = recipe.rate((number - 1) * steps + step, recipe.epochs * steps)
        loss, correct = trainer.step(images, labels, rate)
        loss_sum += loss * len(images)
        right += correct
        seen += len(images)
        if step % READ_EVERY == READ_EVERY - 1 or step == steps - 1:
            mean = float(loss_sum) / seen
            if not math.isfinite(mean):
                raise TrainingError(
                    f"the loss became {mean} in epoch {number}, by step {step + 1}; try a lower learning rate than "
                    f"{recipe.peak_rate:g}, and look for NaN in the images"
                )
            on_step(Step(number, step + 1, steps, mean, 100 * float(right) / seen))
    if seen == 0:
        raise TrainingError("the loader gave no batches; there is nothing to train on")
    return float(loss_sum) / seen, 100 * float(right) / seen


def _optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    if not weights:
        raise TrainingError(f"{type(model).__name__} has no weights that require a gradient; there is nothing to train")
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak_rate)
    return torch.optim.SGD(groups, lr=recipe.peak_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: TrainingRecipe, log: list[Epoch]
) -> None:
    latest = log[-1]
    best = best_epoch(log)
    # The log goes first: a resumed run drops the lines that last.pt knows nothing of.
    with atomic(folder / LOG) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Epoch)])
        writer.writerows(dataclasses.astuple(epoch) for epoch in log)
    noted: dict[str, Any] = {"epoch": latest.epoch, "accuracy": latest.val_accuracy}
    if best is latest:
        save_checkpoint(folder / BEST, model, **noted)
    save_checkpoint(folder / LAST, model, optimizer=optimizer, extra=dataclasses.asdict(recipe), **noted)


def best_epoch(log: Sequence[Epoch]) -> Epoch:
    """The first epoch with the highest accuracy on the validation images; the last one where there are none."""
    return log[-1] if log[-1].val_accuracy is None else max(log, key=lambda epoch: epoch.val_accuracy or 0.0)


def read_log(path: str | Path) -> list[Epoch]:
    """Read a log.csv.

    Raises:
        TrainingError: it is absent or damaged.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [
            Epoch(
                epoch=int(row.pop("epoch")),
                val_accuracy=float(scored) if (scored := row.pop("val_accuracy")) else None,
                **{name: float(value) for name, value in row.items()},
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{path} is no training log of fxprune's: {error}") from error


def _resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: TrainingRecipe) -> list[Epoch]:
    checkpoint = load_checkpoint(folder / LAST, model, optimizer)
    there = checkpoint.extra
    other = [
        f"{name} {there.get(name)!r} there, {here!r} here"
        for name, here in dataclasses.asdict(recipe).items()
        if there.get(name) != here
    ]
    if other or checkpoint.epoch is None:
        raise TrainingError(
            f"{folder / LAST} was made by another recipe ({'; '.join(other) or 'it knows no epoch'}); "
            "resume with the same one, or start anew in another folder"
        )
    return [epoch for epoch in read_log(folder / LOG) if epoch.epoch <= checkpoint.epoch]
