from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.channels import Row
from benchmarks.channels_output import frontier, lines_of, write_page, write_plot
from fxprune.experiments.csv_rows import read_lines, write_rows


def row(share: float, method: str, kl: float, ms: float | None, multiple: int = 1) -> Row:
    times = (ms, ms, ms, 2.0) if ms else ()
    return Row("resnet20", share, method, multiple, 64, share, 90.0, 90.0, kl, 10.0, "a machine", *times)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        row(1.0, "dense", 0.0, 2.0),
        row(0.7, "low rank", 0.1, 1.5),
        row(0.5, "low rank", 0.4, 1.2),
        row(0.7, "ours", 0.2, 1.6),
        row(0.5, "ours", 0.3, 1.4),
        row(1.5, "ours by time", 0.25, 1.45, multiple=8),
        row(0.5, "magnitude", 9.0, None),
    ]
    write_rows(tmp_path / "table.csv", Row, rows)
    return tmp_path / "table.csv"


def test_at_equal_latency_the_best_row_that_is_as_fast_counts(table: Path) -> None:
    lines = lines_of(read_lines(table), "resnet20")
    assert list(lines) == ["low rank", "ours", "ours by time, multiples of 8"]  # Rows without a time have no place.
    best = frontier(lines, ("ours", "ours by time"), 1.5)
    assert best is not None
    assert float(best["kl"]) == 0.25
    assert frontier(lines, ("ours", "ours by time"), 1.3) is None


def test_the_page_says_so_and_the_plot_is_drawn(table: Path) -> None:
    write_page(table)
    text = table.with_suffix(".md").read_text(encoding="utf-8")
    assert "| low rank, 0.7 | 1.5 | 0.100 | ours by time, multiples of 8, 1.5 | 1.45 | 0.250 | none as fast |" in text
    assert "| low rank, 0.5 | 1.2 | 0.400 | none as fast |" in text
    assert "| 50% | magnitude | 1 | 50.0% | 90.00 | 90.00 | 9.000 |  |  | 10 |" in text
    write_plot(table)
    assert table.with_suffix(".png").stat().st_size > 10_000
