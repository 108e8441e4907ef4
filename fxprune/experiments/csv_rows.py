"""Tables that runs add to and resume from: a CSV whose columns are the fields of a dataclass."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

Row = TypeVar("Row")


def read_lines(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV as text by column; none if there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(path: str | Path, kind: type[Row]) -> list[Row]:
    """The rows of a CSV as dataclasses; none if there is no file.

    Args:
        path: the file. A column that it lacks takes the field's default.
        kind: a dataclass whose fields are str, int, float, or one of these or None; None is an empty cell.

    Raises:
        ValueError: a cell is not what its column holds.
        TypeError: a column is not a field.
    """
    types = get_type_hints(kind)
    return [
        kind(**{name: _value(text, types.get(name, str)) for name, text in line.items()}) for line in read_lines(path)
    ]


def write_rows(path: str | Path, kind: type[Row], rows: Iterable[Row], *, number: str = "") -> None:
    """Write a CSV, whole or not at all.

    Args:
        path: the file.
        kind: of the rows, a dataclass.
        rows: all of them.
        number: how to format floats; "" loses nothing.
    """
    from fxprune.files import atomic  # brings torch, which `fxprune benchmark --help` does not need

    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_columns(kind))
        writer.writerows(_cells(row, number) for row in rows)


def append_rows(path: str | Path, rows: Sequence[Any], *, number: str = "") -> None:
    """Add rows, dataclasses all of one kind, to a CSV; the header to a new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(_columns(type(rows[0])))
        writer.writerows(_cells(row, number) for row in rows)


def _columns(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _cells(row: Any, number: str) -> list[object]:
    values = [getattr(row, name) for name in _columns(row)]
    return [format(value, number) if isinstance(value, float) else value for value in values]


def _value(text: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    if text == "" and type(None) in kinds:
        return None
    return next(one for one in kinds if one is not type(None))(text)
