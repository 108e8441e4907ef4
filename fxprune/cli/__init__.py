"""The command line: one command a file, every flag also a key of a YAML file."""

from __future__ import annotations

from typing import Annotated

import typer

import fxprune
from fxprune.cli.benchmark import benchmark
from fxprune.cli.command import command
from fxprune.cli.diff import diff
from fxprune.cli.evaluate import evaluate
from fxprune.cli.inspect import inspect
from fxprune.cli.plot import plot
from fxprune.cli.prune import prune
from fxprune.cli.train import train

app = typer.Typer(
    help="One-shot pruning of trained CNNs: train, prune, evaluate, benchmark, plot, diff, inspect.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _function in (
    ("train", train),
    ("prune", prune),
    ("evaluate", evaluate),
    ("benchmark", benchmark),
    ("plot", plot),
    ("diff", diff),
    ("inspect", inspect),
):
    command(app, _name)(_function)


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
    """One-shot pruning of trained CNNs: train, prune, evaluate, benchmark, plot, diff, inspect."""
