"""The progress bar of a compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnLayer = Callable[[str, int], None]


@contextmanager
def layer_progress(enabled: bool) -> Iterator[OnLayer]:
    """Yield a function (layer name, number of stages) -> None that moves the bar on by one stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("pruning"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not enabled, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("tracing", total=None)

        def advance(name: str, stages: int) -> None:
            bar.update(task, total=stages, advance=0 if bar.tasks[0].total is None else 1, description=name)

        yield advance
