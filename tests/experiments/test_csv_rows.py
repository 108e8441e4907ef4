"""Tables on disk: what is written is read again, and runs add to what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from fxprune.experiments.csv_rows import append_rows, read_lines, read_rows, write_rows


@dataclass(frozen=True)
class Line:
    """One of each kind of column."""

    name: str
    count: int
    share: float
    perhaps: int | None = None
    note: str = ""


LINES = [Line("a, b", 3, 1 / 3), Line("c", -1, 0.0, 7, 'quoted "x"')]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.csv", Line, LINES)
    assert read_rows(tmp_path / "t.csv", Line) == LINES
    write_rows(tmp_path / "t.csv", Line, [], number=".3g")
    assert (tmp_path / "t.csv").read_text().splitlines() == ["name,count,share,perhaps,note"]


def test_rows_are_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.csv"
    assert read_lines(path) == read_rows(path, Line) == []
    for line in LINES:
        append_rows(path, [line], number=".3f")
    assert [line["share"] for line in read_lines(path)] == ["0.333", "0.000"]
    assert read_rows(path, Line)[1] == LINES[1]


def test_columns_may_be_missing_but_not_unknown(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("name,count,share\na,1,0.5\n")
    assert read_rows(path, Line) == [Line("a", 1, 0.5)]
    path.write_text("name,count,share\na,1,\n")
    with pytest.raises(ValueError, match="float"):
        read_rows(path, Line)
    path.write_text("name,count,share,size\na,1,0.5,2\n")
    with pytest.raises(TypeError, match="size"):
        read_rows(path, Line)
