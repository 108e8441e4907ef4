"""fxprune benchmark: a grid of models, patterns and methods from YAML into one CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxprune.cli.command import fail, stderr, stdout
from fxprune.cli.parameters import Device
from fxprune.experiments.grid_rows import OK, Row
from fxprune.tables import Column, as_text, table, terminal_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType


def benchmark(
    grid: Annotated[Path, typer.Argument(help="YAML file with models, patterns and methods, as in the example below.")],
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
    from fxprune.experiments.grid import read_grid, run_grid

    rows = run_grid(read_grid(grid), out, device=device, progress=stderr.is_terminal, on_row=_say)
    failed = sum(row.status != OK for row in rows)
    stdout.out(as_text(_table(rows), color=stdout.is_terminal), highlight=False)
    stdout.print(f"\n{out}: {len(rows) - failed} of {len(rows)} rows finished", soft_wrap=True)
    if failed:
        fail(f"{failed} of {len(rows)} rows failed; the column `error` of {out} says why")


def _table(rows: Sequence[Row]) -> RenderableType:
    """The rows that came out, with what differs between them."""
    columns = [
        Column("model"), Column("pattern"), Column("method"), Column("seed", right=True, leaves=3),
        Column("dense", right=True, leaves=2), Column("accuracy", right=True), Column("agrees", right=True),
        Column("KL", right=True), Column("zeros", right=True, leaves=4), Column("s", right=True, leaves=1),
    ]  # fmt: skip

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = [
        (
            row.name, row.pattern, row.method, str(row.seed), cell(row.dense_accuracy, ".2f"), cell(row.accuracy, ".2f"),
            cell(row.agreement, ".2%"), cell(row.kl, ".4f"), cell(row.sparsity, ".1%"), cell(row.seconds, ".1f"),
        )
        for row in rows
    ]  # fmt: skip
    return table(columns, cells, [row.error for row in rows], width=terminal_width(), note_heading="error")


def _say(row: Row, number: int, rows: int) -> None:
    what = f"{number}/{rows} {row.name} {row.pattern} {row.method} seed {row.seed}"
    if row.status == OK:
        stderr.print(
            f"{what}: {row.accuracy:.2f}% (dense {row.dense_accuracy:.2f}%), {row.seconds:.1f} s", soft_wrap=True
        )
    else:
        stderr.print(f"{what}: failed: {row.error}", style="red", markup=False, soft_wrap=True)
