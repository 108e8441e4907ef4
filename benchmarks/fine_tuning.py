"""Fine-tuning after pruning, zeros kept: ResNet-20 at 1:4 with the default, then some epochs on the lossless training images.

    python -m benchmarks.fine_tuning

The network is the trained CIFAR ResNet-20 under `FXPRUNE_DATA` (else ../shared/data). It learns from the labels, or from the
dense model's outputs (distillation); Adam with a cosine schedule, flips and crops. Rows that the CSV holds are not run again.
Each fine-tuned model is exported, and its file validated in onnxruntime on the test images.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from benchmarks.accuracy import BATCH, WEIGHTS, images_of, logits, measure
from benchmarks.machine import machine
from fxprune.experiments.checkpoints import load_weights
from fxprune.experiments.csv_rows import append_rows, read_lines

HERE = Path(__file__).parent
TABLE, PAGE = HERE / "fine_tuning.csv", HERE / "fine_tuning.md"
CALIBRATION = 1024
MODEL, PATTERN = "resnet20", "1:4"

Goal = Literal["distillation", "labels"]


@dataclass(frozen=True)
class Row:
    """One model; accuracy and agreement in percent, KL in nats, seconds of processor time for the epochs."""

    model: str
    pattern: str
    learns_from: str
    epochs: int
    learning_rate: float
    accuracy: float
    accuracy_jpeg: float
    agreement: float
    kl: float
    sparsity: float
    file_passes: str
    seconds: float
    machine: str


def fine_tune(
    compiled: fxprune.CompiledModule,
    dense: nn.Module,
    images: Tensor,
    labels: Tensor,
    goal: Goal,
    *,
    epochs: int,
    learning_rate: float,
) -> None:
    """Train a pruned model, zeros kept.

    Args:
        compiled: changed in place.
        dense: the model to learn from.
        images: (N, C, H, W), normalised.
        labels: (N,).
        goal: what the loss is: cross entropy with the labels, or KL(dense || pruned).
        epochs: passes over the images.
        learning_rate: Adam's, at the start of the cosine.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(compiled.parameters(), learning_rate)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with fxprune.keep_zeros(compiled):
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
                x = augmented(images[chosen], generator)
                output = compiled(x).log_softmax(1)
                if goal == "labels":
                    loss = F.nll_loss(output, labels[chosen])
                else:
                    with torch.no_grad():
                        wanted = dense(x).log_softmax(1)
                    loss = F.kl_div(output, wanted, reduction="batchmean", log_target=True)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), half of them mirrored, each moved by up to 4 pixels over its own mirrored border."""
    count, _, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    corners = torch.randint(0, 9, (count, 2), generator=generator).tolist()
    return torch.stack([x[:, y : y + height, z : z + width] for x, (y, z) in zip(padded, corners, strict=True)])


def main() -> None:
    """Fill the table and write the page."""
    parser = argparse.ArgumentParser(description="fine-tuning after pruning, zeros kept")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FXPRUNE_DATA", "../shared/data")))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--goals", default="distillation,labels")
    parser.add_argument("--learning-rates", default="1e-4,3e-4,1e-3")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cifar = arguments.data / "cifar10"
    images, labels = images_of(cifar / "cifar10_subset.npz", "train")
    test = {
        "lossless": images_of(cifar / "cifar10_subset.npz", "test"),
        "jpeg": images_of(cifar / "cifar10_jpeg_test.npz", None),
    }
    dense = load_weights(fxprune.models.create(MODEL), cifar / WEIGHTS[MODEL]).eval()
    outputs = {key: logits(dense, pictures) for key, (pictures, _) in test.items()}
    compiled = fxprune.compile(dense, images[:CALIBRATION].split(BATCH), PATTERN, device="cpu", progress=False)

    done = {(row["learns_from"], row["epochs"], float(row["learning_rate"])) for row in read_lines(TABLE)}
    wanted = arguments.goals.split(",")
    goals: list[tuple[Goal, float]] = [
        (goal, float(rate)) for rate in arguments.learning_rates.split(",") for goal in get_args(Goal) if goal in wanted
    ]
    for goal, rate in [("", 0.0), *goals]:
        epochs = arguments.epochs if goal else 0
        if (goal, str(epochs), rate) in done:
            continue
        tuned = copy.deepcopy(compiled)
        started = time.process_time()
        if goal:
            fine_tune(tuned, dense, images, labels, goal, epochs=epochs, learning_rate=rate)
        seconds = time.process_time() - started
        found = measure(tuned, outputs, test)
        found.pop("right")
        row = Row(
            MODEL, PATTERN, goal, epochs, rate, **found, sparsity=tuned.report.sparsity, file_passes=passes(tuned, test),
            seconds=seconds, machine=machine(),
        )  # fmt: skip
        append_rows(TABLE, [row], number=".6g")
        print(row, flush=True)
    PAGE.write_text(page(), encoding="utf-8")


def passes(tuned: fxprune.CompiledModule, test: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Export the model and validate its file on the lossless test images: "yes", or what is wrong."""
    pictures, labels = test["lossless"]
    batches = list(zip(pictures.split(BATCH), labels.split(BATCH), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        try:
            fxprune.export_onnx(tuned, Path(folder) / "tuned.onnx", pictures[:4])
            fxprune.validate_onnx(tuned, Path(folder) / "tuned.onnx", batches, progress=False)
        except fxprune.FxPruneError as error:
            return str(error).splitlines()[0]
    return "yes"


def page() -> str:
    """The table as Markdown."""
    rows = read_lines(TABLE)
    lines = [
        "# Fine-tuning with zeros kept",
        "",
        f"{MODEL} at {PATTERN}, pruned with the default on {CALIBRATION:,} images, then trained on the 4,660 lossless CIFAR-10",
        "training images (flips, crops of up to 4 pixels, Adam on a cosine, batches of 128) inside `fxprune.keep_zeros`. It",
        "learns from the labels, or from the dense model's outputs without labels. Accuracy in percent on 846 lossless and",
        "10,000 JPEG-coded test images; agreement with the dense model and KL(dense ‖ pruned) on 3,000 JPEG-coded ones. One",
        "run each.",
        "",
        "    python -m benchmarks.fine_tuning",
        "",
        f"Machine: {', '.join(sorted({row['machine'] for row in rows}))}. Seconds are processor time.",
        "",
        "| learns from | epochs | learning rate | accuracy | accuracy, JPEG | agreement | KL | zeros | file passes | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['learns_from'] or 'as pruned'} | {row['epochs']} | {float(row['learning_rate']):g} | "
            f"{float(row['accuracy']):.2f} | {float(row['accuracy_jpeg']):.2f} | {float(row['agreement']):.1f} | "
            f"{float(row['kl']):.3f} | {float(row['sparsity']):.1%} | {row['file_passes']} | {float(row['seconds']):.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
