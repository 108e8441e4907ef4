from __future__ import annotations

import pytest

from fxprune.tables import Column, as_text, said_once, table

COLUMNS = (Column("layer"), Column("op", leaves=2), Column("zeros", right=True), Column("s", right=True, leaves=1))
ROWS = [("layer1.0.conv1", "Conv2d", "50.0%", "0.12"), ("head", "Linear", "0.0%", "12.50")]
NOTES = ["3 input channels are not a multiple of 4, so it is kept dense", ""]


def drawn(width: int, notes: list[str] | tuple[()] = ()) -> list[str]:
    return as_text(table(COLUMNS, ROWS, notes, width=width), width=width).splitlines()


@pytest.mark.parametrize("width", range(24, 120, 3))
def test_no_cell_is_cut_at_any_width(width: int) -> None:
    lines = drawn(width, NOTES)
    assert max(map(len, lines)) <= width
    for name, _, zeros, _ in ROWS:
        assert any(name in line and zeros in line for line in lines)
    assert "dense" in " ".join(lines)


def test_the_least_important_column_leaves_first() -> None:
    headings = [drawn(width)[0].split() for width in (60, 32, 24)]
    assert headings == [["layer", "op", "zeros", "s"], ["layer", "op", "zeros"], ["layer", "zeros"]]


def test_notes_stand_beside_or_below_once_for_each_text() -> None:
    assert "note" in drawn(110, NOTES)[0]
    lines = drawn(50, ["dead inputs of some kind or other", "dead inputs of some kind or other"])
    assert "note" not in lines[0]
    assert " ".join(lines).count("dead inputs") == 1
    assert any(line.startswith("layer1.0.conv1, head: dead") for line in lines)


def test_a_column_without_figures_is_not_drawn() -> None:
    text = as_text(table(COLUMNS, [("a", "", "1%", "")], width=80), width=80)
    assert text.splitlines()[0].split() == ["layer", "zeros"]


def test_what_is_said_once() -> None:
    assert said_once(["x", "", "x"]) == "x"
    assert said_once(["x", "y"]) == said_once(["x", ""]) == said_once([]) == ""
