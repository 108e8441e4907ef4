"""fxprune diff: what changed between two graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxprune.cli.command import stdout
from fxprune.cli.compression import PRUNED
from fxprune.cli.run_folder import dense_model, input_shape
from fxprune.errors import FxPruneError, ModelError, OptionsError
from fxprune.experiments.tasks import module_classes
from fxprune.tables import terminal_width

if TYPE_CHECKING:
    import torch
    from torch import nn


def diff(
    before: Annotated[Path, typer.Argument(help="A folder of fxprune prune; or a pruned.pt or .onnx file.")],
    after: Annotated[Path | None, typer.Argument(help="Another such file; not with a folder.")] = None,
    *,
    html: Annotated[Path | None, typer.Option(help="Write a page to look at.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the difference as JSON.")] = None,
    all_nodes: Annotated[bool, typer.Option("--all-nodes", help="List nodes that are the same too.")] = False,
) -> None:
    """Say what changed from one graph to another.

    A folder of `fxprune prune` alone: from the dense model that it started from to the pruned one.
    """
    import torch

    from fxprune.files import atomic
    from fxprune.graph_diff import diff as compare
    from fxprune.saving import load

    old: nn.Module | Path
    new: nn.Module | Path
    example: torch.Tensor | None = None
    if after is None:
        if not before.is_dir():
            raise OptionsError(f"{before} is no folder of fxprune prune; name a second file to compare it with")
        try:
            old, _ = dense_model(before)
        except FxPruneError as error:
            raise ModelError(
                f"{before} is compared with the dense model that it was made from, which cannot be built: {error}. Bring "
                "back what is missing, or name two files: fxprune diff BEFORE AFTER"
            ) from error
        new = load(before / PRUNED, allow=module_classes(old))
        example = torch.zeros(1, *input_shape(before))
    else:
        old, new = (file if file.suffix == ".onnx" else load(file) for file in (before, after))
    found = compare(old, new, example_inputs=example)
    if html is not None:
        with atomic(html) as part:
            found.to_html(part)
    if json_file is not None:
        with atomic(json_file) as part:
            found.to_json(part)
    text = found.render(all=all_nodes, color=stdout.is_terminal, width=terminal_width())
    stdout.out(text, highlight=False)
