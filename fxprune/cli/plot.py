"""fxprune plot: pictures of a benchmark's CSV, of a report, or of a pruned model."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fxprune.cli.command import stdout
from fxprune.errors import OptionsError

FORMATS = ("png", "svg")


def plot(
    sources: Annotated[
        list[Path], typer.Argument(help="benchmark.csv, report.json, pruned.pt, or a folder of fxprune prune.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out/plots"),
    formats: Annotated[
        list[str] | None, typer.Option(help="png, svg or pdf; once for each. png and svg by default.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Layers for spectra and masks: names or patterns; some by default.")
    ] = None,
) -> None:
    """Draw what a file holds.

    A benchmark's CSV: accuracy against sparsity and methods side by side, for every model. A report: zeros and error of
    every layer. A pruned model: its report, its layers' singular values (with the dense ones, where its folder says what
    it was made from), and its masks.
    """
    from fxprune.cli.pictures import pictures

    try:
        plots: Any = importlib.import_module("fxprune.plots")
    except ModuleNotFoundError as error:
        raise OptionsError(f"plots need {error.name}, which is not installed: pip install 'fxprune[plot]'") from error
    for source in sources:
        for name, picture in pictures(source, plots, layers or []):
            files = plots.save_figure(picture, out / re.sub(r"[^\w.-]+", "-", name), formats or FORMATS)
            stdout.print("  ".join(map(str, files)), soft_wrap=True)
