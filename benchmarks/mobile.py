"""What re-fitting the depthwise layers is worth: MobileNetV2, trained here on CIFAR-10 as far as a CPU allows.

    python -m benchmarks.mobile --data ../shared/data

Depthwise layers cannot hold an N:M pattern, so published methods leave them as they are, reading inputs that pruning has
disturbed. `reconstruct` re-fits them to the dense model's outputs. Writes mobile.csv and mobile.md beside this file; the
weights are kept in out/mobile. The images there are re-encoded as JPEG, for training and for test alike.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset
from torchvision.models import mobilenet_v2

import fxprune
from benchmarks.machine import machine
from fxprune import Options
from fxprune.data import calibration_loader, load_data, make_loader
from fxprune.experiments.csv_rows import write_rows
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.experiments.training import train
from fxprune.experiments.training_recipe import TrainingRecipe

HERE = Path(__file__).resolve().parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = {
    "magnitude": ("magnitude", Options()),
    "sparsegpt": ("sparsegpt", Options()),
    "ours, depthwise and first layer left alone": ("admm", Options(reconstruct=False)),
    "ours": ("admm", Options()),
    "ours + polish": ("admm", Options(polish=4, flip=True)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies and agreement in percent on the 10,000 test images, KL in nats."""

    pattern: str
    method: str
    dense_accuracy: float
    accuracy: float
    agreement: float
    kl: float
    seconds: float
    images: int
    machine: str


def network(width: float) -> nn.Module:
    """Torchvision's MobileNetV2 for 32x32 images: a total stride of 16 in place of 32, and 10 classes."""
    model = mobilenet_v2(num_classes=10, width_mult=width, dropout=0.0)
    model.features[0][0].stride = (1, 1)
    model.features[2].conv[1][0].stride = (2, 2)
    return model


def main() -> None:
    """Train if need be, prune, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--width", type=float, default=0.35)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=1024, help="calibration images")
    parser.add_argument("--patterns", default="2:4,1:4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=HERE / "mobile", help="path without suffix")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)

    splits = load_data(given.data / "cifar10/cifar10_jpeg_train.npz", mean=MEAN, std=STD, augment=True)
    assert splits.train is not None
    test = make_loader(splits.test, batch_size=500)
    images = Subset(splits.train, range(given.train_images))
    model = network(given.width)
    recipe = TrainingRecipe(given.epochs, channels_last=True)
    train(
        model, make_loader(images, shuffle=True), test, recipe, device="cpu", folder=Path("out/mobile"), resume=True,
        on_epoch=lambda e: print(f"epoch {e.epoch}: {e.val_accuracy:.2f}%, {e.seconds:.0f} s", flush=True),
    )  # fmt: skip
    model.to(memory_format=torch.contiguous_format).eval()
    dense = evaluate(model, test)
    rows = []
    for pattern in given.patterns.split(","):
        for name, (method, options) in METHODS.items():
            started = time.perf_counter()
            batches = calibration_loader(images, given.images)
            compiled = fxprune.compile(model, batches, pattern, method=method, options=options, progress=False)
            seconds = time.perf_counter() - started
            close, accuracy = agreement(model, compiled, test), evaluate(compiled, test)
            agreed = 100 * close.top1
            rows.append(Row(pattern, name, dense, accuracy, agreed, close.kl, seconds, given.images, machine("cpu")))
            print(f"{pattern} {name}: {accuracy:.2f} / {agreed:.2f} / {close.kl:.4f}, {seconds:.0f} s", flush=True)
            write(given.output, rows, given)


def write(path: Path, rows: list[Row], given: argparse.Namespace) -> None:
    """The CSV, and the table as a page."""
    write_rows(path.with_suffix(".csv"), Row, rows)
    lines = [
        "# A mobile network",
        "",
        f"torchvision's MobileNetV2 (width {given.width}, strides for 32x32 images), trained for {given.epochs} epochs on "
        f"{given.train_images:,} JPEG-coded CIFAR-10 images to {rows[0].dense_accuracy:.2f}% on the 10,000 test images:",
        "a short training on a CPU, far from what the network can do. "
        f"{rows[0].images} calibration images, no retraining, one run each.",
        "",
        "    python -m benchmarks.mobile --data ../shared/data",
        "",
        f"Machine: {rows[0].machine}.",
        "",
        "| pattern | method | accuracy | agreement with dense | KL | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.pattern} | {r.method} | {r.accuracy:.2f} | {r.agreement:.2f} | {r.kl:.4f} | {r.seconds:.0f} |"
        for r in rows
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
