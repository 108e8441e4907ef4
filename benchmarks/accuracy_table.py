"""The whole accuracy table, several rows at a time: accuracy.csv, accuracy_significance.csv, accuracy.md, accuracy.png.

    python -m benchmarks.accuracy_table --workers 2                 on the CPU: hours
    python -m benchmarks.accuracy_table --device cuda --workers 15  on a GPU: ten minutes

Every worker is a run of `benchmarks.accuracy` with one thread. Finished rows lie in out/accuracy/rows and are not run again:
delete them to begin afresh.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import accuracy, accuracy_report
from fxprune.experiments.csv_rows import read_lines

ROWS = Path("out/accuracy/rows")
GROUPED, UNSTRUCTURED = ("2:4", "1:4", "4:8"), ("0.5", "0.7", "0.8", "0.9", "0.95")
ALL = GROUPED + UNSTRUCTURED
ABLATION = ("admm with its own target", "+ dense target", "+ bias", "+ skip target")

Job = tuple[str, str, tuple[str, ...]]  # Model, method, patterns.


def jobs() -> Iterator[Job]:
    """What there is to run, the longest first."""
    for pattern in ("0.95", "0.9", "0.8", "0.7", "0.5", "1:4", "2:4", "4:8"):
        yield "resnet56", "exact_obs", (pattern,)
        yield "resnet56", "exact_obs + BatchNorm", (pattern,)
    for some in (ALL[:2], ALL[2:4], ALL[4:6], ALL[6:]):
        yield "resnet56", "ours + polish", some
        yield "resnet56", "ours + all patches", some
        yield "resnet56", "ours", some
        yield "resnet20", "exact_obs", some
        yield "resnet20", "exact_obs + BatchNorm", some
    for some in (UNSTRUCTURED[:3], UNSTRUCTURED[3:]):
        yield "resnet56", "ours + budget", some
    yield "resnet56", "ours without permutation", GROUPED
    for some in (ALL[:4], ALL[4:]):
        for method in ("ours + polish", "ours + all patches", "ours"):
            yield "resnet20", method, some
    yield "resnet20", "ours + budget", UNSTRUCTURED
    for method in ABLATION:
        yield "resnet20", method, ALL[:2]
    yield "resnet20", "ours without permutation", GROUPED
    for model in ("resnet56", "resnet20"):
        for method in ("sparsegpt", "magnitude"):
            yield model, method, ALL


def main(
    data: Annotated[Path, typer.Option(help="folder that holds cifar10/")] = Path("../shared/data"),
    device: Annotated[str, typer.Option(help="where everything runs: cpu, cuda")] = "cpu",
    workers: Annotated[int, typer.Option(help="rows at a time")] = 2,
    seconds: Annotated[float, typer.Option(help="stop after so long, and write what there is")] = float("inf"),
    output: Path = Path("benchmarks/accuracy.csv"),
) -> None:
    """Run what is missing, and write the tables and the plot."""
    deadline = time.monotonic() + seconds
    ROWS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _run(job, data, device, deadline), list(jobs())))
    merge(output)
    accuracy_report.main()


def _run(job: Job, data: Path, device: str, deadline: float) -> None:
    model, method, patterns = job
    left = deadline - time.monotonic()
    if left <= 0:
        return
    name = "_".join([model, method, *patterns]).replace(" ", "_").replace(":", "-")
    command = [sys.executable, "-m", "benchmarks.accuracy", "--threads=1", f"--data={data}", f"--device={device}"]
    command += [f"--models={model}", f"--methods={method}", f"--patterns={','.join(patterns)}"]
    try:
        subprocess.run(
            [*command, f"--output={ROWS / name}.csv"], check=True, timeout=left if left < float("inf") else None
        )
    except subprocess.TimeoutExpired:
        print(f"out of time: {model} {method} {', '.join(patterns)}", flush=True)


def merge(output: Path) -> None:
    """Put the rows of all workers into one file, in place of those it holds, and test them against ours."""
    rows = {_key(row): row for row in read_lines(output)}
    for file in sorted(ROWS.glob("*.csv")):
        if not file.name.endswith("_significance.csv"):
            rows |= {_key(row): row for row in read_lines(file)}
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows.values())
    accuracy.significance(
        accuracy.PREDICTIONS, list(rows.values()), output.with_name(output.stem + "_significance.csv")
    )


def _key(row: dict[str, str]) -> tuple[str, str, str, str]:
    return row["model"], row["pattern"], row["method"], row["images"]


if __name__ == "__main__":
    typer.run(main)
