"""fxprune benchmark: a grid of models, patterns and methods from YAML into one CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxprune.cli.command import ERROR, stderr, stdout
from fxprune.cli.parameters import Device
from fxprune.experiments.grid import read_grid, run_grid
from fxprune.experiments.grid_rows import OK, Row


def benchmark(
    grid: Annotated[
        Path, typer.Argument(help="YAML file: models, patterns, methods; see examples/configs/benchmark.yaml.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="The CSV; rows in it that are finished are kept.")] = Path(
        "out/benchmark.csv"
    ),
    device: Device = None,
) -> None:
    """Run a grid of models x patterns x methods x seeds into one CSV, written after every row.

    Run the command again to go on after an interruption: finished rows are kept, failed ones are tried again. The exit
    code is 1 if a row failed.
    """
    rows = run_grid(read_grid(grid), out, device=device, progress=stderr.is_terminal, on_row=_say)
    failed = sum(row.status != OK for row in rows)
    stdout.print(f"{out}: {len(rows) - failed} of {len(rows)} rows finished", soft_wrap=True)
    if failed:
        raise typer.Exit(ERROR)


def _say(row: Row, number: int, rows: int) -> None:
    what = f"{number}/{rows} {row.name} {row.pattern} {row.method} seed {row.seed}"
    if row.status == OK:
        stderr.print(
            f"{what}: {row.accuracy:.2f}% (dense {row.dense_accuracy:.2f}%), {row.seconds:.1f} s", soft_wrap=True
        )
    else:
        stderr.print(f"{what}: failed: {row.error}", style="red", markup=False, soft_wrap=True)
