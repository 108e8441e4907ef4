"""Options that several commands share and no dataclass holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TASK = "Model and data"

Register = Annotated[
    list[str] | None,
    typer.Option(help="Module or .py file that registers models or solvers of your own.", rich_help_panel=TASK),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.", rich_help_panel=TASK)]
TestImages = Annotated[
    int | None, typer.Option(min=1, help="Score on the first so many test images only.", rich_help_panel=TASK)
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; a GPU where there is one by default.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results; one under out/ by default.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that --out holds: remove what it wrote, and nothing else.")
]


def data_name(data: str | None) -> str:
    """A data set's name or path as part of a folder's name."""
    return Path(data or "data").stem
