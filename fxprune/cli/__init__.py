"""The command line: one command a file, every flag also a key of a YAML file.

Nothing here imports torch: `fxprune --help` answers at once, and a command says that it is loading before it does.
"""

from __future__ import annotations

from typing import Annotated

import typer

import fxprune
from fxprune.cli import compression
from fxprune.cli.benchmark import benchmark
from fxprune.cli.command import command
from fxprune.cli.diff import diff
from fxprune.cli.evaluate import evaluate
from fxprune.cli.export import export
from fxprune.cli.inspect import inspect
from fxprune.cli.low_rank import low_rank
from fxprune.cli.plot import plot
from fxprune.cli.prune import prune
from fxprune.cli.scan import scan
from fxprune.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SCORES = ("torch", "fxprune.data", "fxprune.models", "fxprune.experiments.evaluation", "fxprune.experiments.runs")

_SHARED = ("prune", "low-rank", "scan", "benchmark")  # By the processes that torchrun starts.

for _name, _function, _runs_on, _example in (
    (
        "prune", prune, compression.RUNS_ON,
        "fxprune prune --model mynet.py:MyNet --weights mynet.pt --data pictures \\\n"
        "    --image-size 224 --mean .485,.456,.406 --std .229,.224,.225",
    ),
    (
        "low-rank", low_rank, (*compression.RUNS_ON, "fxprune.rank_reduction"),
        "fxprune low-rank --model resnet18 --pretrained --data pictures \\\n    --rank speedup:1.3",
    ),
    (
        "scan", scan, (*compression.RUNS_ON, "fxprune.scanning"),
        "fxprune scan --model resnet20 --weights out/r20/best.pt --data cifar10 \\\n"
        "    --recipe 2:4 --recipe 1:4 --recipe rank:0.5",
    ),
    ("evaluate", evaluate, _SCORES, "fxprune evaluate out/pruned/pruned.pt --against out/pruned/model.onnx"),
    ("export", export, (*_SCORES, "fxprune.export.onnx"), "fxprune export out/pruned/pruned.pt --precision fp16"),
    ("inspect", inspect, ("torch", "fxprune.export.inspection"), "fxprune inspect out/pruned/model.onnx"),
    ("diff", diff, ("torch", "fxprune.graph_diff", "fxprune.saving"), "fxprune diff out/pruned --html out/diff.html"),
    ("plot", plot, ("torch",), "fxprune plot out/pruned --out out/plots"),
    (
        "train", train, (*_SCORES, "fxprune.experiments.training"),
        "fxprune train --model simple_cnn --data digits --epochs 6 --out out/digits",
    ),
    (
        "benchmark", benchmark, ("torch", "fxprune.experiments.grid"),
        "fxprune benchmark grid.yaml --out out/benchmark.csv\n"
        "where grid.yaml holds\n"
        "    models: [{model: simple_cnn, data: digits, weights: out/digits/last.pt}]\n"
        "    patterns: [2:4, 0.9, rank:0.7+2:4, {fc*: dense, \"*\": 1:4}]\n"
        "    methods: [magnitude, admm]",
    ),
):  # fmt: skip
    command(app, _name, runs_on=_runs_on, example=_example, shared=_name in _SHARED)(_function)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxprune {fxprune.__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained CNNs smaller in one shot, without retraining: prune them, or factor their layers.

    Start with fxprune prune --help; the rest looks at what it wrote.
    """
