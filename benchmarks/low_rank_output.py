"""The tables of `benchmarks.low_rank` on disk, and their picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NETWORKS, LAYERS, PICTURE = HERE / "low_rank.csv", HERE / "low_rank_layers.csv", HERE / "low_rank.png"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Sequence[Any]) -> None:
    """Add rows, dataclasses all of one kind."""
    fresh = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        if fresh:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def write_plot(networks: list[dict[str, str]], layers: list[dict[str, str]]) -> None:
    """Three panels: layer errors, accuracy against multiply-adds, latency against multiply-adds."""
