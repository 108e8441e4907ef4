"""fxprune inspect: what an ONNX file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxprune.cli.command import stdout


def inspect(
    file: Annotated[Path, typer.Argument(help="An .onnx file, from fxprune or any other tool.")],
    *,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write what was found as JSON.")] = None,
) -> None:
    """Show the layers of an ONNX file: which N:M patterns their weights hold, and whether that pays where it runs."""
    from fxprune.export import inspect_onnx
    from fxprune.files import atomic

    found = inspect_onnx(file)
    if json_file is not None:
        with atomic(json_file) as part:
            found.to_json(part)
    stdout.out(found.render(color=stdout.is_terminal), highlight=False)
